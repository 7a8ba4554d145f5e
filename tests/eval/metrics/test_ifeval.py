"""IFEval's scores, strict and loose, and rows that cannot be scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS, check_installed, ifeval_rules
from mmit.eval.metrics.ifeval import loose_variants
from mmit.eval.metrics.ifeval_rules import WORD_TOOLS

WORDS = WORD_TOOLS["builtin"]()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(ifeval_rules, "find_spec", lambda name: None)
    row = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "fr"}]}
    with pytest.raises(MmitError, match="needs the package langdetect"):
        METRICS["ifeval:strict"](["bonjour"], [row])
    with pytest.raises(MmitError, match="langdetect"):
        check_installed("ifeval:strict", [row])  # before any question is asked
    check_installed("ifeval:strict", [{"instruction_id_list": ["punctuation:no_comma"]}])
    with pytest.raises(MmitError, match="tokeniser=builtin"):
        METRICS["ifeval:strict-nltk"](["bonjour"], [row])


@given(st.text(max_size=40))
def test_loose_only_adds(text):
    names = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
    row = {"instruction_id_list": names, "kwargs": [{}] * 3}
    strict, loose = METRICS["ifeval:strict"]([text], [row]), METRICS["ifeval:loose"]([text], [row])
    assert strict.value <= loose.value
    assert all(a <= b for a, b in zip(strict.details["parsed"][0], loose.details["parsed"][0], strict=True))
    assert text in loose_variants(text) and len(loose_variants(text)) == 8


def test_scores():
    rows = [
        {"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}]},
        # The hub's file fills unused arguments with null.
        {
            "instruction_id_list": ["detectable_content:number_placeholders"],
            "kwargs": [{"num_placeholders": 1, "letter": None}],
        },
    ]
    score = METRICS["ifeval:strict"](["Sure, here:\n<<a>>", "[x]"], rows)
    d = score.details
    assert (score.value, d["prompt_level_loose"]) == (0.5, 1.0)
    assert d["instruction_level_strict"] == pytest.approx(2 / 3) and d["instruction_level_loose"] == 1.0
    assert d["by_instruction"]["punctuation:no_comma"] == 0.0 and d["instructions"] == 3
    assert METRICS["ifeval:loose"](["Sure, here:\n<<a>>", "[x]"], rows).value == 1.0


@pytest.mark.parametrize(
    ("names", "kwargs", "says"),
    [
        (["punctuation:no_coma"], [{}], "did you mean 'punctuation:no_comma'"),
        (["startend:end_checker"], [{}], "lacks end_phrase"),
        (["startend:quotation"], [], "1 instructions but 0 kwargs"),
        (["keywords:existence"], [{"keywords": ["("]}], "regular expression"),
    ],
)
def test_bad_rows(names, kwargs, says):
    with pytest.raises(MmitError, match=says):
        METRICS["ifeval:strict"](["a"], [{"instruction_id_list": names, "kwargs": kwargs}])
