"""What a run is made of: typed sections, read from a YAML file plus `key=value` overrides.

In: a YAML file (see `mmit.yamlio` for its scalars), an optional `base:` file under it (path relative to the
file), and overrides such as `train.steps=50` or `data.train.0.path=rows.jsonl`. Out: one frozen `Config`.
Every problem is a `ConfigError` naming the line or override, the dotted key, the value and what was expected.
Other relative paths in a config are left as they are: their users resolve them against the working directory.
This module fills in nothing from the environment and builds nothing; components take plain arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from mmit import kinds, sections
from mmit.errors import ConfigError, nearest
from mmit.kinds import OWN, listed
from mmit.sections import Entry, Section, brief
from mmit.yamlio import Keys, dump_yaml, flatten, inline_yaml, merge, parse_override, parse_yaml, set_key

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# YAML has lists only; strict validation would ask for a Python tuple.
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
Size = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
LORA_DEFAULTS = {"r": 16, "alpha": 32}


class RunConfig(Section):
    """Where a run lives and how it treats restarts and bad records."""

    dir: str
    """folder of the run: checkpoints, metrics, reports"""
    seed: NonNegativeInt = 0
    """decides data order, initial weights and dropout"""
    resume: str | None = None
    """auto continues the newest valid checkpoint in run.dir, a path continues that one, null starts anew"""
    init_from: str | None = None
    """checkpoint folder or hub id whose weights this run starts from, with a fresh optimizer (a second stage)"""
    on_bad_record: Literal["error", "skip"] = "error"
    """stop at the first unusable record, or leave it out, count it and list it"""
    max_bad_fraction: Fraction = 0.01
    """with on_bad_record=skip: a larger share of bad records stops the run"""
    stall_seconds: PositiveFloat | None = 300.0
    """a rank that stays in one phase for so long is reported with what it is doing; null keeps no heartbeats"""


class TowerConfig(Section):
    """One of several encoders whose features lie side by side."""

    kind: str
    """library the encoder comes from: open_clip, timm or hf"""
    name: str
    """model name in that library, hub id, or folder"""
    weights: str | bool | None = None
    """as model.vision.weights"""
    layer: int | list[int] | None = None
    """as model.vision.layer"""
    image_size: PositiveInt | Size | None = None
    """side or [height, width] in pixels; the grids of all towers must be equal"""
    key_order: bool = False
    """as model.vision.key_order"""


class VisionConfig(Section):
    """The vision encoder: which one, which layer of it, and how images are fitted to it."""

    kind: str = Field(description=f"where the encoder comes from: {listed(kinds.ENCODERS, OWN)}")
    name: str = ""
    """model name in that library, hub id, or folder; required unless kind is fused"""
    towers: list[TowerConfig] = []
    """of kind fused: the encoders, their features joined in this order"""
    weights: str | bool | None = None
    """file (path or package:name/inside), open_clip tag, true (as published), false (random), or null: what
    a hub id or folder brings, random for a bare architecture"""
    layer: int | list[int] | None = None
    """layer that is read: 1 follows the first block, -1 is the last, null -2 (-1 for Qwen's ViT and MoonViT); stages
    count from 0, null -1; a list of a transformer's layers joins their features"""
    select: Literal["patch", "cls_patch"] = "patch"
    """patch tokens only, or the class token before them"""
    image_size: PositiveInt | Size | None = None
    """side or [height, width] in pixels; null takes the encoder's own size"""
    fit: Literal["resize", "pad", "crop", "any_resolution", "dynamic", "native"] = "pad"
    """how a picture of another shape is brought to image_size: stretched, padded, centre-cropped, or cut into tiles
    of that size beside a small view of the whole (any_resolution: as LLaVA-1.6, dynamic: as InternVL 1.5); native:
    not at all, for encoders that take pictures at their own size (SigLIP 2 NaFlex, Qwen's ViT, MoonViT)"""
    tiles: dict[str, Any] = {}
    """options of fit any_resolution (pinpoints, thumbnail, unpad, line_ends) or dynamic (min_tiles, max_tiles,
    thumbnail)"""
    native: dict[str, Any] = {}
    """of fit native: min_pixels and max_pixels of a picture (Pixtral: max_edge) in place of the published ones, and for
    SigLIP 2 NaFlex merge, the side in patches of what a projector may join"""
    key_order: bool = False
    """timm: match the tensors of a weights file to the model by their order instead of by their names"""
    dtype: Literal["bf16", "fp32"] | None = None
    """number format of the tower; null follows train.precision when frozen, fp32 when trained"""
    cache: Literal["off", "memory", "disk"] = "off"
    """keep the features of a frozen tower instead of computing them in every epoch"""
    cache_dir: str | None = None
    """with cache disk: a folder for the features that several runs share; null: the run's own"""

    @model_validator(mode="after")
    def _named(self) -> VisionConfig:
        if self.kind != "fused" and not self.name:
            raise ValueError("give the name of the vision encoder (model.vision.name)")
        if self.kind == "fused" and self.name:
            raise ValueError("kind fused has no name of its own; name each encoder under towers")
        return self


class ProjectorConfig(Section):
    """The bridge from vision features to LLM embeddings."""

    kind: str = Field(default="mlp", description=listed(kinds.PROJECTORS, OWN))
    options: dict[str, Any] = {}
    """arguments of that projector (depth, factor, queries, ...), checked by the projector itself"""


class LlmConfig(Section):
    """The language model."""

    name: str
    """hub id, local folder, .gguf file, or package: spec of a causal language model"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """number format of frozen weights; null follows train.precision (trained parts keep fp32 masters)"""
    attention_dropout: Fraction | None = None
    """dropout of attention weights in training; null keeps what the model's own configuration says"""
    random_init: dict[str, Any] | None = None
    """model configuration to build with random weights instead of loading any (dry runs and tests)"""


class ChatConfig(Section):
    """How turns become text."""

    format: str = Field(default="hf", description=listed(kinds.CHAT_FORMATS, "the path of a .jinja file", OWN))
    template_args: dict[str, Any] = {}
    """variables of the template, such as enable_thinking, in training and afterwards"""
    image_token: str | None = None
    """the text that stands for one image in a template that takes image parts; null finds it out"""
    content_tokens: list[str] = []
    """control tokens that answers may hold as themselves, besides those that are not special and stand in the
    template (marks of thoughts, tool calls, boxes)"""
    thoughts: str | None = None
    """marks of a thought at the beginning of an answer's text, as <thinking>...</thinking>, besides <think> and those
    that the template itself writes"""


class ModelConfig(Section):
    """The parts of the model."""

    vision: VisionConfig | None = None
    """the vision encoder; null for a text-only model"""
    projector: ProjectorConfig = ProjectorConfig()
    """the projector; unused without a vision encoder"""
    llm: LlmConfig
    """the language model"""
    chat: ChatConfig = ChatConfig()
    """the chat format"""


class ComponentTune(Section):
    """How one component is trained. Keys left out take the component's own defaults."""

    mode: str = "frozen"
    """frozen, full, or a method such as lora"""
    lr: PositiveFloat | None = None
    """peak learning rate; required unless frozen"""
    options: dict[str, Any] = {}
    """arguments of the method, checked by the method itself"""

    @model_validator(mode="before")
    @classmethod
    def _no_lr_when_frozen(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("mode", cls.model_fields["mode"].default) != "frozen":
            return given
        # An lr beside a written `frozen` is a switch left for later; beside a mode left out it is a mistake.
        if "mode" not in given and given.get("lr") is not None:
            raise ValueError("has a learning rate but stays frozen; give a mode, e.g. full")
        return {"lr": None, **given}

    @model_validator(mode="after")
    def _lr_when_trained(self) -> ComponentTune:
        if self.mode != "frozen" and self.lr is None:
            raise ValueError(f"mode '{self.mode}' trains this component, but lr is null; give a learning rate")
        return self


class VisionTune(ComponentTune):
    """Training of the vision encoder."""

    mode: str = Field(default="frozen", description=listed(kinds.TUNING["vision"]))


class ProjectorTune(ComponentTune):
    """Training of the projector."""

    mode: str = Field(default="full", description=listed(kinds.TUNING["projector"]))
    lr: PositiveFloat | None = 1e-3
    """peak learning rate; null when frozen"""


class LlmTune(ComponentTune):
    """Training of the language model."""

    mode: str = Field(default="lora", description=listed(kinds.TUNING["llm"], OWN))
    lr: PositiveFloat | None = 2e-4
    """peak learning rate; null when frozen"""
    options: dict[str, Any] = {}
    """arguments of the method, checked by the method itself; lora takes r=16, alpha=32 where not given"""

    @model_validator(mode="before")
    @classmethod
    def _lora_defaults(cls, given: Any) -> Any:
        # By key, so that `tune.llm.options.r=64` does not lose alpha. Other methods get what is written.
        if isinstance(given, dict) and given.get("mode", "lora") == "lora":
            options = given.get("options", {})
            if isinstance(options, dict):
                return {**given, "options": {**LORA_DEFAULTS, **options}}
        return given


class TuneConfig(Section):
    """What is trained, per component."""

    vision: VisionTune = VisionTune()
    """the vision encoder"""
    projector: ProjectorTune = ProjectorTune()
    """the projector"""
    llm: LlmTune = LlmTune()
    """the language model"""


MODES: dict[Keys, str] = {("tune", name): field.default.mode for name, field in TuneConfig.model_fields.items()}


class SourceConfig(Section):
    """One file or folder of records."""

    path: str
    """file, folder or shards to read; PATH#N draws N of its records, the same in every run, and PATH#N@SEED others"""
    format: str = "mmit"
    """format of its rows, as `mmit data import` names them; shards for a folder of indexed tars; or
    my_pkg.my_mod:name of a function (row, *, image_root) -> Record"""
    image_root: str | None = None
    """folder that relative image paths start from; null takes the folder of path"""
    options: dict[str, Any] = {}
    """options of the format (column names, a second file, ...), as `mmit data import --option` takes them"""
    weight: PositiveFloat = 1.0
    """how often its records are drawn, relative to once per epoch"""
    limit: PositiveInt | None = None
    """use only the first so many records, null all"""
    name: str | None = None
    """name in reports, null derives it from path"""


class MixingConfig(Section):
    """How much of each source an epoch holds; each source's own weight multiplies it."""

    scheme: Literal["weights", "proportional", "sqrt", "temperature", "equal"] = "weights"
    """weights: the sources' weights alone; else a source of n units is drawn in proportion to n (after the cap),
    its square root, n ** (1 / temperature), or all alike"""
    cap: PositiveInt | None = None
    """larger sources count as this many units"""
    temperature: PositiveFloat = 2.0
    """of scheme temperature"""


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossConfig(Section):
    """Which tokens carry loss, and how much; a weight that a record states goes before that of a role."""

    roles: dict[Literal["system", "user", "assistant", "tool"], Weight] = {}
    """weight of what each role says; left out: 1 for the assistant, prompt_weight for the others"""
    prompt_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """weight of all text outside answers, the chat format's own included"""
    think: Weight = 1.0
    """factor on thoughts; 0 leaves them unlearnt"""
    tool_calls: Weight = 1.0
    """factor on the tool calls of an answer"""
    last_turn: bool = False
    """only answers after the last user turn carry loss"""
    sources: dict[str, Weight] = {}
    """factor on the weights of a source, by its name"""


class DataConfig(Section):
    """What is learned from, and how records fill rows."""

    train: list[SourceConfig] = Field(min_length=1)
    """sources to train on"""
    eval: list[SourceConfig] = []
    """held-out sources whose loss is measured while training (train.eval_every)"""
    mixing: MixingConfig = MixingConfig()
    """how the sources are mixed"""
    loss: LossConfig = LossConfig()
    """which tokens carry loss"""
    split_turns: bool = False
    """make each question-answer pair of a record its own record"""
    max_length: PositiveInt = 2048
    """longest record in tokens, image tokens included"""
    pack_tokens: PositiveInt = 2048
    """capacity of a row in tokens"""
    packing: Literal["auto"] | bool = "auto"
    """put several records, isolated from each other, into one row; auto: where the model keeps them apart exactly,
    else padded batches"""
    group: bool = True
    """without packing: records of a step that are alike in length, with pictures or not, share a micro-batch, which is
    padded (train.micro_rows > 1); which records a step holds does not change"""
    share_prefix: bool = True
    """let records with a common prefix (system prompt, image) share it in a row"""
    shuffle: Literal["auto", "global", "block"] = "auto"
    """global: every order of all records is possible, 16 bytes of memory a record; block: blocks of neighbours lie
    anywhere, records are mixed within shuffle_window; auto: global up to 100,000,000 records in an epoch"""
    shuffle_window: PositiveInt = 1_048_576
    """records mixed together by shuffle=block, 256 blocks of neighbours"""
    workers: NonNegativeInt = 2
    """processes that read and decode"""
    prefetch_mb: PositiveInt = 256
    """MiB of prepared rows that may wait on each rank; one row for each worker may wait in any case"""
    cache_dir: str | None = None
    """folder for what was found out about the data (byte places, lengths, verdicts), so that the next start need not;
    null: the folder in the variable MMIT_CACHE, else ~/.cache/mmit/data; it may be deleted at any time"""


class AlignConfig(Section):
    """Word alignment of the projector before the first step; needs no forward pass of the LLM."""

    captions: str
    """mmit JSONL of captions: one image and one answer a record"""
    epochs: PositiveInt = 10
    """passes over the captions"""
    lr: PositiveFloat = 2e-3
    """peak learning rate"""


class BestConfig(Section):
    """Which checkpoint is the best."""

    metric: str = "eval_loss"
    """eval_loss, or a number that the evaluation callable returns"""
    better: Literal["lower", "higher"] | None = None
    """which values are better; null: lower, for eval_loss only"""

    @model_validator(mode="after")
    def _direction(self) -> BestConfig:
        if self.better is None and not self.metric.startswith("eval_loss"):
            raise ValueError(f"say which values of {self.metric} are better: better: higher, or better: lower")
        return self


class ObjectiveConfig(Section):
    """What is minimised."""

    kind: Literal["sft", "choices", "dpo", "orpo", "kto"] = "sft"
    """sft: the cross-entropy of the answers; choices: of each record the cross-entropy over the answers that its
    meta.choices names, as pattern-exploiting training has it; dpo, orpo: of pairs, chosen over rejected; kto: of
    answers with a label"""
    lm: Fraction = 1.0e-4
    """of choices: part of the mean loss on the question; 1 - lm is that of the cross-entropy"""
    temperature: PositiveFloat = 1.0
    """of choices: what scores are divided by before the softmax, as in distillation"""
    beta: PositiveFloat = 0.1
    """dpo, kto: how strongly the model is held to the one it began as; orpo: weight of the odds ratio"""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """of dpo: sigmoid as published, the hinge of SLiC, IPO's square, robust to flipped labels"""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """of dpo with loss robust: the share of pairs whose answers are in the wrong order"""
    sft_weight: NonNegativeFloat = 0.0
    """of dpo: weight of the mean cross-entropy of the chosen answers, added to the loss"""
    desirable_weight: PositiveFloat = 1.0
    """of kto: factor on the loss of good answers"""
    undesirable_weight: PositiveFloat = 1.0
    """of kto: factor on the loss of bad answers"""

    @model_validator(mode="after")
    def _of_the_method(self) -> ObjectiveConfig:
        for owners, names in (
            (("choices",), ("lm", "temperature")),
            (("dpo", "orpo", "kto"), ("beta",)),
            (("dpo",), ("loss", "label_smoothing", "sft_weight")),
            (("kto",), ("desirable_weight", "undesirable_weight")),
        ):
            for name in names:
                if self.kind not in owners and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to kind {' or '.join(owners)}, and the kind is {self.kind}")
        if (self.label_smoothing > 0) != (self.loss == "robust"):
            raise ValueError("label_smoothing and loss robust belong together; give both or neither")
        return self


class TrainConfig(Section):
    """The optimisation."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """what is minimised: the loss of answers, that over choices, or a preference between answers"""
    epochs: PositiveFloat | None = None
    """passes over the data; give this or steps"""
    steps: PositiveInt | None = None
    """optimizer steps; give this or epochs"""
    rows_per_step: PositiveInt = 8
    """packed rows per optimizer step, over all ranks"""
    micro_rows: PositiveInt = 1
    """rows per forward pass on each rank"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """course of the learning rate after warm-up"""
    warmup: NonNegativeFloat = 0.03
    """warm-up as a fraction of all steps if below 1, else in steps"""
    min_lr_ratio: Fraction = 0.0
    """final learning rate as a share of the peak"""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay"""
    betas: Betas = (0.9, 0.999)
    """AdamW betas"""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon"""
    clip: PositiveFloat | None = 1.0
    """largest gradient norm, null never clips"""
    router_loss: PositiveFloat | None = None
    """factor of the auxiliary loss that spreads tokens over experts, as transformers has it for the model, of each
    record alone and weighed as its supervised tokens are; null leaves it out, as transformers does by itself"""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """number format of the computation; auto takes bf16 where the device multiplies it at least as fast as fp32, else
    fp32, and a run that is continued keeps what it began with"""
    save_every: PositiveInt | None = None
    """steps between checkpoints; null saves at the end only"""
    keep_last: PositiveInt = 2
    """checkpoints kept"""
    keep_best: BestConfig | None = None
    """the checkpoint that is best by a metric is kept besides; null keeps none"""
    save_in_background: bool = False
    """write checkpoints while training goes on, from a copy in host memory; false: on the disk when a save returns"""
    eval_every: PositiveInt | None = None
    """steps between evaluations (data.eval, or a callable); null evaluates after the last step only"""
    eval_tasks: list[str] = []
    """tasks of `mmit eval` that are scored too, on the weights as they are; keep_best.metric can be the name of one"""
    eval_questions: PositiveInt = 500
    """questions asked of each of these tasks, the same ones every time"""
    log_every: PositiveInt = 1
    """steps between lines of metrics"""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "swanlab"]] = []
    """where metrics go besides metrics.jsonl"""
    spike_sigma: PositiveFloat | None = 6.0
    """a loss above mean + spike_sigma * standard deviation of the losses before is reported; null never"""
    spike_window: PositiveInt = 128
    """how many losses before it a loss is compared with"""
    checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    """recompute activations in the backward pass, slower with less memory: of every second decoder layer, of all, or
    (auto) the least of these that a forecast says fits the device"""
    compile: bool = False
    """torch.compile for norms and feed-forward of every layer; costs a start, rows need no constant length"""
    deterministic: bool = False
    """on CUDA the same bits from every run of this config, slower; a CPU gives them anyway"""
    threads: PositiveInt | None = None
    """CPU threads of each rank, null leaves torch's choice"""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"give exactly one of epochs and steps (epochs is {inline_yaml(self.epochs)}, steps is "
                f"{inline_yaml(self.steps)}); the other can be set to null"
            )
        return self


class EngineConfig(Section):
    """What carries out a step."""

    kind: Literal["torch", "deepspeed", "auto"] = "auto"
    """auto: deepspeed when started by its launcher, else plain torch on one device"""
    deepspeed: str = Field(default="zero2", description=listed(kinds.ZERO, "the path of a DeepSpeed JSON"))


class Config(Section):
    """A whole run."""

    run: RunConfig
    """folder, seed, restarts"""
    model: ModelConfig
    """what is built"""
    tune: TuneConfig = TuneConfig()
    """what is trained"""
    data: DataConfig
    """what is learned from"""
    align: AlignConfig | None = None
    """word alignment of the projector before training, null for none"""
    train: TrainConfig
    """the optimisation"""
    engine: EngineConfig = EngineConfig()
    """what carries out a step"""
    export: list[Literal["llava-hf", "gguf", "llava", "peft", "mmit"]] = []
    """formats that a finished `mmit train` writes to run.dir/export; one that cannot hold the model is refused first"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes CUDA where there is a device"""

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What reading the config left out, for the user to see."""
        return self._notes

    @classmethod
    def from_dict(cls, raw: Any, *, where: str = "", origins: Mapping[Keys, str] | None = None) -> Config:
        """Validate plain data. `where` and `origins` (line of each key) go into the ConfigError."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise sections.config_error(error, cls, raw, where=where, origins=origins) from None

    def to_yaml(self) -> str:
        """Return the resolved config, every default written out; loads back to an equal config."""
        return dump_yaml(self.model_dump())

    def flat(self) -> dict[str, Any]:
        """Return {dotted key: value} for logs; list entries by index, as overrides name them."""
        return dict(flatten(self.model_dump()))


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read `path`, put the `key=value` overrides on top in their order, and validate. Raises ConfigError."""
    notes: list[str] = []
    raw, origins = _read(Path(path), notes)
    below, above = raw, list[Keys]()
    for text in overrides:
        keys, value = parse_override(text)
        where = f"override '{text}'"
        raw = set_key(raw, keys, value, where=where)
        above.append(keys)
        # What the file said below this key is gone, so its lines may not be blamed.
        origins = {k: place for k, place in origins.items() if k[: len(keys)] != keys} | {keys: where}
    raw, gone = sections.without_old_options(raw, below, lambda key: any(key[: len(k)] == k for k in above), MODES)
    config = Config.from_dict(raw, where=str(path), origins=origins)
    config.notes.extend(notes + gone)
    return config


def _read(path: Path, notes: list[str], *, is_base: bool = False) -> tuple[dict[str, Any], dict[Keys, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        remedy = nearest(path.name, beside) if beside else f"{path.parent} holds no .yaml file"
        raise ConfigError("no such config file", where=str(path), remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None
    raw, lines = parse_yaml(text, where=str(path))
    if not isinstance(raw, dict):
        names = ", ".join(Config.model_fields)
        raise ConfigError(f"expected the sections {names}, got {brief(raw)}", where=str(path))
    origins = {keys: f"{path}:{line}" for keys, line in lines.items()}
    base = raw.pop("base", None)
    if base is None:
        return raw, origins
    if is_base or not isinstance(base, str):
        problem = "a base file cannot have a base itself" if is_base else "expected the path of a YAML file"
        raise ConfigError(f"base: {problem}, got {brief(base)}", where=origins["base",])
    below, below_origins = _read(path.parent / base, notes, is_base=True)
    merged, gone = sections.without_old_options(merge(below, raw), below, lambda key: key in origins, MODES)
    notes.extend(gone)
    return merged, below_origins | origins


def describe() -> list[Entry]:
    """Return (dotted key, type, default, help) of every key that can be set, in order."""
    return list(sections.describe(Config))
