"""A training run from its config, read as a table of contents: parts, loop, evaluations, saves, report.

Here and in `parts.py` config sections are taken apart; what they call takes plain arguments. `scripts/train.py` and
`mmit train` both come here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.cores import Watch
from mmit.errors import ConfigError
from mmit.io import unless_failing, write_atomic
from mmit.models.tuning import Group, check_options
from mmit.processes import only_one
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint import resume
from mmit.train.checkpoint.saving import Saves
from mmit.train.checks.exporting import check_exports
from mmit.train.data.order import make_walk
from mmit.train.data.setup import Say, batches_of_rank, most_bad, note_bad, record_names, source_names
from mmit.train.data.upload import Upload
from mmit.train.engines.world import World, join_ranks, speaker
from mmit.train.evaluation import LOSS, Best, Evaluations, HeldOut, Measure
from mmit.train.loop import Plan, train
from mmit.train.monitor.heartbeat import Heartbeat
from mmit.train.monitor.metrics_log import RunLog
from mmit.train.monitor.report import write_report
from mmit.train.monitor.run_files import note_event
from mmit.train.monitor.trackers import open_trackers, require
from mmit.train.parts import BAD_RECORDS, Parts, build
from mmit.train.settle import check_zero3, settle_precision
from mmit.train.signals import EXIT_STOPPED, Leave, Stop, stop_asked
from mmit.train.spikes import Spikes

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.chat import ChatFormat
    from mmit.data.dataset import InstructionData
    from mmit.data.loader import LoadImage, MicroBatch
    from mmit.data.measure import Scan
    from mmit.data.walk import Walk
    from mmit.models.vlm import VLM
    from mmit.train.engines.base import Engine
    from mmit.train.features import FeatureCache

__all__ = ["EXIT_STOPPED", "Evaluate", "run"]

LOCK = "run.lock"  # in run.dir while a run is at work there
Evaluate = Callable[[checkpoint.Loaded, int], Mapping[str, float]]  # the model as it is, the step -> numbers


def run(config: Config, *, evaluate: Evaluate | None = None) -> int:
    """Train as `config` says. Returns the exit code: 0, or EXIT_STOPPED after a signal (a checkpoint is saved).

    Args:
        evaluate: called every `train.eval_every` steps and after the last one, on every rank, with the live model in
            evaluation mode; the numbers it returns on rank 0 go to metrics.jsonl, and `train.keep_best` may name one.

    Raises MmitError for anything a user can fix.
    """
    require(config.train.report_to)
    _check_evaluation(config, evaluate)
    world = join_ranks(kind=config.engine.kind, device=config.device)
    run_dir = Path(config.run.dir)
    say = speaker(world.main)
    check_options(config.tune.model_dump())
    check_exports(config)
    check_zero3(config, world=world)
    for note in config.notes:
        say(note)
    with ExitStack() as held:
        with world.together():
            _make(run_dir)
            if world.main:
                held.enter_context(only_one(run_dir / LOCK, "run", folder=run_dir))
        return _run(config, evaluate, run_dir, world=world, say=say)


def _run(config: Config, evaluate: Evaluate | None, run_dir: Path, *, world: World, say: Say) -> int:
    """The run, in a folder that it has for itself."""
    watch = Watch()
    begin = resume.choose(run_dir, config.run.resume, say=say)  # first: nothing of another run may be touched
    config = settle_precision(config, begin, world=world, say=say)
    trackers = open_trackers(config.train.report_to, run_dir, config.flat()) if world.main else []
    report = partial(_report_stall, run_dir, speaker(True))
    heart = Heartbeat(run_dir, rank=world.rank, world=world.size, stall=config.run.stall_seconds, report=report)
    last, finished = "failed", False
    try:
        with stop_asked(say) as stopped, closing(RunLog(run_dir, active=world.main, trackers=trackers)) as log:
            with stopped.leaving():  # nothing of this start is worth saving yet
                parts = build(config, begin, world=world, say=say, heart=heart)
                if (others := watch.crowd()) is not None:
                    say(f"warning: {others}: steps take longer, and their times say little")
            finished = _train(parts.config, evaluate, parts, world=world, log=log, heart=heart, stopped=stopped)
        last = "finished" if finished else "stopped"
    except Leave:
        last = "stopped"
        say("stopped by a signal before the first step; nothing was changed")
    finally:
        heart.close(last)
        if world.main:
            with unless_failing():
                write_report(run_dir)
    return 0 if finished else EXIT_STOPPED


def _train(
    config: Config,
    evaluate: Evaluate | None,
    parts: Parts,
    *,
    world: World,
    log: RunLog,
    heart: Heartbeat,
    stopped: Stop,
) -> bool:
    """The loop and the last save; True when the run came to its end."""
    run_dir, micro_rows = Path(config.run.dir), config.train.micro_rows
    data, scan, walk, engine, progress = parts.data, parts.scan, parts.walk, parts.engine, parts.progress
    log.begin(total=walk.steps, start=progress.step)
    saves = Saves(
        run_dir,
        engine,
        parts.vlm,
        write_model=partial(_write_model, config, parts.tokenizer, parts.chat),
        everything=config.tune.llm.mode == "full" or "llm" in parts.vlm.whole,
        order=lambda step: {**parts.order, **walk.state(step * walk.rows_per_step)},
        keep_last=config.train.keep_last,
        background=config.train.save_in_background,
        say=log.say,
    )
    load_image = None if parts.features else parts.load_image
    batches = _batches(config, data, scan, walk, engine=engine, start=progress.step, load_image=load_image)
    # Closed here: workers that outlive the loop keep the process from ending, since they ignore its signals.
    with closing(saves), closing(batches):
        finished = train(
            engine,
            walk,
            batches,
            plan=_plan(config, data, scan, parts.groups),
            progress=progress,
            log=log,
            prepare=partial(_prepare, upload=Upload(world.device), features=parts.features),
            save=saves,
            on_bad=partial(note_bad, run_dir, world.rank),
            name_records=lambda step, places: record_names(
                data, scan, walk, world=world.size, micro_rows=micro_rows, step=step, places=places
            ),
            evaluate=_evaluations(config, evaluate, parts, log=log, stopped=stopped, heart=heart),
            should_stop=stopped,
            save_failed=saves.failed,
            phase=heart.phase,
        )
        heart.phase("the last save", progress.step)
        saves.wait()
    newest = checkpoint.checkpoints(run_dir)[-1]
    if finished and world.main:
        done = {"steps": progress.step, "checkpoint": str(newest.relative_to(run_dir))}
        write_atomic(run_dir / "finished.json", json.dumps(done))
    log.say(f"{'finished' if finished else 'stopped by a signal'} at step {progress.step}; checkpoint: {newest}")
    if progress.best is not None:
        best = progress.best
        log.say(f"best: step {best['step']}, {best['metric']} {best['value']:.4f}")
    return finished


def _check_evaluation(config: Config, evaluate: Evaluate | None) -> None:
    """Refuse what asks for an evaluation that there is not."""
    t = config.train
    for key, value, met in (
        ("train.eval_every", t.eval_every, bool(config.data.eval) or evaluate is not None),
        ("train.keep_best", t.keep_best, bool(config.data.eval) or evaluate is not None),
    ):
        if value is not None and not met:
            problem = "there is nothing to evaluate"
            raise ConfigError(problem, where=key, remedy="name held-out sources in data.eval, or set it to null")
    if t.keep_best is not None and t.keep_best.metric.startswith(LOSS) and not config.data.eval:
        problem = f"'{t.keep_best.metric}' is the loss on data.eval, which is empty"
        raise ConfigError(problem, where="train.keep_best.metric", remedy="fill data.eval, or name another metric")


def _report_stall(run_dir: Path, say: Say, message: str, facts: Mapping[str, Any]) -> None:
    """From the heartbeat's thread, on rank 0 or 1."""
    say(f"standstill: {message}")
    note_event(run_dir, {**facts, "kind": "stalled", "message": message})


def _make(run_dir: Path) -> None:
    """Find out now, not after an hour, that the run has nowhere to write."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"the folder cannot be made: {error.strerror}"
        raise ConfigError(problem, where=f"run.dir: {run_dir}", remedy="choose another folder") from None


def _plan(config: Config, data: InstructionData, scan: Scan, groups: list[Group]) -> Plan:
    t = config.train
    rates = {g.name: g.lr for g in groups}
    order = sorted(rates, key=lambda name: not name.startswith("llm"))  # the progress line shows the first
    return Plan(
        schedule=t.schedule,
        warmup=t.warmup,
        min_lr_ratio=t.min_lr_ratio,
        rates={name: rates[name] for name in order},
        capacity=config.data.pack_tokens,
        micro_rows=t.micro_rows,
        log_every=t.log_every,
        save_every=t.save_every,
        max_bad=most_bad(config.run.max_bad_fraction, scan.records),
        sources=source_names(data),
        starts=data.starts,
        spikes=Spikes(t.spike_sigma, t.spike_window),
        eval_every=t.eval_every,
    )


def _evaluations(
    config: Config, evaluate: Evaluate | None, parts: Parts, *, log: RunLog, stopped: Stop, heart: Heartbeat
) -> Evaluations | None:
    """What is measured while training; None for nothing."""
    measures: list[Measure] = []
    if parts.held_out is not None:
        measures.append(_held_out_loss(config, *parts.held_out, parts=parts, stopped=stopped))
    if evaluate is not None:
        folder = Path(config.run.dir)
        live = checkpoint.Loaded(parts.vlm, parts.tokenizer, parts.chat, parts.image, folder, {}, config)
        measures.append(partial(evaluate, live))
    keep = config.train.keep_best
    if not measures:
        return None
    return Evaluations(
        parts.engine,
        parts.vlm,
        measures,
        best=Best(keep.metric, higher=keep.better == "higher") if keep else None,
        log=log,
        interruptible=stopped.leaving,
        phase=heart.phase,
    )


def _held_out_loss(config: Config, data: InstructionData, scan: Scan, *, parts: Parts, stopped: Stop) -> HeldOut:
    """The loss on data.eval, in rows as in training; its pictures go through the tower each time."""
    engine, load_image = parts.engine, parts.load_image
    rows = engine.world * config.train.micro_rows
    packing = config.data.pack_tokens if config.data.packing else None
    even: dict[str, Any] = {"mixing": {"scheme": "weights"}, "seed": 0, "epochs": 1.0, "steps": None}
    even["group"] = config.data.group
    walk, _ = make_walk(scan, [1.0] * len(data.sources), capacity=packing, rows_per_step=rows, **even)
    return HeldOut(
        engine,
        lambda: closing(_batches(config, data, scan, walk, engine=engine, start=0, load_image=load_image)),
        prepare=partial(_prepare, upload=Upload(engine.device), features=None),
        names=source_names(data),
        starts=data.starts,
        on_bad=partial(note_bad, Path(config.run.dir), engine.rank, name=BAD_RECORDS["eval"]),
        should_stop=stopped,
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


def _prepare(batch: MicroBatch, *, upload: Upload, features: FeatureCache | None) -> dict[str, Any]:
    tensors = {**batch.tensors, "records": batch.target_records}
    if features is not None and batch.image_keys:
        tensors["features"] = features.get(batch.image_keys)
    return upload(tensors)


def _write_model(config: Config, tokenizer: Any, chat: ChatFormat, draft: Path, vlm: VLM, step: int) -> None:
    checkpoint.write_model(draft, vlm, config=config, tokenizer=tokenizer, chat=chat, step=step)
