"""PromptSource's files: read as data, whatever they say."""

from __future__ import annotations

import pytest

from mmit.errors import ConfigError
from mmit.templates import load

PROMPTSOURCE = r"""
dataset: films
subset: small
templates:
  11: !Template
    id: '11'
    name: mood
    answer_choices: bad ||| good
    jinja: "{{text}} Was it {{\"good or bad\"}}? |||\n{{ answer_choices [label] }}"
    metadata: !TemplateMetadata {choices_in_prompt: true, metrics: [Accuracy], original_task: true}
    reference: someone
  22: !Template
    id: '22'
    name: write
    answer_choices: null
    jinja: "{% if label %}A good one: ||| {{ text }}{% else %}A bad one: ||| {{ text }}{% endif %}"
    metadata: !TemplateMetadata {original_task: false}
    reference: ''
"""


def test_promptsource_files_are_read_and_nothing_in_them_runs(tmp_path):
    (tmp_path / "templates.yaml").write_text(PROMPTSOURCE)
    bank = load(f"promptsource:{tmp_path}")
    assert bank.task == "films_small" and bank.licence == "Apache-2.0"
    mood, write = bank.templates
    assert mood.names == {"text", "label"} and mood.choices_in_prompt and not mood.inverted and write.inverted
    hostile = PROMPTSOURCE.replace("reference: someone", "reference: !!python/object/apply:os.system [id]")
    (tmp_path / "templates.yaml").write_text(hostile)
    with pytest.raises(ConfigError, match="is not PromptSource's YAML"):
        load(f"promptsource:{tmp_path}")
