"""A model's answers: batched equals one at a time, pictures run once, streams add up, scores are right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import GenerationConfig

import mmit
from mmit.data.chat import chat_format, encode
from mmit.data.images import fit, load_rgb
from mmit.errors import CheckpointError, ConfigError, ImageError, RecordError
from mmit.generate import Model, as_prompt, ask
from mmit.models.llm import load_llm
from mmit.models.prefix_cache import BLOCK, PrefixCache
from mmit.models.projectors import build_projector
from mmit.models.sampling import Sampling
from mmit.models.vision import build_vision
from mmit.models.vlm import VLM
from mmit.pictures import Pictures
from mmit.records import Image, Record, Text, Turn, read_jsonl
from mmit.train.run import run
from tests.data.small_tokenizers import byte_level
from tests.models.small_llms import family
from tests.tiny_run import two_layers as tiny_config

TOKENIZER = byte_level()
CHAT = chat_format("chatml", TOKENIZER)
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(TOKENIZER),
    "max_position_embeddings": 400,
    "initializer_range": 0.5,
}
MAMBA = {k: LLAMA[k] for k in ("hidden_size", "num_hidden_layers", "vocab_size")} | {
    "model_type": "mamba",
    "state_size": 4,
    "initializer_range": 0.5,
}


def build(*, vision: bool = True, config: dict[str, Any] = LLAMA) -> Model:
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=config, dtype=torch.float32)
    if not vision:
        return Model(VLM(llm, vision=None, projector=None), TOKENIZER, CHAT)
    tower = build_vision("hf", CLIP)
    torch.nn.init.normal_(tower.encoder.get_parameter(next(n for n, _ in tower.encoder.named_parameters())), std=1.0)
    projector = build_projector("mlp", vision_dim=tower.dim, llm_dim=16, grid=tower.grid)
    for weight in projector.parameters():
        torch.nn.init.normal_(weight)
    image = {"size": [16, 16], "mode": "pad", "interpolation": "bicubic", "fill": [120, 110, 100]}
    return Model(VLM(llm, vision=tower, projector=projector), TOKENIZER, CHAT, image=image)


@pytest.fixture(scope="module")
def model() -> Model:
    return build()


def picture(n: int) -> PIL.Image.Image:
    noise = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return PIL.Image.fromarray(noise.numpy())


PICTURES = [Image(picture(n)) for n in range(3)]


def question(text: str, *images: Image, answer: str | None = None) -> Record:
    turns = [Turn("user", (*images, Text(text)))]
    return Record((*turns, Turn("assistant", (Text(answer),))) if answer else tuple(turns))


RECORDS = [
    question("What is it?", PICTURES[0]),
    question("How many circles are there?", PICTURES[1]),
    question("Hello"),
    question("What is it?", PICTURES[1], answer="a cat"),
    question("Which of them?", PICTURES[2], PICTURES[0]),
    question("The quick brown fox jumps over the lazy dog. " * 3),
    question("Is it blue?", PICTURES[0]),
    question("Is it blue?", PICTURES[0]),
]


@torch.inference_mode()
def reference(model: Model, record: Record, limit: int) -> str:
    """One record alone: embeddings put together by hand, transformers' generate, the tokenizer's decode."""
    ids = encode(as_prompt(record).turns, CHAT, TOKENIZER, generate=True).ids
    table = model.vlm.llm.get_input_embeddings()
    images = iter(record.images)
    parts = []
    for token in ids:
        if token >= 0:
            parts.append(table(torch.tensor([token])))
        else:
            pixels = fit(load_rgb(next(images)), (16, 16), mode="pad", fill=(120, 110, 100))
            parts.append(model.vlm.image_embeddings(model.vlm.encode_images(pixels[None]))[0])
    embeddings = torch.cat(parts)[None]
    out = model.vlm.llm.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=list(model.end_ids),
        pad_token_id=0,
    )
    return TOKENIZER.decode(out[0], skip_special_tokens=True).strip()


def test_greedy_equals_one_record_at_a_time(model: Model) -> None:
    expected = [reference(model, record, 40) for record in RECORDS]
    assert len(set(expected)) == 7  # the pictures and texts matter; the last two questions are equal
    for batch_size in (1, 3, 32):
        assert model.generate(RECORDS, batch_size=batch_size, max_new_tokens=40) == expected


@pytest.mark.parametrize("packed", [True, False])
def test_text_only_models(packed: bool) -> None:
    model = build(vision=False, config=LLAMA if packed else MAMBA)
    some = [record for record in RECORDS if not record.images]
    assert model.generate(some, max_new_tokens=32) == [reference(model, record, 32) for record in some]
    with pytest.raises(RecordError, match="no vision tower"):
        model.generate(RECORDS)


def test_a_model_decoded_one_by_one_sees_pictures_too() -> None:
    model = build(config=MAMBA)
    got = model.generate(RECORDS, max_new_tokens=12)
    assert got == [reference(model, record, 12) for record in RECORDS] and len(set(got)) > 4


def test_one_picture_and_its_tokens_are_computed_once_for_all_its_questions() -> None:
    model = build()
    asked = [question(f"Is there a number {n}?", PICTURES[n % 2]) for n in range(36)]
    expected = [reference(model, record, 3) for record in asked]
    assert model.generate(asked, max_new_tokens=3, batch_size=20) == expected
    usage = model.usage
    assert usage.pictures == 2
    one = encode(asked[0].turns, CHAT, TOKENIZER, generate=True).ids
    per_question = len(one) - 1 + model.vlm.image_tokens
    assert usage.unshared_tokens >= 36 * per_question
    # Beginning and picture twice in all; each question adds what follows the words that all of them share.
    assert usage.prefill_tokens <= 2 * per_question + 36 * 12 < usage.unshared_tokens / 2
    assert 0 < usage.new_tokens <= 36 * 3


def test_eighteen_questions_about_a_scene_take_a_fifth_of_the_prompt_tokens() -> None:
    model = build()
    asked = [question(f"Number {n}?", *PICTURES[:2], *PICTURES[:2], *PICTURES[:2]) for n in range(18)]
    tokens, answers = [], []
    for batch_size in (1, 18):
        before = model.usage.prefill_tokens
        answers.append(model.generate(asked, max_new_tokens=3, batch_size=batch_size))
        tokens.append(model.usage.prefill_tokens - before)
    assert answers[0] == answers[1]
    assert tokens[0] >= 5 * tokens[1]


def test_pictures_run_once_even_when_batches_share_them() -> None:
    model = build()
    asked = [question("Which?", PICTURES[n % 3], PICTURES[(n + 1) % 3]) for n in range(9)]
    model.generate(asked, max_new_tokens=1, batch_size=2)
    assert model.usage.pictures == 3


def test_blank_images_hide_the_picture(model: Model) -> None:
    asked = [question("What is it?", image) for image in PICTURES]
    blank = model.generate(asked, max_new_tokens=20, blank_images=True)
    assert len(set(blank)) == 1
    colour = tuple(round(255 * channel) for channel in model.vlm.vision.mean)  # type: ignore[union-attr]
    uniform = Image(PIL.Image.new("RGB", (16, 16), colour))
    assert blank[0] == model.generate([question("What is it?", uniform)], max_new_tokens=20)[0]
    assert blank[0] not in model.generate(asked, max_new_tokens=20)


SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 16}


def test_sampling_is_reproducible_and_does_not_depend_on_the_batch(model: Model) -> None:
    drawn = model.generate(RECORDS, seed=5, **SAMPLING)
    assert drawn == model.generate(RECORDS, seed=5, batch_size=2, **SAMPLING)
    assert drawn != model.generate(RECORDS, seed=6, **SAMPLING)
    assert drawn[6] != drawn[7]  # equal questions, separate draws
    assert drawn[0] == model.chat(PICTURES[0], "What is it?", seed=5, **SAMPLING)


@pytest.mark.parametrize("stop", [(), ("e",), ("abc", " c")])
def test_streams_add_up_to_the_answer(model: Model, stop: Sequence[str]) -> None:
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 40, "stop": stop, "seed": seed}
        pieces = list(model.stream(PICTURES[seed % 3], "Tell me.", **options))
        whole = model.chat(PICTURES[seed % 3], "Tell me.", **options)
        assert "".join(pieces) == whole and all(pieces)
        assert stop or len(pieces) > 3
        assert not any(s in whole for s in stop)


def test_stop_texts_end_an_answer_early(model: Model) -> None:
    free = model.generate(RECORDS, max_new_tokens=40)
    stop = [next(c for c in free[0][5:] if c.isalpha()), "\N{SNOWMAN}"]
    before = model.usage.new_tokens
    cut = model.generate(RECORDS, max_new_tokens=40, stop=stop)
    assert cut == [text.split(stop[0])[0].strip() for text in free]
    assert model.usage.new_tokens - before < 40 * len(RECORDS)


def test_scores_equal_a_full_forward(model: Model) -> None:
    choices = ["yes", "no", "two blue circles", "two"]
    for with_end in (False, True):
        scores = model.score(RECORDS, choices, with_end=with_end, batch_size=9)
        for record, got in zip(RECORDS, scores, strict=True):
            expected = [likelihood(model, record, choice, with_end) for choice in choices]
            assert got == pytest.approx(expected, abs=1e-3)
    own = [[f"answer {n}"] * (1 + n % 3) for n in range(len(RECORDS))]
    scores = model.score(RECORDS, own)
    assert [len(s) for s in scores] == [len(o) for o in own]
    assert scores[3] == pytest.approx([likelihood(model, RECORDS[3], "answer 3", False)], abs=1e-3)
    with pytest.raises(ConfigError, match="lists of choices"):
        model.score(RECORDS, own[1:])


@torch.inference_mode()
def likelihood(model: Model, record: Record, answer: str, with_end: bool) -> float:
    prompt = encode(as_prompt(record).turns, CHAT, TOKENIZER, generate=True).ids
    content = TOKENIZER(answer, add_special_tokens=False)["input_ids"] + list(CHAT.end_ids) * with_end
    embed = model.vlm.llm.get_input_embeddings()
    images = iter(record.images)
    parts = []
    for token in (*prompt, *content):
        if token >= 0:
            parts.append(embed(torch.tensor([token])))
        else:
            pixels = fit(load_rgb(next(images)), (16, 16), mode="pad", fill=(120, 110, 100))
            parts.append(model.vlm.image_embeddings(model.vlm.encode_images(pixels[None]))[0])
    log_probabilities = model.vlm.llm(inputs_embeds=torch.cat(parts)[None]).logits[0].log_softmax(-1)
    rows = log_probabilities[-len(content) - 1 : -1]
    return float(rows.gather(-1, torch.tensor(content)[:, None]).sum())


def test_scores_count_the_last_answer_only(model: Model) -> None:
    talk = ask(PICTURES[0], "And now?", history=[("What is it?", "a cat")])
    expected = likelihood(model, talk, "yes", False)
    assert model.score([talk], ["yes"]) == [[pytest.approx(expected, abs=1e-3)]]


def test_chat_puts_pictures_history_and_system_where_they_belong(model: Model) -> None:
    first, path = PICTURES[0].source, PICTURES[1].source
    talk = ask([first, path], "And now?", history=[("What is it?", "a cat")], system="Be short.")  # type: ignore[list-item]
    assert [turn.role for turn in talk.turns] == ["system", "user", "assistant", "user"]
    assert [image.source for image in talk.turns[1].parts[:2]] == [first, path]  # type: ignore[union-attr]
    assert talk.turns[3].parts == (Text("And now?"),)
    later = ask(first, "And this?", history=Record(talk.turns[:3]))  # type: ignore[arg-type]
    assert later.turns[:3] == talk.turns[:3] and later.images == (Image(first), Image(path), Image(first))
    options: dict[str, Any] = {"max_new_tokens": 8}
    assert (
        model.chat(first, "And this?", history=Record(talk.turns[:3]), **options)
        == model.generate([later], **options)[0]
    )  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="system turn"):
        ask(None, "And?", history=Record(talk.turns[:3]), system="Be long.")
    with pytest.raises(RecordError):
        ask(None, "And?", history=Record(talk.turns[:2]))
    with pytest.raises(RecordError, match="empty"):
        ask(None, " ")


def test_a_prompt_without_room_for_an_answer_is_refused_by_name(model: Model) -> None:
    long = Record(question("fox " * 500, PICTURES[0]).turns, id="long one", source="a.jsonl", row=3)
    with pytest.raises(RecordError, match=r"a.jsonl:3 \(long one\): takes \d+ tokens \(16 of them for 1 images\).*400"):
        model.generate([RECORDS[0], long])
    with pytest.raises(RecordError, match="^record 2: "):
        model.score([RECORDS[0], question("fox " * 500)], ["yes"])


def test_an_answer_ends_where_the_context_ends() -> None:
    model = build()
    record = question("fox " * 180)
    used = len(encode(record.turns, CHAT, TOKENIZER, generate=True).ids)
    model.generate([record], max_new_tokens=500)
    assert used < 400 and model.usage.new_tokens == 400 - used


def test_bad_pictures_and_options_are_clear_errors(model: Model, tmp_path: Any) -> None:
    missing = Record(question("What?", Image(str(tmp_path / "none.png"))).turns, id="q7")
    with pytest.raises(ImageError, match=r"q7.*none.png"):
        model.generate([missing])
    with pytest.raises(ConfigError, match="batch_size"):
        model.generate(RECORDS, batch_size=0)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        model.generate(RECORDS, max_new_tokens=0)
    with pytest.raises(ConfigError, match="temperature"):
        model.stream(None, "What?", temperature=-1)  # refused at the call, not when the first piece is asked for
    assert model.generate([]) == [] and model.score([], ["yes"]) == []


def test_progress_counts_every_record(model: Model) -> None:
    done: list[int] = []
    model.generate(RECORDS, max_new_tokens=1, batch_size=3, progress=done.append)
    assert sum(done) == len(RECORDS) and len(done) > 2


def test_bytes_and_paths_are_pictures(model: Model, tmp_path: Any) -> None:
    path = tmp_path / "a.png"
    picture(0).save(path)
    expected = model.chat(picture(0), "What is it?", max_new_tokens=8)
    for source in (path, str(path), path.read_bytes(), [path], Image(str(path))):
        assert model.chat(source, "What is it?", max_new_tokens=8) == expected
    assert expected != model.chat(None, "What is it?", max_new_tokens=8)


def test_dropout_is_off_and_nothing_is_recorded() -> None:
    parts = build()
    vlm = copy.deepcopy(parts.vlm).train()
    model = Model(vlm, TOKENIZER, CHAT, image=parts.image)
    assert not vlm.training
    assert model.chat(PICTURES[0], "Hi") == parts.chat(PICTURES[0], "Hi")
    assert all(parameter.grad is None for parameter in vlm.parameters())


def test_a_checkpoint_is_loaded_and_answers(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"steps": 2, "rows_per_step": 2, "precision": "fp32"})
    assert run(config) == 0
    model = mmit.load(config.run.dir, device="cpu")
    assert model.folder is not None and model.folder.name == "step-000002" and model.meta["step"] == 2
    record = next(read_jsonl(tmp_path / "data" / "train.jsonl"))
    first, again = model.generate([record], max_new_tokens=5), mmit.load(config.run.dir).generate
    assert first == again([record], max_new_tokens=5) and len(first) == 1
    assert mmit.load(config.run.dir, device="cpu", dtype="bf16").vlm.llm.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        mmit.load(config.run.dir, dtype="bf-16")
    with pytest.raises(CheckpointError, match="no such folder"):
        mmit.load(tmp_path / "nowhere")


def test_messages_are_answered_as_the_same_question_in_parts(model: Model) -> None:
    asked = [{"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What?"}]}]
    expected = model.chat(picture(0), "What?", max_new_tokens=8)
    assert model.chat(messages=asked, max_new_tokens=8) == expected
    assert "".join(model.stream(messages=asked, max_new_tokens=8)) == expected
    later = [*asked, {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "Sure?"}]
    told = model.chat(None, "Sure?", history=later[:2], max_new_tokens=8)
    assert told == model.chat(messages=later, max_new_tokens=8)
    with pytest.raises(ConfigError, match="messages and text"):
        model.chat(None, "What?", messages=asked)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.chat([{"role": "user", "content": "Hi"}]), "messages="),
        (lambda m: m.chat([{"role": "user", "content": "Hi"}], "x"), "messages="),
        (lambda m: m.chat(), "text is a NoneType"),
        (lambda m: m.chat("Hi"), "text is a NoneType"),
        (lambda m: m.generate([{"role": "user", "content": "Hi"}]), "entry 1 of records is a dict"),
        (lambda m: m.generate(["hi"]), "entry 1 of records is a str"),
        (lambda m: m.generate("hi"), "records is a str"),
        (lambda m: m.generate(ask(None, "hi")), "one Record"),
        (lambda m: m.chat(None, "hi", max_new_tokens=None), "max_new_tokens is None"),
        (lambda m: m.chat(None, "hi", max_new_tokens=2.0), "max_new_tokens is 2.0"),
        (lambda m: m.stream(None, "hi", max_new_tokens="2"), "max_new_tokens is '2'"),
        (lambda m: m.stream(None, "hi", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m: m.chat(None, "hi", temperature="0.5"), "temperature is '0.5'"),
        (lambda m: m.chat(None, "hi", temperature=True), "temperature is True"),
        (lambda m: m.chat(None, "hi", temperature=1.0, top_k=5.0), "top_k is 5.0"),
        (lambda m: m.chat(None, "hi", top_p="1"), "top_p is '1'"),
        (lambda m: m.chat(None, "hi", seed="x"), "seed is 'x'"),
        (lambda m: m.chat(None, "hi", stop=3), "stop is 3"),
        (lambda m: m.chat(None, "hi", stop=[3]), "stop is"),
        (lambda m: m.chat(None, "hi", stop=""), "stop is '', and every answer holds the empty text"),
        (lambda m: m.stream(None, "hi", stop=["a", ""]), "holds the empty text"),
        (lambda m: m.generate([ask(None, "hi")], stop=("",)), "holds the empty text"),
        (lambda m: m.stream(None, "hi", max_tokens=3), "max_tokens"),
        (lambda m: m.generate([ask(None, "hi")], batch_size="4"), "batch_size is '4'"),
        (lambda m: m.score([ask(None, "hi")], "yes"), "choices is a str"),
        (lambda m: m.score([ask(None, "hi")], [["yes", 3]]), "choices of record 1"),
        (lambda m: m.score("hi", ["yes"]), "records is a str"),
        (lambda m: m.score([ask(None, "hi")], [[]]), "record 1 has no choices"),
        (lambda m: m.score([ask(None, "a"), ask(None, "b")], [["yes"], ()]), "record 2 has no choices"),
        (lambda m: m.score([ask(None, "hi")], [3]), "choices of record 1"),
        (lambda m: m.score([ask(None, "hi")], ["yes"], with_end="no"), "with_end is 'no'"),
        (lambda m: m.generate([ask(None, "hi")], do_sample=True), "unknown option 'do_sample'"),
        (lambda m: m.generate([ask(None, "hi")], progress=3), "progress is 3"),
        (lambda m: m.chat(None, "hi", system=3), "system is a int"),
    ],
)
def test_an_argument_of_another_type_is_one_clear_error(model: Model, call: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        call(model)


def test_nothing_that_stops_is_nothing(model: Model) -> None:
    assert model.chat(None, "hi", max_new_tokens=4, stop=None) == model.chat(None, "hi", max_new_tokens=4)


def test_the_list_of_end_tokens_and_the_sampling_are_the_models_own() -> None:
    model = build(vision=False)
    record = question("Hello")
    plain = model.generate([record], max_new_tokens=20)[0]
    ids = encode(record.turns, CHAT, TOKENIZER, generate=True).ids
    first = int(model.vlm.llm(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert plain and first not in model.end_ids
    llm: Any = model.vlm.llm
    llm.generation_config = GenerationConfig(eos_token_id=[first, 7], do_sample=True, temperature=0.7, min_p=0.1)
    again = Model(model.vlm, TOKENIZER, CHAT)
    assert set(again.end_ids) == {*model.end_ids, first, 7}
    assert again.generate([record], max_new_tokens=20, temperature=0.0) == [""]
    assert again.generation.sampling == Sampling(0.7, 1.0, 50)
    assert "temperature 0.7" in again.generation.told() and "min_p 0.1" in again.generation.told()
    llm.generation_config.eos_token_id = None
    drawn = {again.generate([record], max_new_tokens=20, seed=seed)[0] for seed in range(4)}
    assert len(drawn) > 1  # sampled where nothing is said
    assert again.generate([record], max_new_tokens=20, temperature=0.0) == [plain]


def test_layers_that_ask_for_token_ids_are_told_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by their embeddings, ids would be missed where an adapter computes these anew with each batch."""
    config = family("gemma4_text") | {"hidden_size": 16, "vocab_size": len(TOKENIZER)}
    model = build(config=config | {"vocab_size_per_layer_input": len(TOKENIZER), "initializer_range": 0.5})
    records = [ask(picture(n), f"what is {n}?") for n in range(2)]
    given: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0}
    found = model.generate(records, **given), model.score(records, ["a", "be"])
    told = []

    def look_up(llm: Any, embeddings: torch.Tensor) -> torch.Tensor:
        told.append(embeddings.shape)
        return torch.full(embeddings.shape[:2], -1)

    monkeypatch.setattr("mmit.models.calls.token_ids", look_up)
    assert (model.generate(records, **given), model.score(records, ["a", "be"])) == found and not told
    assert "".join(model.stream(picture(0), "what is 0?", **given)).strip() == found[0][0] and not told
    prompt = model.prompt_maker().question(records[1], 0)
    features = model._see(Pictures(model.vlm, model.preparation, [[prompt]]), [prompt])
    whole = model.prefill([prompt], features)[0].logits
    store = PrefixCache(1 << 20)
    for again in (False, True):
        *_, done = model.prefill_in_parts(prompt, features, store=store, most=BLOCK)
        assert (done[1] > 0) == again and not told
        torch.testing.assert_close(done[0].logits, whole, atol=1e-4, rtol=0)
