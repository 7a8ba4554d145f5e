"""A training run from its config, read as a table of contents: parts, data, engine, loop, checkpoint.

The one place where config sections are taken apart; what it calls takes plain arguments. `scripts/train.py` and
`mmit train` both come here.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmit.config import Config
from mmit.data.chat import ChatFormat, chat_format
from mmit.data.dataset import InstructionData, Scan
from mmit.data.loader import LoadImage, MicroBatch
from mmit.data.preparation import ImagePreparation, prepare_images
from mmit.data.walk import Walk
from mmit.errors import ConfigError, RecordError, located
from mmit.models.assemble import assemble
from mmit.models.llm import DTYPES, context_length, recompute_activations
from mmit.models.partition import partitioned
from mmit.models.tuning import Group, apply_tuning, check_options, quantization
from mmit.models.virtual import virtual_tokens
from mmit.models.vlm import VLM
from mmit.train import checkpoint, resume
from mmit.train.balance import unit_costs
from mmit.train.data_setup import (
    Say,
    batches_of_rank,
    check_lengths,
    image_loader,
    judge,
    make_walk,
    note_bad,
    open_data,
    record_names,
)
from mmit.train.echo import echo
from mmit.train.engine import DeepSpeedEngine, Engine, TorchEngine
from mmit.train.features import FeatureCache
from mmit.train.loop import Plan, Progress, train
from mmit.train.metrics_log import RunLog
from mmit.train.pictures import align_to_captions, cache_features
from mmit.train.signals import EXIT_STOPPED, stop_asked
from mmit.train.world import World, join_ranks, speaker
from mmit.train.zero import complete, deepspeed_options
from mmit.train.zero_check import check_deepspeed

__all__ = ["EXIT_STOPPED", "run"]


def run(config: Config) -> int:
    """Train as `config` says. Returns the exit code: 0, or EXIT_STOPPED after a signal (a checkpoint is saved).

    Raises MmitError for anything a user can mend.
    """
    world = join_ranks(kind=config.engine.kind, device=config.device)
    run_dir, seed = Path(config.run.dir), config.run.seed
    say = speaker(world.main)
    check_options(config.tune.model_dump())
    for note in config.notes:
        say(note)
    _make(run_dir)
    begin = resume.choose(run_dir, config.run.resume, say=say)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)

    start = begin or (checkpoint.find(config.run.init_from, warn=say) if config.run.init_from else None)
    parts = _partition(config) if world.deepspeed else None
    vlm, tokenizer = _assemble(config, start, parts)
    with located("model.chat.format"):
        chat = chat_format(config.model.chat.format, tokenizer)
    with located("model.vision"):
        image = checkpoint.image_preparation(vlm.vision, config.model.vision)
        preparation = prepare_images(image, tokens=vlm.image_tokens, grid=vlm.image_grid)
    load_image = image_loader(preparation) if preparation else None

    with partitioned(parts):
        groups = apply_tuning(vlm, config.tune.model_dump())
        if start is not None:
            checkpoint.read_weights(vlm, start)
    data, scan = _read_data(config, vlm, tokenizer, chat, preparation=preparation, world=world, say=say)
    cached = config.model.vision is not None and config.model.vision.cache != "off"
    costs = unit_costs(vlm, scan, cached=cached) if world.size > 1 else None
    walk, order = _walk(config, scan, known=resume.order_of(begin), costs=costs)

    vlm.to(world.device)
    if config.data.packing and parts is None:
        vlm.check_isolation()
    vlm.split()  # takes a forward, which under ZeRO-3 would be out of order in the first step
    features = cache_features(
        vlm,
        data,
        scan,
        kind=config.model.vision.cache if config.model.vision else "off",
        frozen=config.tune.vision.mode == "frozen",
        folder=run_dir / "cache",
        preparation=preparation,
        say=say,
    )
    if config.align is not None and begin is None:
        given: dict[str, Any] = {**config.align.model_dump(), "run_dir": run_dir, "seed": seed, "say": say}
        with partitioned(parts):
            align_to_captions(vlm, tokenizer, preparation, features=features, **given)
    if world.main:
        rates = {c: getattr(config.tune, c).lr for c in ("vision", "projector", "llm")}
        echo(vlm, data, scan, walk=walk, tokenizer=tokenizer, lr=rates, say=say)

    engine = _engine(config, vlm, groups, world=world)
    if config.data.packing and parts is not None:  # runs only under the engine that brings its weights
        vlm.check_isolation()
    progress = resume.restore(engine, begin, seed=seed, say=say)
    if world.main:
        resume.set_aside_later(run_dir, progress.step, say=say)
    vlm.train()
    log = RunLog(run_dir, active=world.main, total=walk.steps, start=progress.step)
    batches = _batches(
        config, data, scan, walk, engine=engine, start=progress.step, load_image=None if features else load_image
    )
    # Closed here: workers that outlive the loop keep the process from ending, since they ignore its signals.
    with stop_asked(say) as stopped, closing(batches):
        try:
            finished = train(
                engine,
                walk,
                batches,
                plan=_plan(config, scan),
                progress=progress,
                log=log,
                prepare=partial(_prepare, device=world.device, features=features),
                save=partial(_save, config, vlm, tokenizer, chat, engine=engine, walk=walk, order=order, log=log),
                on_bad=partial(note_bad, run_dir, world.rank),
                name_records=lambda step, places: record_names(
                    data, scan, walk, world=world.size, micro_rows=config.train.micro_rows, step=step, places=places
                ),
                should_stop=stopped,
            )
        finally:
            log.close()
    what = "finished" if finished else "stopped by a signal"
    last = checkpoint.checkpoints(run_dir)[-1]
    if finished and world.main:
        done = {"steps": progress.step, "checkpoint": str(last.relative_to(run_dir))}
        (run_dir / "finished.json").write_text(json.dumps(done))
    say(f"{what} at step {progress.step}; checkpoint: {last}")
    return 0 if finished else EXIT_STOPPED


def _make(run_dir: Path) -> None:
    """Find out now, not after an hour, that the run has nowhere to write."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"the folder cannot be made: {error.strerror}"
        raise ConfigError(problem, where=f"run.dir: {run_dir}", remedy="choose another folder") from None


def _partition(config: Config) -> dict[str, Any] | None:
    """Under ZeRO-3 the DeepSpeed config by which ranks divide the LLM while loading it; None where each loads all."""
    t = config.train
    options = complete(deepspeed_options(config.engine.deepspeed), precision=t.precision, clip=t.clip)
    check_deepspeed(options)
    divided = int((options.get("zero_optimization") or {}).get("stage", 0)) == 3
    return options if divided and config.model.llm.dtype in (None, config.train.precision) else None


def _assemble(config: Config, start: Path | None, parts: dict[str, Any] | None) -> tuple[VLM, Any]:
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
        packed=config.data.packing,
        tokenizer=tokenizer,
        quantization=quantization(config.tune.llm.mode, config.tune.llm.options),
        partition=parts,
    )
    if tokenizer is not None:
        vlm.whole.add("llm")
    return vlm, tokens


def _read_data(
    config: Config,
    vlm: VLM,
    tokenizer: Any,
    chat: ChatFormat,
    *,
    preparation: ImagePreparation | None,
    world: World,
    say: Say,
) -> tuple[InstructionData, Scan]:
    """Open, measure and judge the records; each rank measures for itself, the result is the same."""
    options, run_dir = config.data, Path(config.run.dir)
    skip = config.run.on_bad_record == "skip"
    check_lengths(
        max_length=options.max_length,
        capacity=options.pack_tokens,
        limit=context_length(vlm.llm),
        virtual=virtual_tokens(vlm.llm),
    )
    unreadable: list[RecordError] = []
    data = open_data(
        [s.model_dump() for s in options.train],
        chat,
        tokenizer,
        cache=run_dir / "data",
        world=world,
        on_bad=unreadable.append if skip else None,
        preparation=preparation,
        max_length=options.max_length,
        capacity=options.pack_tokens,
        split_turns=options.split_turns,
        share_prefix=options.share_prefix and options.packing,
    )
    scan = data.scan(workers=options.workers)
    scan.bad = unreadable + scan.bad
    bound = config.run.max_bad_fraction
    judge(scan, skip=skip, max_bad_fraction=bound, run_dir=run_dir, main=world.main, say=say)
    return data, scan


def _walk(
    config: Config, scan: Scan, *, known: dict[str, Any] | None, costs: Any = None
) -> tuple[Walk, dict[str, Any]]:
    t = config.train
    return make_walk(
        scan,
        [s.weight for s in config.data.train],
        mixing=config.data.mixing.model_dump(),
        seed=config.run.seed,
        capacity=config.data.pack_tokens if config.data.packing else None,
        rows_per_step=t.rows_per_step,
        epochs=t.epochs,
        steps=t.steps,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
        known=known,
        costs=costs,
    )


def _engine(config: Config, vlm: VLM, groups: list[Group], *, world: World) -> Engine:
    t = config.train
    common: dict[str, Any] = {
        "device": world.device,
        "precision": t.precision,
        "betas": t.betas,
        "eps": t.eps,
        "weight_decay": t.weight_decay,
        "clip": t.clip,
    }
    if t.checkpointing == "full":
        recompute_activations(vlm.llm)
    if not world.deepspeed:
        return TorchEngine(vlm, groups, **common)
    frozen = ["vision"] if vlm.vision is not None and config.tune.vision.mode == "frozen" else []
    options = deepspeed_options(config.engine.deepspeed)
    return DeepSpeedEngine(vlm, groups, config=options, replicated=frozen, **common)


def _plan(config: Config, scan: Scan) -> Plan:
    t = config.train
    peaks = [c.lr for c in (config.tune.llm, config.tune.projector, config.tune.vision) if c.lr is not None]
    return Plan(
        schedule=t.schedule,
        warmup=t.warmup,
        min_lr_ratio=t.min_lr_ratio,
        peak_lr=peaks[0],
        capacity=config.data.pack_tokens,
        micro_rows=t.micro_rows,
        log_every=t.log_every,
        save_every=t.save_every,
        max_bad=int(config.run.max_bad_fraction * scan.records),
    )


def _batches(
    config: Config,
    data: InstructionData,
    scan: Scan,
    walk: Walk,
    *,
    engine: Engine,
    start: int,
    load_image: LoadImage | None,
) -> Generator[MicroBatch]:
    return batches_of_rank(
        data,
        scan,
        walk,
        rank=engine.rank,
        world=engine.world,
        micro_rows=config.train.micro_rows,
        start=start,
        load_image=load_image,
        skip_bad=config.run.on_bad_record == "skip",
        workers=config.data.workers,
        prefetch=config.data.prefetch_mb << 20,
    )


def _prepare(batch: MicroBatch, *, device: torch.device, features: FeatureCache | None) -> dict[str, torch.Tensor]:
    tensors = batch.to(device)
    if features is not None and batch.image_keys:
        tensors["features"] = features.get(batch.image_keys).to(device, non_blocking=True)
    return tensors


def _save(
    config: Config,
    vlm: VLM,
    tokenizer: Any,
    chat: ChatFormat,
    progress: Progress,
    *,
    engine: Engine,
    walk: Walk,
    order: dict[str, Any],
    log: RunLog,
) -> None:
    """Write checkpoints/step-N and remove those beyond `keep_last`."""
    run_dir, main = Path(config.run.dir), engine.rank == 0
    folder = run_dir / "checkpoints" / f"step-{progress.step:06d}"
    everything = config.tune.llm.mode == "full" or "llm" in vlm.whole
    written = [p for n, p in vlm.named_parameters() if everything or p.requires_grad or not n.startswith("llm.")]

    def model(draft: Path) -> None:
        with engine.whole(written):
            if main:
                (draft / "trainer").mkdir()
                checkpoint.write_model(draft, vlm, config=config, tokenizer=tokenizer, chat=chat, step=progress.step)

    def trainer(draft: Path) -> None:
        state = walk.state(progress.step * walk.rows_per_step)
        resume.write_trainer(draft, engine, progress, order={**order, **state})

    def optimizer(draft: Path) -> None:
        engine.save_state(draft / "trainer")

    checkpoint.write_folder(folder, [model, trainer, optimizer], main=main, all_fine=engine.all_true)
    if main:
        resume.prune(run_dir, config.train.keep_last, say=log.say)
    engine.barrier()
    log.say(f"saved {folder}")
