"""DeepStack: what Qwen3-VL's text model does with the features of several layers, in rows, batches and generation."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from mmit.errors import ConfigError, ModelError
from mmit.models import decoding
from mmit.models.llm import load_llm, recompute_activations
from mmit.models.modes import training_mode
from mmit.models.projectors import build_projector
from mmit.models.tuning import apply_tuning
from mmit.models.vision import build_vision
from mmit.models.vlm import VLM
from mmit.train.run import run
from tests.interop.test_llava_hf_write import CLIP
from tests.models.small_llms import family
from tests.models.tuning.test_reach import FROZEN
from tests.tiny_run import two_layers as tiny_config

LEVELS = 3  # layers of the encoder that are read: the last is the image tokens, two are added inside the LLM
TOKENS = 4
# Two records: text, a picture, text; and text alone.
IDS = torch.tensor([5, 9, 0, 0, 0, 0, 11, 7, 3, 8, 12, 21])
AT_PICTURE = torch.tensor([2, 3, 4, 5])
NODES = torch.tensor([[0, 8, -1], [8, 4, -1]])
POSITIONS = torch.tensor([*range(8), *range(4)])


def composite(*, layers: int = 3) -> VLM:
    options = family("qwen3") | {"num_hidden_layers": layers}
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=options, dtype=torch.float32)
    tower = build_vision("hf", CLIP, layer=[1, 2, 3])
    shape = {"vision_dim": tower.dim, "llm_dim": 32, "grid": tower.grid, "prefix": tower.prefix}
    return VLM(llm, vision=tower, projector=build_projector("deepstack_mlp", levels=LEVELS, **shape)).eval()


def embedded(vlm: VLM) -> torch.Tensor:
    features = vlm.encode_images(
        torch.randint(0, 255, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    )
    index = torch.arange(TOKENS)
    given = {"image_positions": AT_PICTURE, "image_index": index, "image_tokens": TOKENS}
    return vlm.embed(IDS, **given, features=features)


def theirs(vlm: VLM) -> torch.Tensor:
    """(8, V) logits of the record with the picture, by Qwen3-VL's own text model."""
    own = vlm.llm.config
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    config = Qwen3VLTextConfig(
        **{key: getattr(own, key) for key in keys},
        num_key_value_heads=own.num_key_value_heads,
        rms_norm_eps=own.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )
    model = Qwen3VLTextModel(config).eval()
    model.load_state_dict(vlm.llm.model.state_dict())
    wide = embedded(vlm)[:8]
    plain, *deep = wide.split(32, dim=-1)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, AT_PICTURE] = True
    hidden = model(
        inputs_embeds=plain[None],
        position_ids=torch.arange(8).expand(3, 1, 8),
        visual_pos_masks=mask,
        deepstack_visual_embeds=[level[AT_PICTURE] for level in deep],
    ).last_hidden_state
    return vlm.llm.lm_head(hidden)[0]


def ours(vlm: VLM) -> torch.Tensor:
    at = torch.arange(8)
    return vlm.row_logits(embedded(vlm), positions=POSITIONS, nodes=NODES, at=at)


@torch.no_grad()
def test_rows_and_padded_batches_are_qwen3_vl():
    vlm = composite()
    wanted = theirs(vlm)
    torch.testing.assert_close(ours(vlm), wanted, atol=1e-4, rtol=1e-4)
    plain = embedded(vlm)[:, :32]
    bare = vlm.row_logits(plain, positions=POSITIONS, nodes=NODES, at=torch.arange(8))
    assert (bare - wanted).abs().max() > 1e-2  # the levels do something
    vlm.run_padded()
    torch.testing.assert_close(ours(vlm), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_last_layer_that_is_read_gives_the_image_tokens():
    projector = composite().projector
    features = torch.randn(1, TOKENS, projector.vision_dim, generator=torch.Generator().manual_seed(0))
    whole = projector(features).split(32, dim=-1)
    for place, part in enumerate(features.split(8, dim=-1)):
        changed = features.clone()
        changed[..., 8 * place : 8 * place + 8] = part + 1
        moved = [not torch.equal(a, b) for a, b in zip(projector(changed).split(32, dim=-1), whole, strict=True)]
        assert moved == [part_of == (place + 1) % LEVELS for part_of in range(LEVELS)]


def test_gradients_reach_every_level_with_and_without_recomputed_layers():
    found = []
    for recompute in (False, True):
        vlm = composite()
        if recompute:
            recompute_activations(vlm.llm)
        with training_mode(vlm):
            loss = vlm.row_losses(
                embedded(vlm), positions=POSITIONS, nodes=NODES, at=torch.tensor([6, 9]), targets=torch.tensor([7, 12])
            ).sum()
            loss.backward()
        found.append({n: p.grad for n, p in vlm.projector.named_parameters()})
    assert all(g is not None and g.abs().max() > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@torch.no_grad()
def test_greedy_decoding_goes_on_from_the_levels_and_a_soft_prompt_fits_in_front():
    vlm = composite()
    for tuned in (False, True):
        if tuned:
            plan = {"mode": "soft_prompt", "lr": 1e-3, "options": {"tokens": 3}}
            apply_tuning(vlm, {"vision": FROZEN, "projector": FROZEN, "llm": plan})
        wide = embedded(vlm)[:8]
        row = {"positions": torch.arange(8), "nodes": torch.tensor([[0, 8, -1]])}
        prompts = decoding.Prompts(wide, row["positions"], row["nodes"], torch.tensor([7]))
        able = decoding.support(vlm.llm)
        state = decoding.prefill(vlm.llm, [prompts], support=able)
        answer = decoding.decode(vlm.llm, state, limits=[4], end_ids=())[0]
        words = vlm.llm.get_input_embeddings()(torch.tensor(answer))
        whole = torch.cat([wide, torch.nn.functional.pad(words, (0, 64))])
        at = torch.arange(7, 11)
        logits = vlm.row_logits(whole, positions=torch.arange(12), nodes=torch.tensor([[0, 12, -1]]), at=at)
        assert logits.argmax(-1).tolist() == answer


def test_more_levels_than_layers_and_uneven_widths_are_refused():
    with pytest.raises(ModelError, match="adds 2 levels .* has 1 layers"):
        ours(composite(layers=1))
    shape = {"vision_dim": 16, "llm_dim": 32, "grid": (2, 2)}
    with pytest.raises(ModelError, match="16 .* 3"):
        build_projector("deepstack_mlp", levels=3, **shape)
    with pytest.raises(ModelError, match="levels"):
        build_projector("deepstack_mlp", levels=1, **shape)


def test_a_run_from_yaml_trains_stores_and_answers(tmp_path):
    import mmit

    config = tiny_config(tmp_path, train={"steps": 2, "rows_per_step": 2, "precision": "fp32"})
    raw = config.model_dump()
    raw["model"]["vision"]["layer"] = [1, 2]
    raw["model"]["projector"] = {"kind": "deepstack_mlp", "options": {"levels": 2}}
    assert run(type(config).from_dict(raw)) == 0
    model = mmit.load(tmp_path / "run", device="cpu")
    assert isinstance(model.chat(str(tmp_path / "data" / "0.png"), "What color is it?", max_new_tokens=3), str)
    raw["run"]["dir"] = str(tmp_path / "other")
    with pytest.raises(ModelError, match="two linear layers"):
        run(type(config).from_dict(raw | {"export": ["llava-hf"]}))
    raw["align"] = {"captions": str(tmp_path / "data" / "captions.jsonl")}
    with pytest.raises(ConfigError, match="DeepStack"):
        run(type(config).from_dict(raw))
