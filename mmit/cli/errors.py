"""How a mistake reaches the user: one message on stderr (place, problem, remedy) and an exit code.

2 for an MmitError, and for a full disk wherever it was met; 130 for Ctrl-C. MMIT_TRACEBACK=1 shows where in the code an
MmitError came from. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from mmit.errors import MmitError
from mmit.io import FULL, unwritable, write_atomic
from mmit.text import echo, plain, terminal

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
HAND_OVER = "MMIT_RANK_ERROR"  # set for a rank of `--devices`: the file that its error goes to, and not to stderr
WORDS = "mmit.words"  # in a context's meta: the words that mmit was given


class Commands(TyperGroup):
    """A group of commands that turns errors into messages, also where it is called from a test."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; `eval compare` was `compare` once, and still is with a notice."""
        if args[:2] == ["eval", "compare"]:
            echo("notice: `mmit eval compare` is now `mmit compare`", err=True)
            args = args[1:]
        ctx.meta[WORDS] = list(args)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MmitError as error:
            show_error(error)
            raise typer.Exit(getattr(error, "exit_code", EXIT_ERROR)) from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            show_error(unwritable(error.filename or "", error))
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


def show_error(error: MmitError) -> None:
    """Print an error on stderr, its remedy on lines of its own."""
    from rich.text import Text

    if os.environ.get("MMIT_TRACEBACK") == "1":
        echo("".join(traceback.format_exception(error)), err=True)
    if file := os.environ.get(HAND_OVER):
        told = {"time": time.time(), "code": getattr(error, "exit_code", EXIT_ERROR), "facts": error.facts}
        write_atomic(Path(file), json.dumps(told))
        return
    # Each rank of a launched run has its own stderr, and all end up in one terminal.
    label = f"error (rank {os.environ['RANK']}): " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "error: "
    problem = f"{error.where}: {error.problem}" if error.where else error.problem
    message = Text(label, style="bold red")
    message.append(plain(problem).replace("\n", "\n  "), style="not bold default")
    if error.remedy:
        message.append("\n  " + plain(error.remedy).replace("\n", "\n  "), style="not bold default")
    terminal(stderr=True, highlight=False).print(message, soft_wrap=True)
