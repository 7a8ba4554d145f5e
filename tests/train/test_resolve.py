"""What a run learns from its model before the first step, on whole runs in miniature."""

from __future__ import annotations

import os

import pytest
from transformers import AutoTokenizer

from mmit.errors import ModelError
from mmit.forecast.forecast import forecast
from mmit.train.checkpoint import model as checkpoint
from mmit.train.run import run
from tests.models.small_llms import FAMILIES, family
from tests.tiny_run import tiny_config


def config_of(folder, name, *, packing="auto", short=0, **more):
    """A run of a family's small model with the tokenizer's vocabulary, `short` rows too small."""
    config = tiny_config(folder, train={"steps": 1, "rows_per_step": 2, "precision": "fp32"})
    count = len(AutoTokenizer.from_pretrained(config.model.llm.name))
    options = family(name) | {"vocab_size": count - short} | more
    llm = config.model.llm.model_copy(update={"random_init": options})
    data = config.data.model_copy(update={"packing": packing})
    return config.model_copy(update={"model": config.model.model_copy(update={"llm": llm}), "data": data})


def said(capsys) -> str:
    """What the run printed, on one line."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_a_model_that_cannot_pack_trains_padded_and_says_so(tmp_path, capsys):
    run(config_of(tmp_path, "falcon"))
    assert "data.packing is false for FalconForCausalLM" in said(capsys)
    assert checkpoint.read_config(checkpoint.checkpoints(tmp_path / "run")[-1]).data.packing is False
    with pytest.raises(ModelError, match="set data.packing=auto or false"):
        run(config_of(tmp_path / "asked", "falcon", packing=True))


@pytest.mark.skipif("inkling_text" not in FAMILIES, reason="this transformers has no Inkling")
def test_a_bias_on_scores_trains_padded_by_itself_and_says_why(tmp_path, capsys):
    run(config_of(tmp_path, "inkling_text"))
    assert "InklingAttention adds a bias to its scores, which packed attention does not compute; rec" in said(capsys)
    assert checkpoint.read_config(checkpoint.checkpoints(tmp_path / "run")[-1]).data.packing is False
    with pytest.raises(ModelError, match="set data.packing=auto or false"):
        run(config_of(tmp_path / "asked", "inkling_text", packing=True))


def test_ids_beyond_the_embedding_table_are_refused(tmp_path):
    with pytest.raises(ModelError, match="embedding table has"):
        run(config_of(tmp_path, "llama", short=3))


def test_records_of_both_rotary_factors_share_no_beginning(tmp_path, capsys):
    run(config_of(tmp_path, "phi3-longrope"))
    assert "data.share_prefix is false" in said(capsys)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_dry_run_of_experts_forecasts(tmp_path, name):
    found = forecast(config_of(tmp_path, name))
    assert found.step_flops > 0 and any("experts" in note for note in found.notes)


@pytest.mark.skipif("deepseek_v32" not in FAMILIES, reason="this transformers has no DeepSeek-V3.2")
def test_a_model_that_does_not_run_on_shapes_alone_is_told(tmp_path):
    with pytest.raises(ModelError, match="cost cannot be forecast"):
        forecast(config_of(tmp_path, "deepseek_v32"))


def test_a_checkpoint_refers_to_local_folders_from_anywhere(tmp_path):
    config = config_of(tmp_path, "llama")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        llm = config.model.llm.model_copy(update={"name": "tokenizer"})
        run(config.model_copy(update={"model": config.model.model_copy(update={"llm": llm})}))
    finally:
        os.chdir(here)
    kept = checkpoint.read_config(checkpoint.checkpoints(tmp_path / "run")[-1]).model.llm.name
    assert kept == str(tmp_path / "tokenizer")
