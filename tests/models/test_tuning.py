"""Every tuning method on the composite: neutral at the start, trains what it lists, keeps that alone, comes back."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmit.cli import app
from mmit.data.chat import chat_format
from mmit.errors import CheckpointError, ModelError
from mmit.models import llm as models_llm
from mmit.models.assemble import assemble
from mmit.models.tuning import MODES, apply_tuning, merge, parameter_table, quantization
from mmit.train.checkpoint import folders
from mmit.train.checkpoint import model as checkpoint
from mmit.train.run import run
from tests.models.tuned_models import (
    PATHS,
    composite,
    config_for,
    disturb,
    logits,
    row,
    tune_plan,
    tuned,
)
from tests.tiny_run import two_layers as tiny_config

IA3 = {"targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]}
# method: mode, options, names of what is trained, how far the start may be from the base, whether it merges
LLM = {
    "full": ("full", {}, "", 0.0, True),
    "lora": ("lora", {"r": 4}, r"lora_[AB]", 0.0, True),
    "rslora": ("lora", {"r": 4, "rslora": True}, r"lora_[AB]", 0.0, True),
    "dora": ("lora", {"r": 4, "dora": True}, r"lora_([AB]|magnitude)", 1e-5, True),
    "gaussian": ("lora", {"r": 4, "init": "gaussian"}, r"lora_[AB]", 0.0, True),
    "orthogonal": ("lora", {"r": 4, "init": "orthogonal"}, r"lora_[AB]", 1e-5, True),
    "pissa": ("lora", {"r": 4, "init": "pissa"}, r"lora_[AB]", 1e-5, True),
    "olora": ("lora", {"r": 4, "init": "olora"}, r"lora_[AB]", 1e-5, True),
    "lora+": ("lora", {"r": 4, "lr_ratio": 16}, r"lora_[AB]", 0.0, True),
    "lora one layer": ("lora", {"layers": [1], "targets": ["q_proj"]}, r"layers\.1.*q_proj.lora_[AB]", 0.0, True),
    "ia3": ("ia3", {}, r"ia3_l", 0.0, True),
    "ia3 targets": ("ia3", IA3, r"ia3_l", 0.0, True),
    "houlsby": ("houlsby", {"size": 3}, r"adapter\.(up|down)|layers.*norm", 0.0, False),
    "houlsby alone": ("houlsby", {"size": 3, "norms": False, "after": "mlp"}, r"mlp\.adapter\.", 0.0, False),
    # Any further token takes part of the attention: a soft prompt cannot start without effect.
    "soft_prompt": ("soft_prompt", {"tokens": 3}, r"^mmit_prompt\.embeddings$", None, False),
    "prefix": ("prefix", {"tokens": 3}, r"self_attn\.mmit_prefix\.(keys|values|gate)", 0.0, False),
    # The prefix of the paper joins the softmax and takes its part of it.
    "prefix ungated": ("prefix", {"tokens": 3, "gated": False}, r"mmit_prefix\.(keys|values)", None, False),
    "bitfit": ("bitfit", {"insert_biases": True}, r"(proj|norm)\.bias", 0.0, False),
    "bitfit part": ("bitfit", {"insert_biases": True, "only": ["q_proj", "up_proj"]}, r"(q|up)_proj\.bias", 0.0, False),
    "layernorm": ("layernorm", {}, r"norm\.weight", 0.0, True),
}
VISION = {
    "full": ("full", {}, "", 0.0, True),
    "layernorm": ("layernorm", {}, r"norm\d?\.(weight|bias)", 0.0, True),
    "bitfit": ("bitfit", {}, r"\.bias$", 0.0, True),
    "lora": ("lora", {"r": 2}, r"(proj|fc\d)\.lora_[AB]", 0.0, True),
    "lora targets": ("lora", {"r": 2, "targets": ["q_proj"]}, r"q_proj\.lora_[AB]", 0.0, True),
}
CASES = {f"llm {k}": ("llm", *v) for k, v in LLM.items()} | {f"vision {k}": ("vision", *v) for k, v in VISION.items()}
# Nothing to train; needs bitsandbytes and has tests of its own below; needs a folder, see test_intrinsic.py.
UNTESTED = {"frozen", "qlora", "intrinsic"}
CASES["projector full"] = ("projector", "full", {}, "", 0.0, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


def test_every_method_is_tested_here():
    for component, modes in MODES.items():
        tested = {mode for part, mode, *_ in CASES.values() if part == component}
        assert tested == set(modes) - UNTESTED, component


def write(config, vlm, tokenizer, target):
    def fill(draft):
        chat = chat_format("hf", tokenizer)
        checkpoint.write_model(draft, checkpoint.Loaded(vlm, tokenizer, chat, {}, target, {}, config), step=1)

    folders.write_folder(target, [fill])


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_base_and_trains_what_it_lists(folder, case):
    component, mode, options, expected, tolerance, _ = CASES[case]
    config = config_for(folder, tune_plan(component, mode, options))
    vlm, _ = composite(config)
    before = logits(vlm.eval()).detach()
    groups = apply_tuning(vlm, config.tune.model_dump())
    after = logits(vlm.eval()).detach()
    if tolerance is None:
        assert (after - before).abs().max() > 1e-4
    else:
        assert (after - before).abs().max() <= tolerance
    listed = {name: p for g in groups for name, p in g.parameters}
    assert {id(p) for p in listed.values()} == {id(p) for p in vlm.parameters() if p.requires_grad}
    assert listed and all(re.search(expected, name) for name in listed), sorted(listed)
    vlm.train()
    vlm(**row()).sum().backward()
    reached = {id(p) for p in vlm.parameters() if p.grad is not None}
    assert reached == {id(p) for p in listed.values()}


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_holds_only_that_and_gives_the_same_logits(folder, tmp_path, case):
    component, mode, options, *_ = CASES[case]
    config = config_for(folder, tune_plan(component, mode, options))
    vlm, tokenizer = composite(config)
    apply_tuning(vlm, config.tune.model_dump())
    disturb(vlm)
    expected = logits(vlm.eval()).detach()
    write(config, vlm, tokenizer, tmp_path / "checkpoint")
    files = {p.relative_to(tmp_path / "checkpoint").as_posix(): p for p in (tmp_path / "checkpoint").rglob("*")}
    tensors = [p for n, p in files.items() if n.endswith(".safetensors") and n != "projector.safetensors"]
    assert not [n for n in files if n.endswith((".bin", ".pt", ".pkl"))]
    if component != "projector":
        (path,) = tensors
        stored = Counter(tuple(t.shape) for t in load_file(path).values())
        trained = Counter(tuple(p.shape) for p in vlm.parameters() if p.requires_grad)
        if mode != "full":  # tied or fixed tables make a whole component's file differ from its parameters
            assert stored == trained
        in_peft_layout = mode in ("lora", "ia3")
        assert (path.name == "adapter_model.safetensors") == in_peft_layout
    else:
        assert not tensors
    loaded = checkpoint.load_model(tmp_path / "checkpoint", device="cpu").vlm
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    untuned = checkpoint.load_model(tmp_path / "checkpoint", device="cpu", untuned=True).vlm
    assert (logits(untuned) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_unmerged(folder, case):
    component, mode, options, _, _, mergeable = CASES[case]
    vlm = tuned(config_for(folder, tune_plan(component, mode, options)))
    before = logits(vlm).detach()
    if not mergeable:
        with pytest.raises(ModelError, match="cannot be merged") as error:
            merge(vlm)
        assert error.value.remedy
        return
    merge(vlm)
    assert not any("lora_" in n or "ia3_" in n or "base_layer" in n for n, _ in vlm.named_parameters())
    torch.testing.assert_close(logits(vlm), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["houlsby", "soft_prompt", "prefix", "prefix ungated", "ia3", "bitfit"])
def test_a_packed_record_sees_what_it_sees_alone(folder, case):
    mode, options, *_ = LLM[case]
    vlm = tuned(config_for(folder, tune_plan("llm", mode, options)))
    packed = logits(vlm)
    for path in PATHS[::-1]:
        torch.testing.assert_close(packed[path], logits(vlm, path=path), atol=1e-5, rtol=0)
    vlm.check_isolation()


@pytest.mark.parametrize("mode", [m for m in ("full", "lora", "ia3", "houlsby", "soft_prompt", "prefix", "layernorm")])
def test_the_method_is_one_line_of_a_run(folder, tmp_path, mode):
    config = tiny_config(
        folder,
        run={"dir": str(tmp_path / "run")},
        tune={"llm": {"mode": mode}},
        train={"steps": 3, "rows_per_step": 2, "micro_rows": 2, "precision": "fp32"},
    )
    assert run(config) == 0
    loaded = checkpoint.load_model(tmp_path / "run", device="cpu")
    assert torch.isfinite(logits(loaded.vlm)).all()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_vision_methods_and_resume(folder, tmp_path, precision):
    tune = {
        "vision": {"mode": "lora", "lr": 1e-3, "options": {"r": 2}},
        "llm": {"mode": "bitfit", "lr": 1e-3, "options": {"insert_biases": True}},
    }
    train = {"steps": 3, "rows_per_step": 2, "micro_rows": 2, "precision": precision}
    train |= {"schedule": "constant", "warmup": 0.0}
    assert run(tiny_config(folder, run={"dir": str(tmp_path / "run")}, tune=tune, train=train)) == 0
    again = {"dir": str(tmp_path / "run"), "resume": "auto"}
    assert run(tiny_config(folder, run=again, tune=tune, train={**train, "steps": 5})) == 0
    names = {p.name for p in (checkpoint.find(tmp_path / "run")).iterdir()}
    assert {"vision_adapter", "llm_tuned.safetensors", "projector.safetensors"} <= names
    assert not names & {"llm", "adapter", "vision.safetensors"}
    second = {"dir": str(tmp_path / "second"), "init_from": str(tmp_path / "run")}
    assert run(tiny_config(folder, run=second, tune=tune, train=train)) == 0
    other = {"dir": str(tmp_path / "third"), "init_from": str(tmp_path / "run")}
    with pytest.raises(CheckpointError, match="tuning method") as error:
        run(tiny_config(folder, run=other, tune={**tune, "llm": {"mode": "houlsby"}}, train=train))
    assert "tune.llm" in error.value.remedy


FEW_STEPS = {
    "steps": 2,
    "rows_per_step": 2,
    "micro_rows": 2,
    "precision": "fp32",
    "schedule": "constant",
    "warmup": 0.0,
}


@pytest.fixture(scope="module")
def trained_whole(folder, tmp_path_factory):
    """A run that trained everything and was resumed."""
    place = tmp_path_factory.mktemp("whole")
    full = {"llm": {"mode": "full", "lr": 0.1}, "vision": {"mode": "full", "lr": 0.1}}
    assert run(tiny_config(folder, run={"dir": str(place)}, tune=full, train=FEW_STEPS)) == 0
    again = {"dir": str(place), "resume": "auto"}
    assert run(tiny_config(folder, run=again, tune=full, train={**FEW_STEPS, "steps": 3})) == 0
    return place


@pytest.mark.parametrize(
    "llm, vision",
    [pytest.param("frozen", "frozen", marks=pytest.mark.slow), ("lora", "lora"), ("houlsby", "layernorm")],
)
def test_a_second_stage_keeps_what_the_first_trained_whole(folder, trained_whole, tmp_path, llm, vision):
    train = FEW_STEPS
    second = {"dir": str(tmp_path / "b"), "init_from": str(trained_whole)}
    little = {"llm": {"mode": llm, "lr": 1e-9}, "vision": {"mode": vision, "lr": 1e-9}, "projector": {"lr": 1e-9}}
    assert run(tiny_config(folder, run=second, tune=little, train=train)) == 0
    a, b = (checkpoint.load_model(place, device="cpu").vlm for place in (trained_whole, tmp_path / "b"))
    torch.testing.assert_close(logits(b), logits(a), atol=1e-4, rtol=0)
    with pytest.raises(ModelError, match="changes the base"):
        pissa = {"llm": {"mode": "lora", "options": {"init": "pissa"}}}
        run(tiny_config(folder, run={**second, "dir": str(tmp_path / "c")}, tune=pissa, train=train))


def test_lora_plus_gives_b_its_own_rate(folder):
    config = config_for(folder, tune_plan("llm", "lora", {"lr_ratio": 16}))
    groups = apply_tuning(composite(config)[0], config.tune.model_dump())
    rates = {g.name: g.lr for g in groups}
    assert rates == {"llm": 1e-3, "llm_lora_b": 16e-3}
    assert all("lora_B" in n for n, _ in groups[1].parameters) and all("lora_A" in n for n, _ in groups[0].parameters)


def test_a_part_of_the_tower_is_trained_in_eval_mode(folder):
    config = config_for(folder, tune_plan("vision", "layernorm"))
    vlm, _ = composite(config)
    apply_tuning(vlm, config.tune.model_dump())
    vlm.train()
    assert not vlm.vision.training and vlm.projector.training
    table = {r["component"]: r for r in parameter_table(vlm)}
    assert 0 < table["vision"]["trained"] < table["vision"]["total"] and table["llm"]["trained"] == 0


@pytest.mark.parametrize(
    "component, mode, options, message, remedy",
    [
        ("llm", "lorra", {}, "unknown mode 'lorra'", "did you mean 'lora'"),
        ("vision", "prefix", {}, "unknown mode 'prefix'", "layernorm"),
        ("projector", "lora", {}, "unknown mode", "full"),
        ("llm", "lora", {"rr": 4}, "no option 'rr'", "'r'"),
        ("llm", "bitfit", {"r": 4}, "no option 'r'", "option of lora, qlora"),
        ("llm", "full", {"r": 4}, "no option 'r'", "takes no options"),
        ("llm", "lora", {"r": 0}, "is 0", "1 or more"),
        ("llm", "lora", {"init": "eva"}, "is 'eva'", "pissa"),
        ("llm", "lora", {"targets": ["wq"]}, "wq", "q_proj"),
        ("llm", "lora", {"dora": 1}, "is 1", "true or false"),
        ("llm", "ia3", {"targets": ["k_proj"]}, "together", "feedforward"),
        ("llm", "qlora", {}, "not loaded in 4 bits", "lora"),
        ("llm", "bitfit", {}, "has no bias", "insert_biases=true"),
        ("llm", "bitfit", {"insert_biases": True, "only": ["wq"]}, "no bias in modules named wq", "only"),
        ("llm", "houlsby", {"after": ["attn"]}, "no child 'attn'", "self_attn"),
        ("llm", "houlsby", {"activation": "gelo"}, "unknown activation", "gelu"),
        ("llm", "soft_prompt", {"tokens": 0}, "is 0", "1 or more"),
        ("vision", "lora", {"targets": ["wq"]}, "wq", "q_proj"),
    ],
)
def test_what_cannot_be_done_is_said_with_advice(folder, component, mode, options, message, remedy):
    vlm, _ = composite(tiny_config(folder))
    with pytest.raises(ModelError, match=re.escape(message)) as error:
        apply_tuning(vlm, tune_plan(component, mode, options))
    assert remedy in error.value.remedy and error.value.where.startswith(f"tune.{component}")


def test_next_to_nothing_is_refused(folder, monkeypatch):
    import mmit.models.tuning as tuning

    monkeypatch.setattr(tuning, "LEAST_SHARE", 0.01)
    vlm, _ = composite(tiny_config(folder))
    with pytest.raises(ModelError, match="next to nothing") as error:
        apply_tuning(vlm, tune_plan("llm", "soft_prompt", {"tokens": 1}))
    assert "lora" in error.value.remedy
    with pytest.raises(ModelError, match="nothing is trained"):
        apply_tuning(vlm, tune_plan("llm", "frozen"))


@pytest.mark.parametrize(("found", "said"), [(None, "not installed"), ("0.49.2", "0.50 or newer, 0.49.2 is installed")])
def test_qlora_says_what_this_machine_lacks(folder, tmp_path, monkeypatch, found, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = importlib.util.find_spec
    has = None if found is None else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: has if name == "bitsandbytes" else real(name, *a))
    monkeypatch.setattr(models_llm, "version", lambda name: found)
    with pytest.raises(ModelError, match=said) as error:
        run(qlora_config(folder, tmp_path))
    assert "mode lora" in error.value.remedy


def qlora_config(folder, tmp_path, **sections):
    """Of a base in a folder: random weights cannot be loaded in 4 bits."""
    config = tiny_config(folder, run={"dir": str(tmp_path / "run")}, tune={"llm": {"mode": "qlora"}})
    vlm, tokenizer = composite(config)
    vlm.llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    model = config.model.model_dump()
    model["llm"].update(name=str(tmp_path / "llm"), random_init=None)
    tune = {"llm": {"mode": "qlora", "lr": 1e-2, "options": {"r": 4, "dropout": 0.1}}}
    given = {"run": {"dir": str(tmp_path / "run")}, "tune": tune, "model": model}
    return tiny_config(folder, **{**given, **sections})


@pytest.mark.skipif(models_llm.why_not_4bit() is not None, reason=str(models_llm.why_not_4bit()))
def test_looking_at_a_qlora_model_leaves_its_weights_alone(folder, tmp_path):
    """bitsandbytes would pack the weights for the CPU, with scales in bf16, in a forward in evaluation mode."""
    config = qlora_config(folder, tmp_path)
    plan = config.tune.llm
    vlm, _ = assemble(
        config.model.model_dump(), dtype=torch.float32, quantization=quantization(plan.mode, plan.options)
    )
    apply_tuning(vlm, config.tune.model_dump())
    before = {k: v.clone() for k, v in vlm.state_dict().items()}
    assert any(v.dtype == torch.uint8 for v in before.values())
    vlm.check_isolation()
    with torch.no_grad():
        logits(vlm.eval())
    after = vlm.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.skipif(models_llm.why_not_4bit() is not None, reason=str(models_llm.why_not_4bit()))
def test_a_qlora_run_trains_resumes_and_is_written_without_its_quantisation(folder, tmp_path):
    train = {"steps": 4, "rows_per_step": 2, "micro_rows": 2, "precision": "fp32", "save_every": 2}
    assert run(qlora_config(folder, tmp_path, train=train)) == 0
    last = checkpoint.find(tmp_path / "run")
    expected = load_file(last / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(last)
    assert run(qlora_config(folder, tmp_path, train=train, run={"dir": str(tmp_path / "run"), "resume": "auto"})) == 0
    again = load_file(last / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in expected.items())
    small = checkpoint.load_model(tmp_path / "run", device="cpu")
    plain = checkpoint.load_model(tmp_path / "run", device="cpu", plain=True)
    assert (small.config.tune.llm.mode, plain.config.tune.llm.mode) == ("qlora", "lora")
    torch.testing.assert_close(logits(plain.vlm), logits(small.vlm), atol=1e-4, rtol=1e-4)
    merge(plain.vlm)
    torch.testing.assert_close(logits(plain.vlm), logits(small.vlm), atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="rounded again"):
        merge(small.vlm)
    told = CliRunner().invoke(
        app, ["export", str(tmp_path / "run"), "--format", "peft", "--out", str(tmp_path / "peft")]
    )
    assert told.exit_code == 0 and "largest difference of a logit from the source: 0 " in told.output, told.output
