"""`mmit chat`: one answer, or a conversation in the terminal.

In: a run or checkpoint, pictures and words. Out: answers on stdout as they are made. What a model says cannot act on
the terminal; through a pipe it arrives untouched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.errors import show_error
from mmit.cli.loading import (
    AllowCode,
    Device,
    Dtype,
    ForeignBase,
    ForeignChat,
    In4Bit,
    In8Bit,
    RunArgument,
    TemplateArgs,
    load_told,
)
from mmit.cli.serve import chat_page, needs_extra, served_name
from mmit.cores import few_kernels
from mmit.errors import ConfigError, MmitError
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.records import Record

HELP = "/image PATH shows a picture with the next message, /reset begins anew, /quit leaves"

ImageOption = Annotated[
    list[Path] | None, typer.Option("--image", "-i", metavar="FILE", help="A picture; may be repeated.")
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", help="Answer this and end; without it, a conversation.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(min=0, help="0 takes the likeliest token. (default: as generation_config.json says, else 0)"),
]
TopPOption = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total probability.")]


def chat(
    run: RunArgument,
    image: ImageOption = None,
    prompt: PromptOption = None,
    *,
    system: Annotated[str | None, typer.Option(help="The system turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Draw from so many likeliest tokens; 0: from all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    load_in_8bit: In8Bit = False,
    load_in_4bit: In4Bit = False,
    chat_format: ForeignChat = None,
    base: ForeignBase = None,
    template_arg: TemplateArgs = None,
    web: Annotated[bool, typer.Option("--web", help="Talk on a page in the browser.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Talk with a trained model.

    Inside a conversation, /image PATH shows a picture with the next message, /reset begins anew, /quit leaves.
    """
    if web:
        needs_extra()
        if image or prompt is not None or system is not None:
            remedy = "Leave out --image, --prompt and --system: the page asks for them."
            raise ConfigError("--web is a page of its own", where="mmit chat", remedy=remedy)
        few_kernels()
    model = load_told(
        run,
        device=device,
        dtype=dtype,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        chat=chat_format,
        base=base,
        template_arg=template_arg,
        allow_code=allow_code,
    )
    if web:
        chat_page(model, served_name(run))
        return
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options |= {"top_p": top_p, "top_k": top_k, "seed": seed}
    if temperature is None and (told := model.generation.told()):
        echo(f"{told} (--temperature 0: the likeliest tokens)", err=True)
    talk = Conversation(model, system=system, options=options)
    for path in image or []:
        talk.show(str(path))
    if prompt is None:
        _converse(talk)
    else:
        talk.say(prompt)


class Conversation:
    """What has been said so far, and the pictures that go with the next message."""

    def __init__(self, model: Any, *, system: str | None, options: dict[str, Any]) -> None:
        self._model, self._system, self._options = model, system, options
        self._pictures: list[str] = []
        self._history: Record | None = None

    def show(self, path: str) -> None:
        """Keep a picture for the next message. Raises ImageError now rather than when it is asked about."""
        from mmit.data.images import load_rgb
        from mmit.records import Image

        load_rgb(Image(path))
        self._pictures.append(path)

    def reset(self) -> None:
        """Forget everything."""
        self._pictures, self._history = [], None

    def say(self, text: str) -> None:
        """Ask, and write the answer to stdout while it is made."""
        from mmit.generate import ask
        from mmit.records import Record, Text, Turn

        system = self._system if self._history is None else None
        question: dict[str, Any] = {"history": self._history, "system": system}
        answer = ""
        for piece in self._model.stream(self._pictures, text, **question, **self._options):
            _write(piece)
            answer += piece
        _write("\n")
        if not answer.strip():
            echo("(the answer is empty)", err=True)
            return
        asked = ask(self._pictures, text, **question)
        self._history = Record((*asked.turns, Turn("assistant", (Text(answer),))))
        self._pictures = []


def _write(text: str) -> None:

    echo(text, end="", exact=True)


def _converse(talk: Conversation) -> None:
    """Read messages until /quit or the end of input. A mistake is told and the conversation goes on."""
    import sys

    if sys.stdin.isatty():
        import readline  # noqa: F401  its import gives the prompt line editing and a history
    echo(HELP, err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        try:
            if word == "/reset":
                talk.reset()
            elif word == "/image" and rest:
                talk.show(rest.strip())
            elif word.startswith("/") and word[1:].isalpha():
                echo(f"not understood: {line}; {HELP}", err=True)
            elif line:
                talk.say(line)
        except MmitError as error:
            show_error(error)
        except KeyboardInterrupt:  # ends this answer, not the conversation
            echo("")
