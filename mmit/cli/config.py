"""`mmit config`: the keys of a run's config, or a config resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmit.text import echo, terminal


def config(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="With --resolve: values put on top.")
    ] = None,
    resolve: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Print this config with its base, the overrides and every default written out."
        ),
    ] = None,
) -> None:
    """List every config key with its type, default and meaning, or resolve a config."""
    from mmit.config import load_config

    if resolve is not None:
        echo(load_config(resolve, overrides or []).to_yaml(), end="", exact=True)
    elif overrides:
        raise typer.BadParameter(
            "overrides need a config: mmit config --resolve FILE key=value", param_hint="--resolve"
        )
    else:
        _list_keys()


def _list_keys() -> None:
    from rich.table import Table
    from rich.text import Text

    from mmit.config import describe

    table = Table("key", "type", "default", "meaning", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for entry in describe():
        table.add_row(Text(entry.key, "bold"), Text(entry.type), Text(entry.default), Text(entry.help))
    # A pipe has no width: lines are then as long as they need to be, so that grep finds whole ones.
    terminal(width=None if terminal().is_terminal else 400).print(table)
