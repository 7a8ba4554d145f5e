"""llava-hf folders made by transformers, read by mmit: the same ids, pixels, logits, answers, loss and gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import mmit
from mmit.data.chat import encode
from mmit.data.packing import Sample, build_row
from mmit.data.preparation import splice_index
from mmit.errors import ConfigError, ModelError
from mmit.generate import Model
from mmit.records import Image, Text, Turn
from tests.interop.llava_models import make_llava_hf

TOLERANCE = 1e-5


def picture(seed: int) -> PIL.Image.Image:
    box = (-2 + 0.1 * seed, -1, 1, 1)
    return PIL.Image.effect_mandelbrot((40 + 4 * seed, 24), box, 20).convert("RGB")


TALKS: dict[str, list[Any]] = {
    "text only": ["How many circles?"],
    "one image": [picture(0), "What is it?"],
    "several images": [picture(1), picture(2), picture(3), "Are they alike, and which one is blue?"],
}


def turns(parts: list[Any]) -> tuple[Turn, ...]:
    return (Turn("user", tuple(Text(p) if isinstance(p, str) else Image(p) for p in parts)),)


def processed(processor: Any, talks: list[list[Any]]) -> Any:
    """What transformers' processor makes of talks, right-padded."""
    texts, images = [], []
    for parts in talks:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images += [p for p in parts if not isinstance(p, str)]
    processor.tokenizer.padding_side = "right"
    return processor(images=images or None, text=texts, padding=True, return_tensors="pt")


def samples(model: Model, talks: list[list[Any]]) -> tuple[list[Sample], torch.Tensor | None]:
    """The same talks in mmit, every token a target; and all their pictures."""
    found, pixels = [], []
    for number, parts in enumerate(talks):
        encoded = encode(turns(parts), model.chat_format, model.tokenizer, generate=True)
        keys = tuple((number, i) for i in range(sum(i < 0 for i in encoded.ids)))
        # A token after the prompt, so that the logits at its last position are asked for too.
        shown = [model.preparation.spread(Image(p)).tokens for p in parts if not isinstance(p, str)]
        found.append(Sample((*encoded.ids, 0), (*[False] * len(encoded.ids), True), keys, number, tuple(shown)))
        pixels += [model.preparation.pixels(Image(p)) for p in parts if not isinstance(p, str)]
    return found, torch.cat(pixels) if pixels else None


@torch.no_grad()
def logits(model: Model, talks: list[list[Any]]) -> list[torch.Tensor]:
    """Logits at every position of every talk, all talks in one packed row: one (T, V) each."""
    vlm = model.vlm
    found, pixels = samples(model, talks)
    row = build_row(found)
    # Pictures come talk after talk, and a row may lay its talks in another order.
    spreads = {
        (number, i): model.preparation.spread(Image(p))
        for number, parts in enumerate(talks)
        for i, p in enumerate(q for q in parts if not isinstance(q, str))
    }
    keys = list(dict.fromkeys(row.images))
    features = None
    if pixels is not None:
        seen = dict(zip(spreads, vlm.encode_images(pixels).split([s.crops for s in spreads.values()]), strict=True))
        features = torch.cat([seen[key] for key in keys])
    embeddings = vlm.embed(
        row.input_ids,
        image_positions=row.image_positions,
        image_index=splice_index(row.images, spreads, vlm.image_tokens),
        image_tokens=vlm.image_tokens,
        features=features,
    )
    at = torch.arange(len(row.input_ids))
    scores = vlm.row_logits(embeddings, positions=row.positions, nodes=row.nodes, at=at)
    return [scores[path(row, end)] for end in row.predict_at.tolist()]


def path(row: Any, end: int) -> list[int]:
    """Row positions of the record that ends at `end`, from its first token on."""
    nodes = row.nodes.tolist()
    node = next(n for n, (start, length, _) in enumerate(nodes) if start <= end < start + length)
    places: list[int] = []
    while node >= 0:
        start, length, parent = nodes[node]
        places = list(range(start, start + length)) + places
        node = parent
    return places


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request: Any, tmp_path_factory: Any) -> tuple[Any, Model, Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_llava_hf(folder, tower=request.param)
    return theirs, mmit.load(folder, device="cpu"), AutoProcessor.from_pretrained(folder, backend="pil"), folder


@pytest.mark.parametrize("tokens", ["byte_level", "llama", "llama_legacy", "gemma"])
def test_ids_are_those_of_the_processor(tmp_path: Path, tokens: str) -> None:
    theirs = make_llava_hf(tmp_path, tokens=tokens)
    model, processor = mmit.load(tmp_path, device="cpu"), AutoProcessor.from_pretrained(tmp_path)
    for parts in TALKS.values():
        ids = encode(turns(parts), model.chat_format, model.tokenizer, generate=True).ids
        image = [theirs.config.image_token_index] * model.vlm.image_tokens
        ours = [token for i in ids for token in (image if i < 0 else [i])]
        assert ours == processed(processor, [parts])["input_ids"][0].tolist()


def test_pixels_are_those_of_the_processor(pair: Any) -> None:
    _, model, processor, _ = pair
    _, pixels = samples(model, [TALKS["several images"]])
    theirs = processed(processor, [TALKS["several images"]])["pixel_values"]
    torch.testing.assert_close(model.vlm.vision._normalise(pixels), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", [*TALKS, "batch of uneven lengths"])
def test_logits_are_those_of_transformers(pair: Any, case: str) -> None:
    theirs, model, processor, _ = pair
    talks = [TALKS[case]] if case in TALKS else list(TALKS.values())
    batch = processed(processor, talks)
    with torch.no_grad():
        expected = theirs(**batch).logits
    ours = logits(model, talks)
    for number, own in enumerate(ours):
        kept = batch["attention_mask"][number].bool()
        torch.testing.assert_close(own, expected[number][kept], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", TALKS)
def test_greedy_answers_are_those_of_transformers(pair: Any, case: str) -> None:
    theirs, model, processor, _ = pair
    batch = processed(processor, [TALKS[case]])
    new = theirs.generate(**batch, max_new_tokens=64, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
    while new and new[-1] == model.tokenizer.eos_token_id:
        new.pop()
    pictures = [p for p in TALKS[case] if not isinstance(p, str)]
    answer = model.chat(pictures, TALKS[case][-1], max_new_tokens=64)
    assert answer == processor.decode(new, skip_special_tokens=True).strip()
    assert len(new) == 64


@pytest.mark.parametrize(("layer", "strategy"), [(-1, "full"), (-1, "default"), (2, "default"), (-3, "full")])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_layer_and_tokens_that_the_config_names_are_read(
    tmp_path: Path, tower: str, layer: int, strategy: str
) -> None:
    if tower == "siglip" and strategy == "default":
        return  # refused, see below
    theirs = make_llava_hf(tmp_path, tower=tower, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    model = mmit.load(tmp_path, device="cpu")
    _, pixels = samples(model, [TALKS["one image"]])
    with torch.no_grad():
        expected = theirs.get_image_features(pixel_values=model.vlm.vision._normalise(pixels)).pooler_output[0]
        ours = model.vlm.image_embeddings(model.vlm.encode_images(pixels))[0]
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


NEWER = {"language_model.lm_head": "lm_head", "language_model.model": "model.language_model"}


@pytest.mark.parametrize("form", ["newer names", "vision_model names", "shards", "bin", "bin shards", "newer, tied"])
def test_every_form_of_the_weights_reads_alike(tmp_path: Path, form: str) -> None:
    make_llava_hf(tmp_path)
    expected = logits(mmit.load(tmp_path, device="cpu"), [TALKS["one image"]])[0]
    single = tmp_path / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    renamed = {}
    for key, tensor in tensors.items():
        if "newer" in form:
            old = next((prefix for prefix in NEWER if key.startswith(prefix)), None)
            key = f"model.{key}" if old is None else NEWER[old] + key.removeprefix(old)
        elif form == "vision_model names":
            key = key.replace("vision_tower.", "vision_tower.vision_model.")
        renamed[key] = tensor
    if form == "newer, tied":
        config = json.loads((tmp_path / "config.json").read_text())
        config["tie_word_embeddings"] = True
        (tmp_path / "config.json").write_text(json.dumps(config))
        renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"].clone()
        save_file(renamed, single)
        full = logits(mmit.load(tmp_path, device="cpu"), [TALKS["one image"]])[0]
        del renamed["lm_head.weight"]
        save_file(renamed, single)
        assert torch.equal(logits(mmit.load(tmp_path, device="cpu"), [TALKS["one image"]])[0], full)
        return
    if "shards" in form:
        suffix, save = (".bin", torch.save) if "bin" in form else (".safetensors", save_file)
        stem = "pytorch_model" if "bin" in form else "model"
        keys, places = sorted(renamed), {}
        for part in range(3):
            name = f"{stem}-{part + 1:05d}-of-00003{suffix}"
            save({k: renamed[k] for k in keys[part::3]}, tmp_path / name)
            places.update(dict.fromkeys(keys[part::3], name))
        index = tmp_path / f"{stem}{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    elif form == "bin":
        torch.save(renamed, tmp_path / "pytorch_model.bin")
    else:
        save_file(renamed, single)
    assert torch.equal(logits(mmit.load(tmp_path, device="cpu"), [TALKS["one image"]])[0], expected)


def test_what_is_missing_or_left_over_is_listed(tmp_path: Path) -> None:
    make_llava_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = {
        "language_model": "language_model.model.layers.1.mlp.up_proj.weight",
        "vision_tower": "vision_tower.encoder.layers.2.mlp.fc1.weight",  # above the layer that is read
        "multi_modal_projector": "multi_modal_projector.linear_2.bias",
    }
    for key in lost.values():
        save_file({k: v for k, v in tensors.items() if k != key}, file)
        with pytest.raises(ModelError, match="1 missing") as error:
            mmit.load(tmp_path, device="cpu")
        assert key.split(".")[-2] in str(error.value) or "layers.2.bias" in str(error.value)
    for key in ("image_newline", "language_model.model.extra", "vision_tower.extra", "multi_modal_projector.extra"):
        save_file({**tensors, key: torch.zeros(2)}, file)
        with pytest.raises(ModelError, match="left over|unknown"):
            mmit.load(tmp_path, device="cpu")
    file.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        mmit.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vision_feature_layer": [-2, 9]}, "layer 9 does not exist"),
        ({"projector_hidden_act": "relu"}, "activation 'relu'"),
        ({"vision_feature_layer": 9}, "layer 9 does not exist"),
    ],
)
def test_what_mmit_does_not_compute_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    make_llava_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=problem):
        mmit.load(tmp_path, device="cpu")


@pytest.mark.parametrize(("changes", "problem"), [({"image_token_index": 5}, "at id"), ({}, "tokens, its model")])
def test_another_tokenizer_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    make_llava_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if not changes:
        config["text_config"]["vocab_size"] = config["image_token_index"] - 3
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=f"(?s)its tokenizer has.*{problem}.*own tokenizer files"):
        mmit.load(tmp_path, device="cpu")


def test_siglip_has_no_class_token_to_drop(tmp_path: Path) -> None:
    make_llava_hf(tmp_path, tower="siglip", vision_feature_select_strategy="default")
    with pytest.raises(ModelError, match="drops the first token"):
        mmit.load(tmp_path, device="cpu")


def test_a_folder_without_a_template_asks_for_one(tmp_path: Path) -> None:
    make_llava_hf(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises((ModelError, ConfigError), match="no chat template"):
        mmit.load(tmp_path, device="cpu")


def test_one_step_gives_the_loss_and_projector_gradient_of_transformers(pair: Any) -> None:
    theirs, model, processor, folder = pair
    talk = TALKS["several images"]
    pictures = [p for p in talk if not isinstance(p, str)]
    encoded = encode(
        (*turns(talk), Turn("assistant", (Text("Two blue circles."),))), model.chat_format, model.tokenizer
    )
    spreads = {i: model.preparation.spread(Image(p)) for i, p in enumerate(pictures)}
    widths = tuple(spread.tokens for spread in spreads.values())
    row = build_row([Sample(encoded.ids, encoded.supervised, tuple(spreads), widths=widths)])
    _, pixels = samples(model, [talk])
    model.vlm.requires_grad_(False)
    model.vlm.projector.requires_grad_(True)
    model.vlm.projector.zero_grad()
    losses = model.vlm(
        input_ids=row.input_ids,
        positions=row.positions,
        nodes=row.nodes,
        predict_at=row.predict_at,
        targets=row.targets,
        image_positions=row.image_positions,
        image_index=splice_index(row.images, spreads, model.vlm.image_tokens),
        image_tokens=model.vlm.image_tokens,
        pixels=pixels,
    )
    losses.mean().backward()

    image = [theirs.config.image_token_index] * model.vlm.image_tokens
    ids = [t for i in encoded.ids for t in (image if i < 0 else [i])]
    labels = [
        t
        for i, s in zip(encoded.ids, encoded.supervised, strict=True)
        for t in ([-100] * len(image) if i < 0 else [i if s else -100])
    ]
    theirs.requires_grad_(False)
    theirs.model.multi_modal_projector.requires_grad_(True)
    theirs.zero_grad()
    loss = theirs(
        input_ids=torch.tensor([ids]),
        pixel_values=model.vlm.vision._normalise(pixels),
        labels=torch.tensor([labels]),
    ).loss
    loss.backward()
    torch.testing.assert_close(losses.mean(), loss, atol=TOLERANCE, rtol=0)
    layers = theirs.model.multi_modal_projector
    for own, other in (
        (model.vlm.projector.layers[0], layers.linear_1),
        (model.vlm.projector.layers[2], layers.linear_2),
    ):
        torch.testing.assert_close(own.weight.grad, other.weight.grad, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(own.bias.grad, other.bias.grad, atol=TOLERANCE, rtol=0)
        # The step itself: the same gradient gives the same weights.
        rate = 1e-2
        torch.testing.assert_close(own.weight - rate * own.weight.grad, other.weight - rate * other.weight.grad)
