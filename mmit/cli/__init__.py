"""The command line: `mmit init | train | eval | chat | serve | data | build | inspect | export | env` and more.

Each command reads like a table of contents and lives in a module of its own; what it needs of torch and the rest
is imported when it runs, so that help is instant. A user's mistake ends with one message and exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mmit import __version__
from mmit.cli import (
    analyse,
    build,
    chat,
    config,
    data,
    env,
    evaluate,
    export,
    harness,
    init,
    inspect,
    pet,
    serve,
    train,
    watch,
)
from mmit.cli.errors import Commands
from mmit.cores import spin_briefly
from mmit.text import echo

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # paragraphs of a docstring flow
    # A traceback that reaches a person is a defect to report: it should be whole, and show no values of variables.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init.init)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.add_typer(data.app, name="data")
app.add_typer(build.app, name="build")
app.add_typer(analyse.app, name="analyse")
app.add_typer(pet.app, name="pet")
app.add_typer(harness.app, name="harness")
app.command("export")(export.export)
app.command("merge")(export.merge)
app.command("import-model")(export.import_model)
app.command("inspect")(inspect.inspect)
app.command("run-status")(watch.run_status)
app.command("report")(watch.report)
app.command("env")(env.env)
app.command("config")(config.config)


def _version(asked: bool) -> None:
    if asked:
        echo(f"mmit {__version__}")
        raise typer.Exit()


@app.callback()
def mmit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Multimodal instruction tuning: a vision encoder, a projector and any Hugging Face causal LLM."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` replace those of the process. Ends the process with its exit code."""
    spin_briefly()  # here, for mmit, python -m mmit and scripts/train.py: a library's import changes no environment
    if not sys.stderr.isatty():  # progress bars of the libraries below are noise in a log; mmit's own stay
        os.environ.setdefault("TQDM_DISABLE", "1")
    app(args=None if arguments is None else list(arguments), prog_name="mmit")
