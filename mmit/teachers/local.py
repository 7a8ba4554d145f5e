"""A teacher on this machine: an mmit run, a llava-hf folder, or any causal LLM with a chat template.

Requests are batched by how their tokens are drawn; each draws from its own seed, so a reply depends neither on the
batch nor on the order. The model is loaded with the first request.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit import precision
from mmit.data.chat import chat_format
from mmit.errors import ConfigError, TooLong
from mmit.generate import Model, load
from mmit.interop.foreign import is_foreign
from mmit.models.hub import model_folder
from mmit.models.llm import DTYPES, load_llm, load_tokenizer, usable_device
from mmit.models.vlm import VLM
from mmit.records import Record
from mmit.teachers.request import Reply, Request
from mmit.train.checkpoint.folders import newest

if TYPE_CHECKING:
    from mmit.data.prompts import Prompt

_END = 1 << 16


@dataclass
class Local:
    """A local model as a Teacher; `window` requests are taken at a time and batched by their draws."""

    path: str
    name: str = ""
    terms: str | None = None
    price: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 16
    window: int = 64
    device: str = "auto"
    model: Model | None = None

    def __post_init__(self) -> None:
        self.name = self.name or Path(self.path).name or "local"
        self.identity = f"local:{self.path}{_digest(Path(self.path))}"

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Yield replies batch by batch; a prompt that does not fit is answered by a cut reply.

        Raises MmitError: the model cannot be loaded.
        """
        # A window at a time, and not all: replies reach the journal while later ones are written.
        left = iter(requests)
        while taken := list(islice(left, self.window)):
            groups: dict[object, list[Request]] = {}
            for request in taken:
                groups.setdefault(replace(request.draw, seed=0), []).append(request)
            for group in groups.values():
                yield from self._answer(group)

    def _answer(self, group: list[Request]) -> Iterator[tuple[Request, Reply]]:
        if self.model is None:
            self.model = load_teacher(self.path, device=self.device)
        draw = group[0].draw
        if not draw.max_tokens:
            yield from self._likelihoods(group, self.model)
            return
        if draw.presence_penalty:
            remedy = "Leave it at 0, or ask an endpoint."
            raise ConfigError("a local teacher has no presence penalty", where="teacher.draw", remedy=remedy)
        maker = self.model.prompt_maker()
        fitting = []
        for number, request in enumerate(group):
            try:
                maker.question(Record(request.messages, id=request.digest), number)
            except TooLong:  # this one request gets no answer, as from an endpoint; the others do
                yield request, Reply("", self.name, "", "length", 0, 0)
            else:
                fitting.append(request)
        group = fitting
        if not group:
            return
        records = [Record(request.messages, id=request.digest) for request in group]
        began = time.monotonic()
        found = self.model.complete(
            records,
            seeds=[request.draw.seed for request in group],
            batch_size=self.batch_size,
            max_new_tokens=draw.max_tokens,
            temperature=draw.temperature,
            top_p=draw.top_p,
            stop=draw.stop,
        )
        for number, done in found:
            seconds = round((time.monotonic() - began) / len(group), 3)
            finish = "length" if done.cut else "stop"
            used = (done.prompt_tokens, done.new_tokens)
            yield group[number], Reply("", self.name, done.text, finish, *used, seconds)  # type: ignore[arg-type]

    def _likelihoods(self, group: list[Request], model: Model) -> Iterator[tuple[Request, Reply]]:
        """Yield how likely the last turns of requests are."""
        maker = model.prompt_maker()
        prompts: list[Prompt] = []
        asked: list[Request] = []
        for request in group:
            record = Record(request.messages, id=request.digest)
            try:
                prompt = maker.choices(record, len(prompts), answers=[request.messages[-1].text], with_end=True)
            except TooLong:
                yield request, Reply("", self.name, "", "length", 0, 0)
                continue
            prompts.append(prompt)
            asked.append(request)
        began = time.monotonic()
        found = model.likelihoods(prompts, batch_size=self.batch_size)
        for request, prompt, (likelihood,) in zip(asked, prompts, found, strict=True):
            text = {"loss": round(-likelihood.log_probability / likelihood.tokens, 6), "tokens": likelihood.tokens}
            seconds = round((time.monotonic() - began) / len(asked), 3)
            yield request, Reply("", self.name, json.dumps(text), "stop", prompt.length, 0, seconds)


def _digest(path: Path) -> str:
    """Return what tells a model from an earlier one at the same path, "" where there is no such path.

    It covers the names and sizes of the files and the ends of each: training changes weights everywhere.
    """
    if not path.exists():
        return ""
    folder = newest(path) or path if path.is_dir() else path
    found = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else [folder]:
        with open(file, "rb") as opened:
            found.update(f"{file.name}\0{file.stat().st_size}\0".encode() + opened.read(_END))
            opened.seek(max(0, file.stat().st_size - _END))
            found.update(opened.read())
    return f"#{found.hexdigest()[:16]}"


def load_teacher(path: str, *, device: str = "auto") -> Model:
    """Load whatever the folder holds: what `mmit.generate.load` reads, or a plain LLM. Raises MmitError."""
    folder = None if path.startswith("package:") or path.endswith(".gguf") else model_folder(path)
    plain = folder is None or ((folder / "config.json").is_file() and not is_foreign(folder))
    if not plain or (folder is not None and (folder / "mmit.json").is_file()):
        return load(path, device=device)
    tokenizer = load_tokenizer(path)
    place = usable_device(device)
    name, reason = precision.choose(place)
    llm: Any = load_llm(path, dtype=DTYPES[name])
    llm.to(place)
    notes = [f"loaded in {name}: {reason}"]
    return Model(VLM(llm, vision=None, projector=None), tokenizer, chat_format("hf", tokenizer), notes=notes)
