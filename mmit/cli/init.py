"""`mmit init`: four answers become the commented config of a run on one's own data.

In: a data file, an LLM, a vision encoder, where to write; by options, or asked for at a terminal. Out: a YAML that
`mmit train` takes. Loads no model. Guesses no library from an encoder's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mmit.errors import ConfigError, MmitError
from mmit.text import echo

KINDS = {"timm": "timm:NAME", "open_clip": "open_clip:ARCHITECTURE@TAG", "hf": "hf:HUB_ID_OR_FOLDER"}
DEFAULTS = {
    "llm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "encoder": "timm:vit_base_patch16_siglip_224",
    "out": "train.yaml",
}
Answer = TypeVar("Answer")

CONFIG = """\
# Instruction tuning on {data}, written by `mmit init`. `mmit config` explains every key.
# Look at the records:    mmit inspect {data} --config {out}
# Forecast the run:       mmit train --dry-run --config {out}
# Train, also further:    mmit train --config {out} resume=auto
run:
  dir: {run_dir}        # checkpoints, metrics and reports
  seed: 0
model:
  vision:
    kind: {kind}
    name: {name}
    weights: {weights}
    fit: pad            # how a picture of another shape fits the encoder: pad, crop, resize; any_resolution tiles it
    cache: disk         # features of the frozen encoder are computed once
  projector:
    kind: mlp           # pixel_shuffle_mlp with options {{factor: 2}} gives a quarter of the image tokens
    options: {{depth: 2}}
  llm:
    name: {llm}
  chat:
    format: hf          # the tokenizer's own template; an LLM without one takes qa, chatml or vicuna_v1
tune:
  projector: {{mode: full, lr: 1.0e-3}}
  llm: {{mode: lora, lr: 2.0e-4, options: {{r: 16, alpha: 32}}}}   # mode full tunes all weights: try lr 2.0e-5
data:
  train:
    - path: {data}
      format: {format}
      # image_root: FOLDER    where relative paths of pictures start; else at the file's own folder
  # eval: [{{path: HELD_OUT, format: {format}}}]    records of which the loss is measured
  max_length: {length}      # tokens of a record with its picture; a longer one is an error
  pack_tokens: {length}     # tokens of a row, which holds several records
train:
  epochs: 1
  rows_per_step: 4      # rows before each update of the weights
  warmup: 0.05          # share of the steps in which the rates rise
  save_every: 200
"""


def init(
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Your data: any format of `mmit data import`.")
    ] = None,
    llm: Annotated[
        str | None, typer.Option(metavar="NAME", help="Hub id, folder or .gguf file of a causal LLM.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="KIND:NAME", help=f"Vision encoder: {', '.join(KINDS.values())}.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help=f"The config. (default: {DEFAULTS['out']})")
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the config.")] = False,
) -> None:
    """Write a config for your own data, LLM and encoder; what is not given is asked for.

    Without a terminal: mmit init --data DATA --llm NAME --encoder timm:NAME --out FILE
    """
    from mmit.io import write_atomic

    asks = sys.stdin.isatty()
    missing = [f"--{name}" for name, value in (("data", data), ("llm", llm), ("encoder", encoder)) if value is None]
    if missing and not asks:
        remedy = "give --data PATH --llm NAME --encoder KIND:NAME (and --out FILE), or start it at a terminal"
        problem = f"there is no terminal to ask at, and {', '.join(missing)} {_is(missing)} not given"
        raise ConfigError(problem, where="mmit init", remedy=remedy)
    (path, format), name = _answer("your data", data, _data), _answer("the LLM", llm, _llm, DEFAULTS["llm"])
    vision = _answer(f"the vision encoder ({', '.join(KINDS.values())})", encoder, _encoder, DEFAULTS["encoder"])
    given = None if out is None else str(out)
    given = given if given or asks else DEFAULTS["out"]
    file = _answer("the config is written to", given, lambda text: _out(text, force=force), DEFAULTS["out"])
    write_atomic(file, config_text(path, format, llm=name, vision=vision, out=file))
    echo(f"written to {file}; next: mmit train --dry-run --config {file}")


def config_text(data: str, format: str, *, llm: str, vision: dict[str, Any], out: Path) -> str:
    """The config as text, with a reason or a further choice beside its values.

    Args:
        data: the file of records. format: its format.
        llm: name or folder of the language model.
        vision: {key: value} of the vision encoder, the projector and how pictures are fitted.
        out: the config's file, whose name the run's folder gets.
    """
    from mmit.yamlio import inline_yaml

    told = {
        "data": data,
        "format": format,
        "llm": llm,
        "run_dir": f"runs/{out.stem}",
        "length": 2048,
        "out": str(out),
        **vision,
    }
    text = CONFIG.format(**{key: inline_yaml(value) for key, value in told.items()})
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _answer(question: str, given: str | None, check: Callable[[str], Answer], default: str | None = None) -> Answer:
    """What `check` makes of the given answer, or of one that is asked for until it is good."""
    from mmit.cli.errors import show_error

    if given is not None:
        return check(given)
    while True:
        hint = f" [{default}]" if default else ""
        try:
            return check(input(f"{question}{hint}: ").strip() or default or "")
        except EOFError:
            raise KeyboardInterrupt from None
        except MmitError as error:
            show_error(error)


def _data(text: str) -> tuple[str, str]:
    """The path and the format that its file has, which is said."""
    from mmit.cli.sources import told_format

    return text, told_format(Path(text))


def _llm(text: str) -> str:
    if not text:
        raise ConfigError("no name", where="--llm", remedy="give a hub id, a folder or a .gguf file")
    return text


def _encoder(text: str) -> dict[str, Any]:
    """The keys of model.vision. A hub id or a folder needs no kind: transformers is where these lead."""
    kind, _, name = text.partition(":")
    if kind not in KINDS or not name:
        if "/" not in text and not Path(text).is_dir():
            remedy = f"say whose it is: {', '.join(KINDS.values())}"
            raise ConfigError(f"'{text}' names no library", where="--encoder", remedy=remedy)
        kind, name = "hf", text
    if kind != "open_clip":
        return {"kind": kind, "name": name, "weights": True}
    architecture, _, tag = name.partition("@")
    if not tag and ":" not in name:  # hf-hub:... and local-dir:... bring their own
        problem, remedy = (
            f"'{name}' has many sets of weights",
            "give one of open_clip's tags: open_clip:ViT-B-16@openai",
        )
        raise ConfigError(problem, where="--encoder", remedy=remedy)
    return {"kind": kind, "name": architecture, "weights": tag or None}


def _out(text: str, *, force: bool) -> Path:
    """The path of a new file; that of an old one if it may be overwritten."""
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            "a config is a .yaml file", where=f"--out: {text}", remedy=f"give {path.stem or 'train'}.yaml"
        )
    if path.exists() and not force:
        remedy = "give another --out, or --force to overwrite it"
        raise ConfigError("exists already", where=f"--out: {text}", remedy=remedy)
    return path


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
