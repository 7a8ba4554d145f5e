"""The splice, its alignment check, text-only rows, the projector's zero path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.projectors import build_projector
from mmit.models.vision import build_vision
from mmit.models.vlm import VLM

LLAMA = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=LLAMA, dtype=torch.float32)
    vision = build_vision("hf", CLIP)
    projector = build_projector("mlp", vision_dim=vision.dim, llm_dim=16, grid=vision.grid)
    return VLM(llm, vision=vision, projector=projector)


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


def pictures(count):
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_image_tokens_go_where_the_slots_are(vlm):
    features = vlm.encode_images(pictures(2))
    ids = ints(5, *[0] * 4, 6, *[0] * 4)
    places = ints(1, 2, 3, 4, 6, 7, 8, 9)
    swapped = ints(4, 5, 6, 7, 0, 1, 2, 3)
    out = vlm.embed(ids, image_positions=places, image_index=swapped, image_tokens=4, features=features)
    words, images = vlm.word_embeddings, vlm.image_embeddings(features)
    torch.testing.assert_close(out[0], words[5])
    torch.testing.assert_close(out[5], words[6])
    torch.testing.assert_close(out[1:5], images[1])
    torch.testing.assert_close(out[6:], images[0])


def test_misalignment_states_both_counts_and_the_likely_cause(vlm):
    features = vlm.encode_images(pictures(1))
    given = {"image_positions": ints(0, 1, 2), "image_index": ints(0, 1, 2)}
    with pytest.raises(ModelError, match="1 images give 4 image tokens each, but the text was laid out for 3") as error:
        vlm.embed(ints(0, 0, 0), **given, image_tokens=3, features=features)
    assert "4 tokens per image" in error.value.remedy
    with pytest.raises(ModelError, match="3 image positions for 4 tokens"):
        vlm.embed(ints(0, 0, 0), **{**given, "image_index": ints(0, 1, 2, 3)}, image_tokens=4, features=features)
    with pytest.raises(ModelError, match="3 image positions but no image"):
        vlm.embed(ints(0, 0, 0), **given, image_tokens=3)


def row(vlm, ids, **images):
    length = len(ids)
    return vlm(
        input_ids=ids,
        positions=torch.arange(length),
        nodes=torch.tensor([[0, length, -1]]),
        predict_at=ints(length - 1),
        targets=ints(3),
        **images,
    )


def test_text_only_rows_touch_the_projector_with_zero_weight(vlm):
    vlm.train()
    vlm.zero_grad()
    row(vlm, ints(1, 2, 3), image_positions=ints(), image_index=ints(), image_tokens=4).sum().backward()
    gradients = [p.grad for p in vlm.projector.parameters()]
    assert all(g is not None and g.abs().max() == 0 for g in gradients)


def test_a_divided_projector_runs_in_every_row_also_without_gradients(vlm):
    """A rank that skipped it would wait for another layer than the ranks with pictures."""
    vlm.eval()
    calls = []
    handle = vlm.projector.register_forward_hook(lambda *_: calls.append(1))
    text: dict[str, Any] = {"image_positions": ints(), "image_index": ints(), "image_tokens": 4}
    try:
        plain = row(vlm, ints(1, 2, 3), **text)
        assert not calls
        for parameter in vlm.projector.parameters():
            parameter.ds_shape = parameter.shape  # as ZeRO-3 marks what it divides
        assert torch.equal(row(vlm, ints(1, 2, 3), **text), plain) and calls
    finally:
        handle.remove()
        for parameter in vlm.projector.parameters():
            parameter.__dict__.pop("ds_shape", None)


def test_a_picture_changes_the_answer_and_the_tower_records_nothing(vlm):
    vlm.train()
    a, b = (
        row(
            vlm,
            ints(1, 0, 0, 0, 0, 2),
            pixels=pictures(2)[i : i + 1],
            image_positions=ints(1, 2, 3, 4),
            image_index=ints(0, 1, 2, 3),
            image_tokens=4,
        )
        for i in range(2)
    )
    assert a.item() != b.item()
    a.sum().backward()
    assert all(p.grad is None for p in vlm.vision.parameters())
    assert all(p.grad.abs().sum() > 0 for p in vlm.projector.parameters())


def test_a_text_only_model_refuses_pictures():
    vlm = VLM(load_llm("tiny", random_init=LLAMA, dtype=torch.float32), vision=None, projector=None)
    assert vlm.image_tokens == 0
    with pytest.raises(ModelError, match="no vision tower"):
        vlm.encode_images(pictures(1))
    with pytest.raises(ModelError, match="needs a projector"):
        VLM(vlm.llm, vision=build_vision("hf", CLIP), projector=None)
