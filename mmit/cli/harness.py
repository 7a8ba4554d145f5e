"""`mmit harness`: mmit models in lmms-eval and lm-eval, and those harnesses' tasks on local data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmit.text import echo

app = typer.Typer(help="Run mmit's models in lmms-eval and lm-eval.", no_args_is_help=True, rich_markup_mode="markdown")


@app.command("overlay")
def overlay(
    tasks: Annotated[str, typer.Option(help="Tasks of the harness, by its names, with commas.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the harness's --include_path.")],
    *,
    data_root: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with one folder per benchmark, as for `mmit eval`.")
    ] = Path("data"),
    harness: Annotated[str, typer.Option("--for", help="lmms-eval or lm-eval.")] = "lmms-eval",
) -> None:
    """Let a harness's own tasks read local files.

    Writes a task NAME_local for every NAME: the harness's prompt and scoring, on the files that `mmit eval` reads.
    """
    from mmit.eval.harness.overlay import write_overlay

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    made = write_overlay(names, harness=harness, data_root=data_root, out=out)
    echo(f"{len(made)} tasks written to {out}. Run them with:")
    command = "lmms-eval eval" if harness == "lmms-eval" else "mmit harness lm-eval run"
    echo(
        f"{command} --model mmit --model_args pretrained=RUN --include_path {out} --tasks {','.join(made)} "
        "--batch_size 32 --output_path RESULTS"
    )


@app.command(
    "lm-eval", context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line, with the model `mmit` among its models.

    lm-eval has no entry points for models; everything after `lm-eval` goes to it as it stands.
    """
    from mmit.errors import ConfigError

    try:
        from mmit.eval.harness import lm
    except ImportError as error:
        remedy = "pip install 'mmit-tune[harness]'"
        raise ConfigError(f"cannot import {error.name}", where="lm-eval", remedy=remedy) from error
    lm.main(context.args)
