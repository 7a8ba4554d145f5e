"""The options with which a command loads a model: where it computes, in which numbers, what a folder leaves open.

Each is declared once, for every command that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.text import echo

if TYPE_CHECKING:
    from mmit.generate import Model

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's folder, one of its checkpoints, a llava-hf folder, or a hub id."),
]
OwnRunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None, typer.Option(help="bf16, fp16 or fp32. (default: as trained, or fp32 where that is faster)")
]
In8Bit = Annotated[bool, typer.Option("--load-8bit", help="The LLM in 8 bits, by bitsandbytes.")]
In4Bit = Annotated[bool, typer.Option("--load-4bit", help="The LLM in 4 bits, by bitsandbytes.")]
ForeignChat = Annotated[
    str | None, typer.Option("--chat", help="Chat format of a folder of another project, such as vicuna_v1.")
]
ForeignBase = Annotated[str | None, typer.Option(help="LLM of a LLaVA adapter or projector, or a Prismatic VLM.")]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="A variable of the chat template, such as enable_thinking=true."),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Import the modules that a checkpoint names for parts of its author's own."),
]


def load_told(run: str, *, template_arg: Sequence[str] | None, **options: Any) -> Model:
    """Load a model by these options, and tell what is to be known about it."""
    from mmit.generate import load

    model = load(run, template_args=template_args_of(template_arg), **options)
    for note in model.notes:
        echo(note, err=True)
    return model


def template_args_of(given: Sequence[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE options, the values as YAML: true and false are no texts. Raises BadParameter."""
    import yaml

    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"'{text}' is not NAME=VALUE", param_hint="--template-arg")
        found[name] = yaml.safe_load(value)
    return found
