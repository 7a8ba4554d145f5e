"""Banks in mmit's YAML; what is wrong with one is named with its file and template."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmit.errors import ConfigError
from mmit.templates import load
from mmit.templates.flan import read_patterns

BANK = """
task: shape
cluster: attributes
licence: CC0-1.0
fields: [image, colour, shape]
choices: [circle, rectangle, triangle]
templates:
  - {id: what, input: "{{ image }}What shape is this?", target: "{{ shape }}", metrics: [exact]}
  - {id: turned, input: "Describe a {{ shape }}.", target: "{{ colour }}", inverted: true, choices: null}
  - {id: kept, input: "{{ image }}Name the shape.", target: "{{ shape }}", split: held_out}
"""


def bank_file(folder: Path, text: str = BANK) -> str:
    (folder / "bank.yaml").write_text(text)
    return str(folder / "bank.yaml")


def test_a_bank_is_read(tmp_path):
    bank = load(bank_file(tmp_path))
    assert (bank.task, bank.cluster, bank.licence) == ("shape", "attributes", "CC0-1.0")
    assert [t.id for t in bank.of_split("train")] == ["what", "turned"]
    assert [t.id for t in bank.of_split("held_out")] == ["kept"]
    what, turned, _ = bank.templates
    assert what.choices == ("circle", "rectangle", "triangle") and turned.choices is None
    assert what.names == {"image", "shape"} and turned.inverted and not what.inverted


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('{{ shape }}", metrics', '{{ shap }}", metrics', r"bank.yaml#what: reads the field 'shap'(.|\n)*'shape'"),
        ("id: turned", "id: what", "two templates have the id 'what'"),
        ("Name the shape.", "What  shape is this?", "'what' and 'kept' have the same wording"),
        ('target: "{{ colour }}"', 'target: " "', "bank.yaml#turned: the target is empty"),
        ('target: "{{ colour }}"', "target: 3", "bank.yaml#turned: 'target' is missing or no text"),
        ("Describe a", "Describe ||| a", r"'input' holds '\|\|\|'"),
        ("inverted: true", "inverted: 'yes'", "'inverted' is 'yes'"),
        ("split: held_out", "split: heldout", r"unknown split 'heldout'(.|\n)*'held_out'"),
        ("[circle, rectangle, triangle]", "[circle, circle]", "the choice 'circle' occurs twice"),
        ("[circle, rectangle, triangle]", "[circle, '']", "choice 2 is empty"),
        ("task: shape", "tasks: shape", r"unknown key 'tasks'(.|\n)*'task'"),
        ("metrics: [exact]", "metric: exact", r"unknown key 'metric'(.|\n)*'metrics'"),
        ("Describe a {{ shape }}", "Describe a {{ shape", r"bank.yaml#turned: the template does not compile, line 1"),
        ("Describe a {{ shape }}", "{% include 'x' %}", "'include' is not supported"),
        ("Describe a {{ shape }}", "{{ shape|shell }}", "No filter named 'shell'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, said):
    assert old in BANK
    with pytest.raises(ConfigError, match=said):
        load(bank_file(tmp_path, BANK.replace(old, new, 1)))


def test_missing_and_empty_banks(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="'templates' is missing"):
        load(bank_file(tmp_path, "task: a"))
    with pytest.raises(ConfigError, match="no templates"):
        load(bank_file(tmp_path, "task: a\ntemplates: []"))
    bank = load(bank_file(tmp_path, BANK.replace("split: held_out", "split: train")))
    with pytest.raises(ConfigError, match="no template of task 'shape' is in the split 'held_out'"):
        bank.of_split("held_out")


@pytest.mark.slow
def test_all_of_promptsource_and_flan():
    """With MMIT_PROMPTSOURCE and MMIT_FLAN naming a checkout of each: 2,085 templates, 61 x 10 patterns."""
    from mmit.templates.promptsource import read_promptsource

    sources, flan = os.environ.get("MMIT_PROMPTSOURCE"), os.environ.get("MMIT_FLAN")
    if not sources and not flan:
        pytest.skip("set MMIT_PROMPTSOURCE to PromptSource's folder of templates, MMIT_FLAN to FLAN's templates.py")
    if sources:
        banks = [read_promptsource(path) for path in sorted(Path(sources).rglob("templates.yaml"))]
        for bank in banks:
            bank.check(repeated=True)
        assert sum(len(bank.templates) for bank in banks) == 2085
    if flan:
        patterns, _ = read_patterns(Path(flan))
        assert len(patterns) == 61
        assert sum(len(load(f"flan:{flan}#{key}").templates) for key in patterns) == 610
