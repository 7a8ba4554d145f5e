"""What the commands that look at data take: a data file or the sources of a config, and how to tokenise its records.

A data file takes its tokenizer and chat format from options or from --config; a config names everything itself.
What is given on the command line goes before the config. Never loads a language model's weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.errors import ConfigError, RecordError, located
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.config import Config, DataConfig, ModelConfig, SourceConfig
    from mmit.data.chat import ChatFormat
    from mmit.data.chat_writer import Encoded
    from mmit.data.loss import Loss
    from mmit.data.preference import Compares
    from mmit.data.preparation import ImagePreparation
    from mmit.records import Record

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Take tokenizer, chat format and image tokens from here."),
]
FormatOption = Annotated[str | None, typer.Option(metavar="NAME", help="Format of the file. [default: found out]")]
ImageRootOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where relative image paths start. [default: the file's folder]")
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An option of the format; a wrong KEY lists them. May be repeated."),
]
TokenizerOption = Annotated[str | None, typer.Option(metavar="NAME", help="Hub id, folder or .gguf file.")]
ChatOption = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="hf, plain, vicuna_v1, chatml or a .jinja file. [default: hf]")
]
ImageTokenOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What stands for one image in a chat template. [default: found out]")
]
ImageTokensOption = Annotated[int | None, typer.Option(min=1, metavar="M", help="Tokens per image.")]


@dataclass(frozen=True)
class File:
    """One file or folder to read; `loss` is the factor on its loss weights (data.loss.sources)."""

    path: Path
    format: str | None = None
    image_root: Path | None = None
    limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    loss: float = 1.0

    def rows(self, kept: Counter[str] | None = None) -> Iterator[Record | RecordError]:
        """Every row in order, bad ones as their errors; `kept` counts the keys that stay in the meta unread."""
        from mmit.data.rows import read_rows

        given: dict[str, Any] = {"image_root": self.image_root, "limit": self.limit, "options": self.options}
        return read_rows(self.path, self.format, kept=kept, **given)

    def weighed(self) -> Iterator[Record | RecordError]:
        """Every row, with the weight that the record has in training."""
        from mmit.records import Record

        for row in self.rows():
            weighs = isinstance(row, Record) and self.loss != 1
            yield replace(row, weight=row.weight * self.loss) if weighs else row  # type: ignore[type-var,union-attr]


def format_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Read what --option gives. Raises ConfigError for an option that is given twice."""
    from mmit.yamlio import parse_override

    found: dict[str, Any] = {}
    for text in given or ():
        keys, value = parse_override(text)
        name = ".".join(map(str, keys))
        if name in found:
            raise ConfigError(f"option '{name}' is given twice", where="--option", remedy="Leave one out.")
        found[name] = value
    return found


def is_config(path: Path) -> bool:
    """Say whether a path names the YAML of a run and not data."""
    return path.suffix in (".yaml", ".yml")


def settings_of(data: Path, config: Path | None, overrides: Sequence[str] = ()) -> Config | None:
    """Return the config that DATA is or that --config names, with the overrides on top.

    None without one, or where it is of data alone.
    """
    from mmit.config import load_config

    if is_config(data) and mixture_of(data) is None:
        if config is not None:
            raise typer.BadParameter("the data is a config already", param_hint="--config")
        config = data
    if config is None and overrides:
        problem = "overrides need the config of a run: give it as the data, or with --config"
        raise typer.BadParameter(problem, param_hint="KEY=VALUE")
    return None if config is None else load_config(config, overrides)


def mixture_of(data: Path) -> DataConfig | None:
    """Return the section of a YAML that holds data and no model, as `mmit build` writes without a base; else None."""
    from pydantic import ValidationError

    from mmit.config import DataConfig
    from mmit.sections import config_error
    from mmit.yamlio import parse_yaml

    try:
        raw, lines = parse_yaml(data.read_text("utf-8"), where=str(data))
    except (OSError, UnicodeDecodeError):
        return None  # load_config says what is wrong
    if not isinstance(raw, dict) or set(raw) != {"data"}:
        return None
    try:
        return DataConfig.model_validate(raw["data"])
    except ValidationError as error:
        origins = {keys[1:]: f"{data}:{line}" for keys, line in lines.items() if keys[:1] == ("data",)}
        raise config_error(error, DataConfig, raw["data"], where=str(data), origins=origins) from None


def files_of(
    data: Path, settings: Config | None, *, format: str | None = None, image_root: Path | None = None
) -> list[File]:
    """Return the file, its format found out (and said on stderr) if not given, or the config's training sources.

    Args:
        data: a data file, or a config or mixture.
        settings: the config, where there is one.
        format, image_root: of the file; a config says so itself.

    Raises:
        BadParameter: `format` or `image_root` beside a config.
    """
    mixture = mixture_of(data) if is_config(data) else None
    section = mixture or (settings.data if settings is not None and is_config(data) else None)
    if section is None:
        return [File(data, format or told_format(data), image_root)]
    for option, value in (("--format", format), ("--image-root", image_root)):
        if value is not None:
            raise typer.BadParameter("the config says so for each of its sources", param_hint=option)
    return config_files(section.train, section.loss.sources)


def told_format(path: Path) -> str:
    """Return the format that a file has, said on stderr with the reason. Raises ConfigError and RecordError."""
    from mmit.data.formats import detect_format
    from mmit.data.shards.reader import has_index
    from mmit.data.sources import split_subset

    file, _ = split_subset(path)
    if has_index(file):
        return "shards"
    if not Path(file).is_file():
        raise ConfigError("no such file", where=file, remedy="Check the path.")
    format, reason = detect_format(file)
    echo(f"format: {format} ({reason})", err=True)
    return format


def config_files(sources: Sequence[SourceConfig], loss: Mapping[str, float] | None = None) -> list[File]:
    """Return the files of a config's sources; `loss` are the factors of sources by name."""
    from mmit.data.sources import source_name

    return [
        File(
            Path(s.path),
            s.format,
            None if s.image_root is None else Path(s.image_root),
            s.limit,
            s.options,
            (loss or {}).get(s.name or source_name(s.path), 1.0),
        )
        for s in sources
    ]


@dataclass(frozen=True)
class RecordEncoder:
    """How records are tokenised; `image_tokens` is None where it is not known, or differs from picture to picture."""

    tokenizer: Any
    chat: Any
    image_tokens: int | None
    preparation: ImagePreparation | None
    max_length: int | None
    split_turns: bool = False
    sees: bool = True  # False for a model without a vision tower
    loss: Loss | None = None  # None: answers
    compares: Compares | None = None  # what the config's method learns from; None: what each record is

    def samples(self, record: Record) -> list[tuple[Record, Encoded]]:
        """Encode each training sample of a record; a record is one, but with data.split_turns each pair is."""
        from mmit.data.chat import encode
        from mmit.data.loss import Loss

        record.validate(for_training=True)
        if record.images and not self.sees:
            problem = "has images, but the model has no vision tower"
            raise RecordError(problem, where=record.where, remedy="Set model.vision.")
        parts = self.parts(record)
        return [(part, encode(part, self.chat, self.tokenizer, loss=self.loss or Loss())) for part in parts]

    def parts(self, record: Record) -> list[Record]:
        """The conversations of a record, of a pair the chosen and the rejected one."""
        return conversations_of(record, self.compares, split_turns=self.split_turns)

    def difference(self, record: Record) -> str:
        """Where the text of a record's samples differs from the chat template's; "" for nowhere."""
        from mmit.data.chat_check import difference

        return next((found for part in self.parts(record) if (found := difference(part, self.chat))), "")

    def length(self, record: Record) -> int:
        """Tokens of the longest sample of a record, image tokens included (one an image where not known)."""
        return max(len(encoded.ids) for _, encoded in self.samples(record)) + self.extra(record)

    def extra(self, record: Record) -> int:
        """Tokens that the pictures of a record take beyond one each. Raises ImageError where a header is needed."""
        if self.image_tokens is None and self.preparation is not None:
            return sum(self.preparation.spread(image, where=record.where).tokens - 1 for image in record.images)
        return len(record.images) * ((self.image_tokens or 1) - 1)

    @property
    def control_tokens(self) -> list[str]:
        """The tokens that a text should not hold."""
        from mmit.data.content import piece_tokenizer

        ids = sorted(piece_tokenizer(self.tokenizer).control_ids)
        return [token for token in self.tokenizer.convert_ids_to_tokens(ids) if token]


def encoder_of(
    settings: Config | None,
    *,
    tokenizer: str | None,
    chat: str | None,
    image_tokens: int | None,
    image_token: str | None = None,
    max_length: int | None = None,
) -> RecordEncoder | None:
    """Build the tokenizer and chat format that records are encoded with.

    Args:
        settings: the config, where there is one; the other arguments go before it.
        tokenizer: name or folder.
        chat: chat format.
        image_tokens: tokens of an image.
        image_token: the text that stands for one.
        max_length: tokens a record may have.

    Returns:
        the encoder; None if neither a config nor --tokenizer names a tokenizer.

    Raises:
        BadParameter: an option that needs a tokenizer, and there is none. MmitError: a part that cannot be loaded.
    """
    if settings is None and tokenizer is None:
        given = {"--chat": chat, "--image-token": image_token, "--image-tokens": image_tokens}
        for option, value in (given | {"--max-length": max_length}).items():
            if value is not None:
                raise typer.BadParameter("needs --tokenizer NAME or --config FILE", param_hint=option)
        return None
    tokens, form = tokenizer_and_chat(settings, tokenizer, chat, image_token=image_token)
    preparation = None
    if settings is not None:
        if image_tokens is None and settings.model.vision is not None:
            preparation = model_preparation(settings.model)
            image_tokens = None if preparation.tiled else preparation.tokens
        max_length = max_length or settings.data.max_length
    elif max_length is None and 0 < tokens.model_max_length < 10**9:  # without one, tokenizers state an enormous number
        max_length = tokens.model_max_length
    split = settings is not None and settings.data.split_turns
    sees = settings is None or settings.model.vision is not None
    return RecordEncoder(
        tokens, form, image_tokens, preparation, max_length, split, sees, loss_of(settings), compares_of(settings)
    )


def compares_of(settings: Config | None) -> Compares | None:
    """What the method of a config learns from; None without a config."""
    from mmit.data.preference import METHODS

    return None if settings is None else METHODS[settings.train.objective.kind]


def conversations_of(record: Record, compares: Compares | None, *, split_turns: bool) -> list[Record]:
    """The conversations that a run tokenises of a record. Raises RecordError, placed."""
    from mmit.data.dataset import split_pairs
    from mmit.data.preference import conversations, kind_of

    parts = conversations(record, kind_of(record) if compares is None else compares)
    return split_pairs(parts[0]) if split_turns and len(parts) == 1 else parts


def loss_of(settings: Config | None) -> Loss:
    """The loss weights of a config, answers alone without one; factors of sources are their files' (`File.loss`)."""
    from mmit.data.loss import Loss

    return Loss() if settings is None else Loss(**settings.data.loss.model_dump(exclude={"sources"}))


def tokenizer_and_chat(
    settings: Config | None, tokenizer: str | None, chat: str | None, *, image_token: str | None = None
) -> tuple[Any, ChatFormat]:
    """Load what is given on the command line, else what the config names; one of them names a tokenizer.

    Args:
        settings: the config, where there is one.
        tokenizer: name or folder.
        chat: chat format.
        image_token: the text that stands for an image.

    Returns:
        the tokenizer and the chat format.

    Raises:
        MmitError: one of them cannot be loaded.
    """
    from mmit.data.chat import chat_format
    from mmit.models.llm import load_tokenizer

    name, revision = tokenizer, None
    if name is None:
        assert settings is not None
        name, revision = settings.model.llm.name, settings.model.llm.revision
    with located("--tokenizer" if tokenizer else "model.llm"):
        tokens = load_tokenizer(name, revision=revision)
    with located("--chat" if chat else "model.chat.format"):
        section = {} if settings is None else settings.model.chat.model_dump()
        section |= {key: value for key, value in (("format", chat), ("image_token", image_token)) if value is not None}
        form = chat_format(section.pop("format", "hf"), tokens, **section)
    return tokens, form


def model_preparation(model: ModelConfig) -> ImagePreparation:
    """Find out what a picture becomes by building vision encoder and projector of a config without their weights."""
    import torch

    from mmit.data.preparation import ImagePreparation
    from mmit.models.assemble import assemble_vision, projector_for, without_weights
    from mmit.train.checkpoint.model import image_preparation

    assert model.vision is not None
    vision = assemble_vision(without_weights(model.vision.model_dump()), dtype=torch.float32)
    with located("model.projector"):
        # Any width: it does not change the count.
        projector = projector_for(vision, llm_dim=8, model=model.model_dump())
    with located("model.vision"):
        image = image_preparation(vision, model.vision)
        return ImagePreparation(**image, tokens=projector.tokens, grid=projector.grid_out)


def watched(rows: Iterator[Any], say: Callable[[str], None]) -> Iterator[Any]:
    """Pass rows on and say now and then how many there were."""
    number = 0
    for number, row in enumerate(rows, 1):
        if number % 500 == 0:
            say(f"{number:,} records")
        yield row
    say(f"{number:,} records, comparing")
