"""Several adapters on one base: each answers as its checkpoint does alone, and the base is there once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import mmit
from mmit.cli.serve import further_of
from mmit.data.chat import chat_format
from mmit.errors import CheckpointError, ConfigError
from mmit.generate import Model
from mmit.models.assemble import assemble
from mmit.models.tuning import apply_tuning
from mmit.serve.adapters import with_adapters
from mmit.serve.engine import Ask, Engine, Piece
from mmit.train.checkpoint import folders
from mmit.train.checkpoint import model as checkpoint
from tests.test_generate import build
from tests.tiny_run import tiny_config

LORA = {"mode": "lora", "options": {"r": 4}}


def write(folder: Path, name: str, seed: int, llm: dict[str, Any] = LORA, **sections: Any) -> Path:
    """A checkpoint as a run leaves it, its trained tensors drawn from a seed."""
    tune = {"projector": {"mode": "full", "lr": 1e-2}, "llm": llm}
    config = tiny_config(folder, layers=2, tune=tune, **sections)
    vlm, tokenizer = assemble(config.model.model_dump(), dtype=torch.float32)
    apply_tuning(vlm, config.tune.model_dump())
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*vlm.parameters()]:
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))

    def fill(draft: Path) -> None:
        chat = chat_format("hf", tokenizer)
        checkpoint.write_model(draft, checkpoint.Loaded(vlm, tokenizer, chat, {}, folder, {}, config), step=1)

    folders.write_folder(folder / name, [fill])
    return folder / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("base", "a", "b")):
        write(folder, name, seed, {"mode": "lora", "options": {"r": 2 + seed}})
    write(folder, "plain", 5, {"mode": "frozen"})
    return folder


def asked(n: int) -> list[dict[str, Any]]:
    picture = PIL.Image.new("RGB", (20, 20), (40 * n, 20, 255 - 40 * n))
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What? " * n}]}]


@pytest.fixture
def served(home: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Model]]:
    base = mmit.load(home / getattr(request, "param", "base"), device="cpu")
    yield {"base": base} | with_adapters(base, {"a.1": home / "a", "b": home / "b"})


@pytest.mark.parametrize("served", ["base", "plain"], indirect=True)
def test_each_answers_as_its_checkpoint_alone(served: dict[str, Model]) -> None:
    alone = {name: mmit.load(model.folder, device="cpu") for name, model in served.items() if model.folder}
    expected = {
        (name, n): model.chat(messages=asked(n), max_new_tokens=8) for name, model in alone.items() for n in range(1, 3)
    }
    assert len(set(expected.values())) > 4
    assert {(name, n): served[name].chat(messages=asked(n), max_new_tokens=8) for name, n in expected} == expected
    engine = Engine(served, max_running=4)
    running = {(name, n): engine.submit(Ask(name, asked(n), max_tokens=8)) for n in range(1, 3) for name in served}
    found = {
        key: "".join(event.text for event in answering.events() if isinstance(event, Piece))
        for key, answering in running.items()
    }
    engine.close(0)
    assert found == expected


def test_the_base_is_there_once(served: dict[str, Model]) -> None:
    words = {id(model.vlm.word_embeddings) for model in served.values()}
    assert len(words) == len({id(model.vlm.vision) for model in served.values()}) == 1
    assert len({id(model.vlm.projector) for model in served.values()}) == 3
    assert not any(parameter.requires_grad for parameter in served["b"].vlm.parameters())


@pytest.mark.parametrize(
    ("llm", "told"),
    [
        ({"mode": "bitfit", "options": {"insert_biases": True}}, "more was trained than an adapter"),
        ({"mode": "frozen"}, "holds no adapter of the LLM"),
        ({"mode": "ia3"}, "its adapter is IA3, and the base has one of LORA"),
        ({"mode": "lora", "options": {"bias": "all"}}, "changes weights of the base"),
        ({"mode": "lora", "options": {"init": "pissa"}}, "changes weights of the base"),
    ],
)
def test_what_cannot_be_exchanged_between_steps_is_refused(llm: dict[str, Any], told: str, home: Path) -> None:
    base = mmit.load(home / "base", device="cpu")
    with pytest.raises(CheckpointError, match=told):
        with_adapters(base, {"other": write(home, "other", 3, llm)})


def test_another_base_is_refused(home: Path, tmp_path: Path) -> None:
    base = mmit.load(home / "base", device="cpu")
    other = write(tmp_path, "other", 3)
    with pytest.raises(CheckpointError, match=r"model.llm.name is .*, that of the base"):
        with_adapters(base, {"other": other})
    with pytest.raises(ConfigError, match="a checkpoint of mmit"):
        with_adapters(build(), {"a": home / "a"})


def test_names_of_adapters_are_read_from_the_command_line() -> None:
    assert further_of(["a=runs/a,b.1 = runs/b", "c=d=e"], taken="base") == {"a": "runs/a", "b.1": "runs/b", "c": "d=e"}
    for given, told in ((["a"], "'a' is not NAME=DIR"), (["=x"], "not NAME=DIR"), (["a=1,a=2"], "two models are")):
        with pytest.raises(ConfigError, match=told):
            further_of(given, taken="base")
    with pytest.raises(ConfigError, match="two models are called 'base'"):
        further_of(["base=x"], taken="base")
