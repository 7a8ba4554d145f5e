"""The parts of a run, built from its config one after the other: model, features, engine; records in records.py.

`run.py` calls them in order. Config sections are taken apart here, and what is called takes plain arguments. Each part
refuses what cannot be trained; only the last, `take_folder`, writes into the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmit.data.preparation import ImagePreparation, prepare_images
from mmit.errors import ConfigError, located
from mmit.io import write_atomic
from mmit.models.assemble import assemble
from mmit.models.hub import model_folder
from mmit.models.llm import DTYPES
from mmit.models.llm_layers import MODES, compile_layers, set_recompute
from mmit.models.partition import partitioned
from mmit.models.routers import read_routers
from mmit.models.tuning import Group, apply_tuning, method_of, quantization
from mmit.models.tuning.merge import why_not_merged
from mmit.models.tuning.own import changes_layout
from mmit.train.align import Alignment, align_to_captions, check_captions
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint import resume
from mmit.train.checks import identity
from mmit.train.checks.init_from import check_start
from mmit.train.checks.probes import answers, check_records, check_start_of_adapter, without_gradient
from mmit.train.data.setup import Say, chat_of
from mmit.train.engines.base import Update
from mmit.train.engines.deepspeed_engine import DeepSpeedEngine, check_deepspeed
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.engines.zero import complete, deepspeed_options, zero_stage
from mmit.train.features import CachePlan, FeatureCache, compute_features, features_folder
from mmit.train.memory.estimate import least_recompute
from mmit.train.monitor.describe import describe, introduce, note_start
from mmit.train.records import Feeds, Records, is_cached
from mmit.train.resolve import check_divided, resolved, with_whole_paths

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.models.vlm import VLM
    from mmit.train.engines.base import Engine
    from mmit.train.engines.world import World
    from mmit.train.loop import Progress
    from mmit.train.monitor.heartbeat import Heartbeat


@dataclass(frozen=True)
class Start:
    """What every part of a run is built from."""

    config: Config  # once the model is built, `Model.config` says more: what it decided
    begin: Path | None  # the checkpoint that the run continues
    world: World
    say: Say
    heart: Heartbeat

    @property
    def run_dir(self) -> Path:
        """Of this run."""
        return Path(self.config.run.dir)


@dataclass
class Model:
    """The composite, tuned as the config says, and what later parts ask about it."""

    loaded: checkpoint.Loaded  # with the config as the model resolved it
    groups: list[Group]  # of trained parameters
    preparation: ImagePreparation | None  # of images; None for a model of text
    tower: str | None  # identifies the vision encoder as it came
    divided: dict[str, Any] | None  # DeepSpeed's config where ranks divide the LLM (ZeRO-3), else None

    @property
    def config(self) -> Config:
        """The config as the model resolved it."""
        return self.loaded.config

    @property
    def vlm(self) -> VLM:
        """The composite itself."""
        return self.loaded.vlm


def build_model(start: Start) -> Model:
    """Vision encoder, projector and LLM with their tuning methods, and the weights of a checkpoint."""
    config, begin, say = start.config, start.begin, start.say
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    config = with_whole_paths(config)
    if config.align is not None and begin is None:
        check_captions(config.align.captions)
    start.heart.phase("building the model", 0)
    weights = _weights_from(config, begin, say=say)
    divided = _partition(config) if start.world.deepspeed else None
    loaded, preparation, tower = _untuned(config, weights, start, divided=divided)
    with partitioned(divided):
        # Before the weights of a checkpoint: they belong to modules that the methods add.
        groups = _tune(loaded.vlm, loaded.config, probe=divided is None and weights is None, say=say)
        if config.train.router_loss is not None:
            loaded.vlm.routers = read_routers(loaded.vlm.llm, config.train.router_loss)
        if weights is not None:
            checkpoint.read_weights(loaded.vlm, weights)
    return Model(loaded, groups, preparation, tower, divided)


def prepare_model(start: Start, model: Model, records: Records) -> FeatureCache | None:
    """Try the model on records, compute features that are cached, align the projector, say what is trained."""
    start.heart.phase("preparing the model", 0)
    vlm, config = model.vlm, model.config
    vlm.to(start.world.device)
    if model.divided is None:
        # `resolved` has seen the base keep records apart.
        _try_forward(vlm, records, apart=method_of(config.tune.llm.mode).by_token)
    features = _features(start, model, records)
    if config.align is not None and start.begin is None:
        _align(start, model, features)
    if start.world.main:
        rates = {c: getattr(config.tune, c).lr for c in ("vision", "projector", "llm")}
        introduce(model.loaded, records.train, records.scan, row_order=records.row_order, lr=rates, say=start.say)
    return features


def build_engine(start: Start, model: Model, records: Records) -> Engine:
    """What carries out a step: plain torch, or DeepSpeed over ranks."""
    start.heart.phase("preparing the engine", 0)
    config, vlm, world = model.config, model.vlm, start.world
    engine = _engine(config, vlm, model.groups, world=world, recompute=_recompute(config, world, start.say))
    if model.divided is not None:  # only the engine brings its weights
        _try_forward(vlm, records, apart=False)
    if config.train.compile:
        _compile(vlm, engine)
    return engine


def take_folder(start: Start, model: Model, records: Records, *, feeds: Feeds, progress: Progress) -> None:
    """Make the folder this run's: newer checkpoints set aside, what is trained written down. Rank 0 does it alone.

    Args:
        progress: where the run begins, and the best checkpoint so far, which is forgotten where its folder is gone.
    """
    # Last, when nothing can refuse the run any more: until here the folder is as it was found.
    if start.world.main:
        run_dir, say, keep = start.run_dir, start.say, model.config.train.keep_best
        resume.set_aside_later(run_dir, progress.step, say=say)
        resume.match_best(run_dir, progress, metric=keep.metric if keep else None, say=say)
        told = describe(
            model.vlm, records.train, records.scan, row_order=records.row_order, held_out=feeds.eval, world=start.world
        )
        note_start(run_dir, told, step=progress.step)
        write_atomic(run_dir / "config.yaml", model.config.to_yaml())
    model.vlm.train()


def _weights_from(config: Config, begin: Path | None, *, say: Say) -> Path | None:
    """The checkpoint that weights come from: `begin`, or that of run.init_from; its config fits this one."""
    # A run that goes on ignores run.init_from: its weights have moved on since.
    if begin is not None:
        identity.check_config(checkpoint.read_config(begin).flat(), config.flat(), folder=begin, say=say)
        return begin
    if not config.run.init_from:
        return None
    start = checkpoint.find(model_folder(config.run.init_from), warn=say)
    check_start(start, then=checkpoint.read_config(start).model_dump(), now=config.model_dump(), say=say)
    return start


def _untuned(
    config: Config, weights: Path | None, start: Start, *, divided: dict[str, Any] | None
) -> tuple[checkpoint.Loaded, ImagePreparation | None, str | None]:
    """The composite without its tuning, how images are prepared for it, and what identifies its vision encoder."""
    world = start.world
    vlm, tokenizer = _assemble(config, weights, divided)
    if world.deepspeed and zero_stage(deepspeed_options(config.engine.deepspeed)) == 3:
        check_divided(vlm)
    tower = identity.tower_content(vlm.vision) if world.main else None  # before a checkpoint's weights go in
    vlm.to(world.device)
    config = resolved(config, vlm, tokenizer, measure=divided is None, say=start.say)
    chat = chat_of(config.model.chat.model_dump(), tokenizer, date=checkpoint.chat_date(start.begin))
    with located("model.vision"):
        image = checkpoint.image_preparation(vlm.vision, config.model.vision)
        preparation = prepare_images(image, tokens=vlm.image_tokens, grid=vlm.image_grid)
    return checkpoint.Loaded(vlm, tokenizer, chat, image, start.run_dir, {}, config), preparation, tower


def _features(start: Start, model: Model, records: Records) -> FeatureCache | None:
    """Features of all images of the run where a frozen encoder's are cached."""
    vision, tower, scan = model.config.model.vision, model.vlm.vision, records.scan
    if vision is None or tower is None or model.preparation is None:
        return None
    if not is_cached(model.config) or not len(scan.illustrated):
        return None
    if tower.trainable:
        raise ConfigError(
            "features of a tower that is trained cannot be cached",
            where="model.vision.cache",
            remedy="set model.vision.cache=off or tune.vision.mode=frozen",
        )
    start.say(f"computing features of {scan.pictures} pictures once")
    plan = CachePlan(scan.crops, kind=vision.cache, folder=features_folder(vision, start.run_dir))
    images, begin = records.train.pictures(scan.illustrated), partial(start.heart.phase, step=0)
    return compute_features(tower, images, model.preparation, plan, world=start.world, begin=begin)


def _align(start: Start, model: Model, features: FeatureCache | None) -> None:
    """Word alignment of the projector before the first step."""
    align = model.config.align
    assert align is not None, "only a config with the section align comes here"
    plan = Alignment(**align.model_dump(), seed=model.config.run.seed)
    heart = start.heart
    where: dict[str, Any] = {"features": features, "world": start.world, "begin": partial(heart.phase, step=0)}
    with partitioned(model.divided):
        start.say(align_to_captions(model.loaded, model.preparation, plan, **where, work=heart.work))
    heart.phase("preparing the model", 0)


def _tune(vlm: VLM, config: Config, *, probe: bool, say: Say) -> list[Group]:
    """Apply the tuning methods; with `probe` see that an adapter starts where the base is, and reaches the loss."""
    tune = config.tune.model_dump()
    adapter = (
        probe and method_of(tune["llm"]["mode"]).starts_at_base and tune["llm"]["options"].get("init") is not False
    )
    # Two forwards for a promise that is easily broken: an adapter whose layers are not all called, or that a model
    # reads around, changes the base before anything is trained, or is never trained itself.
    before = answers(vlm) if adapter else None
    groups = apply_tuning(vlm, tune, say=say)
    _check_exports(vlm, config)
    if before is not None:
        vlm.to(before.device)
        check_start_of_adapter(vlm, before)
        if idle := without_gradient(vlm):
            names = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
            say(f"warning: {len(idle)} tensors of the adapter have no gradient, so they are not trained: {names}")
    return groups


def _check_exports(vlm: VLM, config: Config) -> None:
    """Refuse a listed export that the tuned model cannot be merged for, now and not when it has been trained."""
    plain = next((format for format in config.export if format in ("llava-hf", "llava", "gguf")), None)
    if plain is None:
        return
    if (added := changes_layout(vlm.llm)) is not None:
        problem = f"{config.tune.llm.mode} adds '{added}', for which {plain} has no place"
        raise ConfigError(problem, where="export", remedy="list mmit in its place")
    if reasons := why_not_merged(vlm.llm):
        problem = f"{plain} has plain weights only: {reasons[0]}"
        raise ConfigError(problem, where="export", remedy="list mmit or peft in its place, or name other targets")


def _try_forward(vlm: VLM, records: Records, *, apart: bool) -> None:
    """Forwards that find out about the model; in the first step they would be out of the order ZeRO-3 records.

    Args:
        apart: records are known not to meet in a packed row.
    """
    if not (vlm.padded or apart):
        vlm.check_isolation()
    check_records(vlm, records.train, records.scan)
    vlm.split()


def _partition(config: Config) -> dict[str, Any] | None:
    """Under ZeRO-3 the DeepSpeed config by which ranks divide the LLM while loading it; None where each loads all."""
    t = config.train
    # `trained` is not known before there is a model; what it decides, the size of a bucket, is filled in by the engine.
    options = complete(deepspeed_options(config.engine.deepspeed), precision=t.precision, clip=t.clip)
    check_deepspeed(options)
    divided = zero_stage(options) == 3
    for name, tuned in (("vision", config.tune.vision), ("llm", config.tune.llm)):
        if divided and tuned.options.get("dora"):
            raise ConfigError(
                "DoRA reads weights past the calls for which ZeRO-3 brings them together",
                where=f"tune.{name}.options.dora",
                remedy="set engine.deepspeed=zero2, or dora: false",
            )
    if divided and method_of(config.tune.llm.mode).four_bit:
        raise ConfigError(
            "weights of 4 bits are not divided among ranks",
            where="tune.llm.mode",
            remedy="set engine.deepspeed=zero2, under which each rank holds them whole",
        )
    # Dividing while loading works in the run's own number format alone (`load_llm`); an LLM of another one is loaded
    # whole, and divided when the engine is made.
    return options if divided and config.model.llm.dtype in (None, config.train.precision) else None


def _assemble(config: Config, start: Path | None, divided: dict[str, Any] | None) -> tuple[VLM, Any]:
    """The composite and its tokenizer; a fully tuned LLM comes from the checkpoint `start`."""
    dtype = torch.float32 if config.train.precision == "fp32" else DTYPES[config.train.precision]
    model = config.model.model_dump()
    tokenizer = None
    # A fully tuned LLM is in the checkpoint, and so is its tokenizer: neither is asked of the base again.
    named = Path(model["llm"]["name"]).absolute()  # the config itself may point there, as a base like any other
    if start is not None and (start / "llm").exists() and named != (start / "llm").absolute():
        model["llm"].update(name=str(start / "llm"), revision=None, random_init=None)
        tokenizer = str(start / "tokenizer")
    vlm, tokens = assemble(
        model,
        dtype=dtype,
        seed=config.run.seed,
        packed=config.data.packing is not False,
        tokenizer=tokenizer,
        quantization=quantization(config.tune.llm.mode, config.tune.llm.options),
        partition=divided,
    )
    if tokenizer is not None:
        vlm.whole_parts.add("llm")
    return vlm, tokens


def _recompute(config: Config, world: World, say: Say) -> str:
    """The mode of activation checkpointing; `auto` asks a forecast."""
    if config.train.checkpointing != "auto":
        return config.train.checkpointing
    stage = zero_stage(deepspeed_options(config.engine.deepspeed)) if world.deepspeed else None
    mode, reason = least_recompute(config, ranks=world.size, stage=stage)
    mode = world.most(mode, MODES)  # ranks that differ would wait for each other
    say(f"train.checkpointing is {mode}: {reason}")
    return mode


def _compile(vlm: VLM, engine: Engine) -> None:
    if isinstance(engine, DeepSpeedEngine) and engine.stage == 3:
        problem = "compiled layers do not see that ZeRO-3 gathers their weights"
        raise ConfigError(problem, where="train.compile", remedy="set train.compile=false, or engine.deepspeed=zero2")
    compile_layers(vlm.llm, device=engine.device.type)


def _engine(config: Config, vlm: VLM, groups: list[Group], *, world: World, recompute: str) -> Engine:
    t = config.train
    update = Update(betas=t.betas, eps=t.eps, weight_decay=t.weight_decay, clip=t.clip)
    common: dict[str, Any] = {"device": world.device, "precision": t.precision, "update": update}
    set_recompute(vlm, recompute)
    if not world.deepspeed:
        return TorchEngine(vlm, groups, **common)
    # Kept whole on every rank: in a step a rank may have rows without images, and would not join in gathering it.
    frozen = ["vision"] if vlm.vision is not None and not vlm.vision.trainable else []
    options = deepspeed_options(config.engine.deepspeed)
    return DeepSpeedEngine(vlm, groups, config=options, replicated=frozen, **common)
