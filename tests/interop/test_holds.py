"""What a format cannot hold is said from the config: before a run that lists it, and first thing in an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import ModelError
from mmit.models.interop.holds import TextFacts, beyond_body_and_head, check_export, text_facts
from mmit.models.interop.llava_names import why_not_found
from mmit.models.llm import load_llm
from mmit.train.run import run
from tests.models.small_llms import FAMILIES, family
from tests.tiny_run import two_layers as tiny_config

LLAMA = TextFacts("llama", "model", plain=True, tied=False)
TIED = TextFacts("llama", "model", plain=True, tied=True)
DIMS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
}


def newer(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in FAMILIES, reason=f"this transformers has no {name}")


def sections(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tiny_config(tmp_path)
    model, tune = config.model.model_dump(), config.tune.model_dump()
    for key, value in changes.items():
        part, name = key.split("__")
        place = tune["llm"] if part == "llm" else tune["vision"] if part == "eye" else model[part]
        place[name] = value
    return model, tune


def test_what_every_format_holds_passes(tmp_path: Path) -> None:
    model, tune = sections(tmp_path)
    for format in ("llava-hf", "peft", "mmit"):
        check_export(format, model, tune, LLAMA)
    model["vision"]["fit"] = "pad"
    check_export("llava", model, tune, LLAMA)


@pytest.mark.parametrize(
    ("format", "changes", "facts", "told"),
    [
        ("llava-hf", {"llm__mode": "houlsby", "llm__options": {}}, LLAMA, "bottleneck adapters are not linear"),
        ("llava-hf", {"llm__mode": "soft_prompt", "llm__options": {}}, LLAMA, "a soft prompt is input"),
        ("llava-hf", {"llm__mode": "prefix", "llm__options": {}}, LLAMA, "a prefix is keys"),
        ("llava-hf", {"llm__mode": "bitfit", "llm__options": {"insert_biases": True}}, LLAMA, "inserted biases"),
        ("llava", {"llm__mode": "houlsby", "llm__options": {}, "vision__fit": "pad"}, LLAMA, "not linear"),
        ("llava", {"eye__mode": "full", "vision__fit": "pad"}, LLAMA, "do not hold a trained one"),
        ("llava", {}, LLAMA, "fit resize"),
        ("llava", {"vision__fit": "pad"}, TextFacts("qwen2", "model", True, False), "no class for a 'qwen2'"),
        ("llava-hf", {"llm__options": {"targets": ["q_proj", "lm_head"]}}, TIED, "one table"),
        ("llava-hf", {"vision__kind": "fused"}, LLAMA, "kind fused"),
        ("llava-hf", {"vision__fit": "native"}, LLAMA, "fit native"),
        ("llava-hf", {"vision__fit": "dynamic"}, LLAMA, "fit dynamic"),
        ("llava-hf", {"projector__kind": "resampler"}, LLAMA, "two linear layers"),
        ("llava-hf", {"projector__options": {"depth": 3}}, LLAMA, "two linear layers .*, and this one is mlp, depth 3"),
        ("llava-hf", {}, TextFacts("opt", "model", False, True), "'opt|opt LLM"),
        ("llava-hf", {}, TextFacts("granite", "model", True, True, ("logits_scaling", 8.0)), "logits_scaling 8.0"),
        ("peft", {"llm__mode": "full", "llm__options": {}}, None, "no adapter of peft's"),
        ("mmit", {"llm__options": {"init": "pissa"}}, None, "PiSSA"),
        ("gguf2", {}, None, "unknown export format"),
    ],
)
def test_what_a_format_cannot_hold_is_said_with_a_way_out(
    tmp_path: Path, format: str, changes: dict[str, Any], facts: TextFacts | None, told: str
) -> None:
    model, tune = sections(tmp_path, **changes)
    with pytest.raises(ModelError, match=told) as caught:
        check_export(format, model, tune, facts)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("llm", "told"),
    [
        ({"model_type": "llama", **DIMS}, None),
        ({"model_type": "qwen3", **DIMS, "head_dim": 8}, None),
        ({"model_type": "gpt_oss", **DIMS, "num_local_experts": 2, "head_dim": 8}, None),
        ({"model_type": "granite", **DIMS, "logits_scaling": 8.0}, "logits_scaling"),
        ({"model_type": "gemma2", **DIMS, "head_dim": 8}, "final_logit_softcapping"),
        ({"model_type": "cohere", **DIMS, "logit_scale": 0.06}, "logit_scale"),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}, "gpt2 LLM"),
        (
            {"model_type": "opt", "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"vocab_size": 50, "word_embed_proj_dim": 16},
            "opt LLM",
        ),
    ],
)
def test_the_facts_come_from_the_class_itself(tmp_path: Path, llm: dict[str, Any], told: str | None) -> None:
    facts = text_facts({"name": "none", "random_init": llm})
    model, tune = sections(tmp_path)
    if told is None:
        return check_export("llava-hf", model, tune, facts)
    with pytest.raises(ModelError, match=told):
        check_export("llava-hf", model, tune, facts)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gemma4_text", "embeddings of the token ids"),
        ("vaultgemma", "final_logit_softcapping"),
        ("opt", "does not call its body as a whole"),
        ("phi", "plain head"),  # a head with a bias
        ("mamba2", "is not a body 'model'"),
        ("granitemoe", None),  # has a key that scales logits, by 1
        ("nemotron_h", None),  # its words are not under embed_tokens
        ("qwen3_next", None),
        pytest.param("sarvam_moe", None, marks=newer("sarvam_moe")),
        pytest.param("hy_v4", None, marks=newer("hy_v4")),  # its published names come back in files of its own alone
        pytest.param("inkling_text", "between body and head", marks=newer("inkling_text")),
        # Its config does not say whether embeddings are tied, which LLaVA's asks.
        pytest.param("inkling2_text", "final_logit_softcapping", marks=newer("inkling2_text")),
    ],
)
def test_the_facts_of_more_families(tmp_path: Path, name: str, told: str | None) -> None:
    facts = text_facts({"name": "none", "random_init": family(name)})
    model, tune = sections(tmp_path)
    if told is None:
        return check_export("llava-hf", model, tune, facts)
    with pytest.raises(ModelError, match=told):
        check_export("llava-hf", model, tune, facts)


def test_tensors_that_transformers_does_not_find_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load_llm("none", random_init=family("mixtral"), empty=True)
    assert why_not_found(llm) is None
    gate = "model.layers.0.mlp.gate.weight"
    state = {key.replace(gate, "model.layers.0.mlp.gates.weight"): v for key, v in llm.state_dict().items()}
    monkeypatch.setattr(llm, "state_dict", lambda: state)
    told = str(why_not_found(llm))
    assert "does not find 2 of its tensors" in told and "mlp.gate" in told


class Scaled(LlamaForCausalLM):
    """Does what a key nobody knows might say."""

    where = "logits"

    def forward(self, inputs_embeds: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden = self.model(inputs_embeds=inputs_embeds * 2 if self.where == "words" else inputs_embeds, **kwargs)[0]
        logits = self.lm_head(hidden / 3 if self.where == "hidden" else hidden)
        return CausalLMOutput(logits=logits.tanh() if self.where == "logits" else logits)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("logits", "logits after the head"),
        ("hidden", "between body and head"),
        ("words", "before its body"),
        ("", None),
    ],
)
def test_what_a_class_does_around_its_body_is_seen_without_a_key(where: str, told: str | None) -> None:
    with torch.device("meta"):
        llm = Scaled(LlamaConfig(**DIMS))
    llm.where = where
    seen = beyond_body_and_head(llm)
    assert seen is None if told is None else seen is not None and told in seen


def test_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    tune = {"llm": {"mode": "houlsby", "lr": 1e-3}}
    config = tiny_config(tmp_path, tune=tune).model_dump() | {"export": ["llava-hf"]}
    with pytest.raises(ModelError, match="not linear"):
        run(type(tiny_config(tmp_path)).from_dict(config))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_written_in_the_formats_it_lists(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"steps": 1, "rows_per_step": 1, "precision": "fp32"})
    listed = type(config).from_dict(config.model_dump() | {"export": ["mmit", "llava-hf"]})
    (tmp_path / "c.yaml").write_text(listed.to_yaml())
    done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.yaml")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "export" / "llava-hf" / "model.safetensors").exists()
    assert (tmp_path / "run" / "export" / "mmit" / "manifest.json").exists()


@pytest.mark.parametrize("mode", ["houlsby", "soft_prompt", "bitfit"])
def test_an_export_says_no_first(tmp_path: Path, mode: str) -> None:
    options = {"insert_biases": True} if mode == "bitfit" else {"tokens": 2} if mode == "soft_prompt" else {"size": 2}
    tune = {"llm": {"mode": mode, "lr": 1e-2, "options": options}}
    assert run(tiny_config(tmp_path, tune=tune, train={"steps": 1, "rows_per_step": 1, "precision": "fp32"})) == 0
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, ModelError) or done.exit_code == 2
    told = str(done.exception) + done.output
    assert "cannot be merged" in told and not (tmp_path / "out").exists()
