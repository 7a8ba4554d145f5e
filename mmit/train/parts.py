"""The parts of a run from its config, ready for the first step: model, data, engine, the state of a checkpoint.

Takes config sections apart, as `run.py` does; what it calls takes plain arguments. Refuses what cannot be trained
before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmit.data.formats.keys import told
from mmit.data.preparation import ImagePreparation, prepare_images
from mmit.data.store import Store
from mmit.errors import ConfigError, RecordError, located
from mmit.io import write_atomic
from mmit.models.assemble import assemble
from mmit.models.compiled import compile_layers
from mmit.models.hub import model_folder
from mmit.models.llm import DTYPES, context_length
from mmit.models.partition import partitioned
from mmit.models.recompute import MODES, set_recompute
from mmit.models.routers import read_routers
from mmit.models.tuning import Group, apply_tuning, method_of, quantization
from mmit.models.tuning.own import changes_layout
from mmit.models.virtual import virtual_tokens
from mmit.train.align import Alignment, align_to_captions, check_captions
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint import resume
from mmit.train.checks import identity
from mmit.train.checks.init_from import check_start
from mmit.train.checks.probes import answers, check_records, check_start_of_adapter, without_gradient
from mmit.train.data.batches import TrainData
from mmit.train.data.order import make_walk, unit_costs, walk_of
from mmit.train.data.setup import (
    Say,
    cache_folder,
    chat_of,
    check_lengths,
    image_loader,
    judge,
    measure,
    most_bad,
    open_data,
)
from mmit.train.engines.deepspeed_engine import DeepSpeedEngine, check_deepspeed
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.engines.zero import complete, deepspeed_options, zero_stage
from mmit.train.features import FeatureCache, cache_features, features_folder
from mmit.train.memory.estimate import least_recompute
from mmit.train.monitor.describe import describe, note_start
from mmit.train.monitor.echo import echo
from mmit.train.reference import References
from mmit.train.settle import check_divided, choosing_of, objective_of, settled, with_whole_paths

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.dataset import InstructionData
    from mmit.data.measure import Scan
    from mmit.data.walk import Walk
    from mmit.models.vlm import VLM
    from mmit.train.engines.base import Engine
    from mmit.train.engines.world import World
    from mmit.train.loop import Progress
    from mmit.train.monitor.heartbeat import Heartbeat
    from mmit.train.objective import Preference

BAD_RECORDS = {"train": "bad_records.jsonl", "eval": "bad_records_eval.jsonl"}


@dataclass
class Parts:
    """What is ready before the first step."""

    model: checkpoint.Loaded  # with the config as the model settled it
    groups: list[Group]
    data: TrainData
    held_out: TrainData | None
    order: dict[str, Any]  # what decides the order of the data, kept in checkpoints
    engine: Engine
    progress: Progress
    preference: Preference | None = None  # of a run that compares answers, and that of its held-out data
    held_preference: Preference | None = None
    references: References | None = None  # kept in checkpoints


def build(config: Config, begin: Path | None, *, world: World, say: Say, heart: Heartbeat) -> Parts:
    """Model, data, engine, and the state of the checkpoint `begin`, in this order: each step can refuse the run."""
    run_dir = Path(config.run.dir)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    config = with_whole_paths(config)
    if config.align is not None and begin is None:
        check_captions(config.align.captions)
    heart.phase("building the model", 0)
    start = _start(config, begin, say=say)
    divided = _partition(config) if world.deepspeed else None
    model, preparation, tower = _model(config, start, begin, divided=divided, world=world, say=say)
    config, vlm = model.config, model.vlm
    method = objective_of(config)
    with partitioned(divided):
        groups = _tune(vlm, config, probe=divided is None and start is None, say=say)
        if config.train.router_loss is not None:
            vlm.routers = read_routers(vlm.llm, config.train.router_loss)
        if start is not None:
            checkpoint.read_weights(vlm, start)

    heart.phase("measuring the data", 0)
    read = partial(_read_data, model, preparation=preparation, world=world, say=say)
    data, scan = read("train")
    if scan.thoughts:
        model.chat.thinks = True  # in the checkpoint's format too: whether to think is left to the model
    walk, order = _order(model, data, scan, begin, tower=tower, world=world, say=say)
    feed: dict[str, Any] = {"load_image": image_loader(preparation) if preparation else None}
    held_out = _each_once(config, *read("eval"), world=world, **feed) if config.data.eval else None

    heart.phase("preparing the model", 0)
    vlm.to(world.device)
    if divided is None:
        # `settled` has seen the base keep records apart.
        _try_forward(vlm, data, scan, apart=method_of(config.tune.llm.mode).by_token)
    features = _features(model, data, scan, preparation, world=world, heart=heart, say=say)
    if config.align is not None and begin is None:
        _align(model, preparation, features, divided=divided, world=world, heart=heart, say=say)
    if world.main:
        rates = {c: getattr(config.tune, c).lr for c in ("vision", "projector", "llm")}
        echo(vlm, data, scan, walk=walk, tokenizer=model.tokenizer, lr=rates, say=say, chat=model.chat)

    heart.phase("preparing the engine", 0)
    engine = _engine(config, vlm, groups, world=world, recompute=_recompute(config, world, say))
    if divided is not None:  # only the engine brings its weights
        _try_forward(vlm, data, scan, apart=False)
    if config.train.compile:
        _compile(vlm, engine)
    progress = resume.restore(engine, begin, seed=config.run.seed, say=say)
    references = None
    if method.compares:
        heart.phase("measuring the reference", 0)
        each = _each_once(config, data, scan, world=world, features=features, **feed)
        references = References.of(method, engine, {"train": each, "eval": held_out}, vlm=vlm, begin=begin, say=say)
    if world.main:  # last, when nothing can refuse the run any more: the folder is still as it was found
        resume.set_aside_later(run_dir, progress.step, say=say)
        keep = config.train.keep_best
        resume.settle_best(run_dir, progress, metric=keep.metric if keep else None, say=say)
        note_start(run_dir, describe(vlm, data, scan, walk=walk, held_out=held_out, world=world), step=progress.step)
        write_atomic(run_dir / "config.yaml", config.to_yaml())
    vlm.train()
    return Parts(
        model=model,
        groups=groups,
        data=_train_data(config, data, scan, walk, world=world, features=features, **feed),
        held_out=held_out,
        order=order,
        engine=engine,
        progress=progress,
        preference=references.at_work("train") if references else None,
        held_preference=references.at_work("eval") if references and held_out else None,
        references=references,
    )


def _start(config: Config, begin: Path | None, *, say: Say) -> Path | None:
    """The checkpoint that weights come from: `begin`, or that of run.init_from; its config fits this one."""
    if begin is not None:
        identity.check_config(checkpoint.read_config(begin).flat(), config.flat(), folder=begin, say=say)
        return begin
    if not config.run.init_from:
        return None
    start = checkpoint.find(model_folder(config.run.init_from), warn=say)
    check_start(start, then=checkpoint.read_config(start).model_dump(), now=config.model_dump(), say=say)
    return start


def _model(
    config: Config,
    start: Path | None,
    begin: Path | None,
    *,
    divided: dict[str, Any] | None,
    world: World,
    say: Say,
) -> tuple[checkpoint.Loaded, ImagePreparation | None, str | None]:
    """The composite without its tuning, how images are prepared for it, and what identifies its vision encoder."""
    vlm, tokenizer = _assemble(config, start, divided)
    if world.deepspeed and zero_stage(deepspeed_options(config.engine.deepspeed)) == 3:
        check_divided(vlm)
    tower = identity.tower_content(vlm.vision) if world.main else None  # before a checkpoint's weights go in
    vlm.to(world.device)
    config = settled(config, vlm, tokenizer, measure=divided is None, say=say)
    chat = chat_of(config.model.chat.model_dump(), tokenizer, date=checkpoint.chat_date(begin))
    with located("model.vision"):
        image = checkpoint.image_preparation(vlm.vision, config.model.vision)
        preparation = prepare_images(image, tokens=vlm.image_tokens, grid=vlm.image_grid)
    model = checkpoint.Loaded(vlm, tokenizer, chat, image, Path(config.run.dir), {}, config)
    return model, preparation, tower


def _order(
    model: checkpoint.Loaded,
    data: InstructionData,
    scan: Scan,
    begin: Path | None,
    *,
    tower: str | None,
    world: World,
    say: Say,
) -> tuple[Walk, dict[str, Any]]:
    """The rows in their order, and what decides it; refuses to go on from `begin` with other contents."""
    config, known = model.config, resume.order_of(begin)
    store = Store(cache_folder(config.data.cache_dir, run_dir=Path(config.run.dir)))
    same: dict[str, Any] | None = None
    with world.together():
        if world.main:
            same = _contents(model, data, scan, tower=tower, store=store, world=world)
            if begin is not None and known is not None:
                held = {"llm": begin / "llm", "vision": begin / "vision.safetensors"}
                whole = [part for part, path in held.items() if path.exists()]
                identity.check_contents(known.get("content"), same, folder=begin, whole=whole, say=say)
    # Why twice: the first call plans all rows, which takes a while for millions of records, and keeps their number in
    # the store. Rank 0 does so alone, kept alive by `first`; the others then read it there.
    if world.size > 1:
        world.first(lambda alive: _plan_rows(config, scan, known, store))
    costs = unit_costs(model.vlm, scan, cached=_cached(config)) if world.size > 1 else None
    walk, order = walk_of(config, scan, costs=costs, known=known, store=store)
    return walk, order | {"content": same}


def _plan_rows(config: Config, scan: Scan, known: dict[str, Any] | None, store: Store) -> None:
    walk_of(config, scan, known=known, store=store)


def _cached(config: Config) -> bool:
    return config.model.vision is not None and config.model.vision.cache != "off"


def _features(
    model: checkpoint.Loaded,
    data: InstructionData,
    scan: Scan,
    preparation: ImagePreparation | None,
    *,
    world: World,
    heart: Heartbeat,
    say: Say,
) -> FeatureCache | None:
    """Features of all images of the run where a frozen encoder's are cached."""
    vision, vlm = model.config.model.vision, model.vlm
    if vision is None or preparation is None or not _cached(model.config) or not len(scan.illustrated):
        return None
    say(f"computing features of {scan.pictures} pictures once")
    folder, begin = features_folder(vision, model.folder), partial(heart.phase, step=0)
    return cache_features(vlm, data, scan, preparation, kind=vision.cache, folder=folder, world=world, begin=begin)


def _align(
    model: checkpoint.Loaded,
    preparation: ImagePreparation | None,
    features: FeatureCache | None,
    *,
    divided: dict[str, Any] | None,
    world: World,
    heart: Heartbeat,
    say: Say,
) -> None:
    """Word alignment of the projector before the first step."""
    align = model.config.align
    assert align is not None, "only a config with the section align comes here"
    plan = Alignment(**align.model_dump(), seed=model.config.run.seed)
    where: dict[str, Any] = {"run_dir": model.folder, "world": world, "begin": partial(heart.phase, step=0)}
    with partitioned(divided):
        result = align_to_captions(model.vlm, model.tokenizer, preparation, plan, features=features, **where)
    say(result)
    heart.phase("preparing the model", 0)


def _train_data(
    config: Config, data: InstructionData, scan: Scan, walk: Walk, *, world: World, **feed: Any
) -> TrainData:
    return TrainData(
        data,
        scan,
        walk,
        rank=world.rank,
        world=world.size,
        device=world.device,
        micro_rows=config.train.micro_rows,
        row_tokens=config.data.pack_tokens,
        skip_bad=config.run.on_bad_record == "skip",
        max_bad=most_bad(config.run.max_bad_fraction, scan.records),
        workers=config.data.workers,
        prefetch=config.data.prefetch_mb << 20,
        **feed,
    )


def _each_once(config: Config, data: InstructionData, scan: Scan, *, world: World, **feed: Any) -> TrainData:
    """These records once each, in rows as in training; without `features` images go through the tower each time."""
    walk, _ = make_walk(
        scan,
        [1.0] * len(data.sources),
        mixing={"scheme": "weights"},
        seed=0,
        capacity=config.data.pack_tokens if config.data.packing else None,
        rows_per_step=world.size * config.train.micro_rows,
        epochs=1.0,
        steps=None,
        group=config.data.group,
    )
    return _train_data(config, data, scan, walk, world=world, **feed)


def _plan(config: Config, scan: Scan, plan: dict[str, Any]) -> None:
    walk_of(config, scan, **plan)


def _tune(vlm: VLM, config: Config, *, probe: bool, say: Say) -> list[Group]:
    """Apply the tuning methods; with `probe` see that an adapter starts where the base is, and reaches the loss."""
    tune = config.tune.model_dump()
    adapter = (
        probe and method_of(tune["llm"]["mode"]).starts_at_base and tune["llm"]["options"].get("init") is not False
    )
    before = answers(vlm) if adapter else None
    groups = apply_tuning(vlm, tune, say=say)
    if {"llava-hf", "llava"} & set(config.export) and (added := changes_layout(vlm.llm)) is not None:
        problem = f"{tune['llm']['mode']} adds '{added}', for which {config.export[0]} has no place"
        raise ConfigError(problem, where="export", remedy="list mmit in its place")
    if before is not None:
        vlm.to(before.device)
        check_start_of_adapter(vlm, before)
        if idle := without_gradient(vlm):
            names = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
            say(f"warning: {len(idle)} tensors of the adapter have no gradient, so they are not trained: {names}")
    return groups


def _contents(
    model: checkpoint.Loaded, data: InstructionData, scan: Scan, *, tower: str | None, store: Store, world: World
) -> dict[str, Any]:
    """What this run learns from and builds on, by hashes: two runs with the same go on from each other."""
    config, llm, told = model.config, model.config.model.llm, model.chat.to_json()
    zero = config.engine.deepspeed
    commit = getattr(model.vlm.llm.config, "_commit_hash", None)
    # A language model that is tuned as a whole is in every checkpoint: nothing hangs on where it began.
    unused = llm.random_init is not None or method_of(config.tune.llm.mode).whole
    return {
        "sources": identity.contents(data, scan),
        "vision": tower,
        "llm": identity.base_content(llm.name, commit=commit, unused=unused, store=store),
        # `thinks` follows from the sources.
        "chat": {k: v for k, v in told.items() if k != "thinks" and (k != "name" or "template" not in told)},
        # Of a chat format and a data format the tokens tell.
        "code": identity.code_content(checkpoint.own_code(config, {})),
        "deepspeed": {"name": zero, "options": deepspeed_options(zero)} if world.deepspeed else None,
    }


def _try_forward(vlm: VLM, data: InstructionData, scan: Scan, *, apart: bool) -> None:
    """Forwards that find out about the model; in the first step they would be out of the order ZeRO-3 records.

    Args:
        apart: records are known not to meet in a packed row.
    """
    if not (vlm.padded or apart):
        vlm.check_isolation()
    check_records(vlm, data, scan)
    vlm.split()


def _partition(config: Config) -> dict[str, Any] | None:
    """Under ZeRO-3 the DeepSpeed config by which ranks divide the LLM while loading it; None where each loads all."""
    t = config.train
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
    return options if divided and config.model.llm.dtype in (None, config.train.precision) else None


def _assemble(config: Config, start: Path | None, divided: dict[str, Any] | None) -> tuple[VLM, Any]:
    """The composite and its tokenizer; a fully tuned LLM comes from the checkpoint `start`."""
    dtype = torch.float32 if config.train.precision == "fp32" else DTYPES[config.train.precision]
    model = config.model.model_dump()
    tokenizer = None
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
        vlm.whole.add("llm")
    return vlm, tokens


def _read_data(
    model: checkpoint.Loaded,
    part: Literal["train", "eval"],
    *,
    preparation: ImagePreparation | None,
    world: World,
    say: Say,
) -> tuple[InstructionData, Scan]:
    """Open, measure and judge the records. Rank 0 measures; then what it kept is read by all.

    Nodes that do not see its files measure for themselves, one rank of each.
    """
    config, vlm = model.config, model.vlm
    options, run_dir = config.data, Path(config.run.dir)
    skip = config.run.on_bad_record == "skip"
    check_lengths(
        max_length=options.max_length,
        capacity=options.pack_tokens,
        limit=context_length(vlm.llm),
        virtual=virtual_tokens(vlm.llm),
    )
    cache = cache_folder(options.cache_dir, run_dir=run_dir)
    tell = say if world.main else lambda text: None
    unreadable: list[RecordError] = []
    found: list[Any] = []

    def work(alive: Callable[[], None]) -> None:
        data = open_data(
            [s.model_dump() for s in getattr(options, part)],
            model.chat,
            model.tokenizer,
            cache=cache,
            on_bad=unreadable.append if skip else None,
            key=f"data.{part}",
            say=tell,
            preparation=preparation,
            max_length=options.max_length,
            capacity=options.pack_tokens,
            split_turns=options.split_turns,
            share_prefix=options.share_prefix and options.packing is not False,
            loss=options.loss.model_dump(),
            choosing=choosing_of(config),
            compares=objective_of(config).compares,
        )
        found[:] = [data, measure(data, store=Store(cache, tell), shown=world.main, alive=alive)]

    for mine in (world.main, world.keeper and not world.main, not (world.keeper or world.main)):
        world.turn(work, mine=mine)
    data, scan = found
    for source, kept in zip(data.sources, scan.kept, strict=True):
        if kept and world.main:
            say(f"{source.origin}: kept in meta only: {told(kept)}")
    scan.bad = unreadable + scan.bad
    bound = config.run.max_bad_fraction
    judge(
        scan,
        skip=skip,
        max_bad_fraction=bound,
        run_dir=run_dir,
        main=world.main,
        say=say,
        key=f"data.{part}",
        name=BAD_RECORDS[part],
    )
    return data, scan


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
    common: dict[str, Any] = {
        "device": world.device,
        "precision": t.precision,
        "betas": t.betas,
        "eps": t.eps,
        "weight_decay": t.weight_decay,
        "clip": t.clip,
    }
    set_recompute(vlm, recompute)
    if not world.deepspeed:
        return TorchEngine(vlm, groups, **common)
    frozen = ["vision"] if vlm.vision is not None and not vlm.vision.trainable else []
    options = deepspeed_options(config.engine.deepspeed)
    return DeepSpeedEngine(vlm, groups, config=options, replicated=frozen, **common)
