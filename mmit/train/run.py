"""A training run from its config: begin with `_train`, which is its table of contents.

Around it `run` refuses what it can at once, joins the ranks, locks the folder, and writes the report at the end; below
it `RunHooks` says what happens between steps: log, evaluate, save, stop. The parts are built in `parts.py` and
`records.py`. To follow a step, go on in `loop.py`, `data/batches.py` and an engine. `scripts/train.py` and
`mmit train` both come here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.cores import Watch
from mmit.errors import ConfigError, RecordError
from mmit.io import unless_failing, write_atomic
from mmit.models.tuning import check_options
from mmit.processes import only_one
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint import resume
from mmit.train.checkpoint.saving import Contents, Saves
from mmit.train.checks.exporting import check_exports
from mmit.train.data.setup import Say, note_bad
from mmit.train.determinism import deterministic
from mmit.train.engines.world import World, join_ranks, speaker
from mmit.train.evaluation import LOSS, Best, Evaluations, HeldOut, Measure
from mmit.train.loop import Hooks, Progress, train
from mmit.train.monitor.heartbeat import Heartbeat
from mmit.train.monitor.metrics_log import RunLog, memory_gib
from mmit.train.monitor.report import write_report
from mmit.train.monitor.run_files import note_event
from mmit.train.monitor.trackers import open_trackers, require
from mmit.train.parts import Model, Start, build_engine, build_model, prepare_model, take_folder
from mmit.train.records import Feeds, feed, read_records
from mmit.train.resolve import check_zero3, objective_of, resolve_precision
from mmit.train.schedule import Schedule, Spikes
from mmit.train.signals import EXIT_STOPPED, Stop, StopNow, stop_asked

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.models.tuning import Group
    from mmit.models.vlm import VLM
    from mmit.train.engines.base import Engine
    from mmit.train.reference import References

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
    with deterministic(config.train.deterministic):
        return _started(config, evaluate)


def _started(config: Config, evaluate: Evaluate | None) -> int:
    """The run, from what can be refused at once to its exit code."""
    require(config.train.report_to)
    _check_evaluation(config, evaluate)
    # Ranks first: everything below either happens on all of them, or is refused by all of them.
    world = join_ranks(kind=config.engine.kind, device=config.device)
    run_dir = Path(config.run.dir)
    say = speaker(world.main)
    # No weights and no data are read for these, so that what they refuse is told at once.
    check_options(config.tune.model_dump())
    objective_of(config)
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
    """The run, in a folder that it has for itself: what watches over it, and its report at the end."""
    begin = resume.pick_checkpoint(run_dir, config.run.resume, say=say)  # first: nothing of another run may be touched
    config = resolve_precision(config, begin, world=world, say=say)
    trackers = open_trackers(config.train.report_to, run_dir, config.flat()) if world.main else []
    report = partial(_report_stall, run_dir, speaker(True))
    heart = Heartbeat(run_dir, rank=world.rank, world=world.size, stall=config.run.stall_seconds, report=report)
    start, last, finished = Start(config, begin, world, say, heart), "failed", False
    try:
        with stop_asked(say) as stopped, closing(RunLog(run_dir, active=world.main, trackers=trackers)) as log:
            finished = _train(start, evaluate, log=log, stopped=stopped)
        last = "finished" if finished else "stopped"
    except StopNow:
        last = "stopped"
        say("stopped by a signal before the first step; nothing was changed")
    finally:
        heart.close(last)
        if world.main:
            # Also of a run that failed: its report shows how far it came. An error of the report must not hide that.
            with unless_failing():
                write_report(run_dir)
    return 0 if finished else EXIT_STOPPED


def _train(start: Start, evaluate: Evaluate | None, *, log: RunLog, stopped: Stop) -> bool:
    """The run as a table of contents, in order of causality; True when it came to its end."""
    watch = Watch()
    with stopped.leaving():  # nothing of this start is worth saving yet
        model = build_model(start)  # vision encoder, projector, LLM, tuning methods; the weights of a checkpoint
        records = read_records(start, model)  # measured; bad ones refused or left out; rows in order
        features = prepare_model(start, model, records)  # tried on records, its features cached, its projector aligned
        engine = build_engine(start, model, records)  # torch, or DeepSpeed over ranks
        progress = resume.restore(engine, start.begin, seed=start.config.run.seed, say=start.say)
        feeds = feed(start, model, records, engine=engine, features=features)  # micro-batches
        take_folder(start, model, records, feeds=feeds, progress=progress)  # until here nothing was written
        if (others := watch.crowd()) is not None:
            start.say(f"warning: {others}: steps take longer, and their times say little")
    schedule = _schedule(model.config, model.groups, steps=records.row_order.steps)
    log.begin(total=schedule.steps, start=progress.step)
    # Closed in this order when the loop fails: first the save under way, which must not be lost with the process.
    with closing(_saves(start, model, engine, feeds, order=records.order, say=log.say)) as saves:
        evaluations = _evaluations(start, evaluate, model, engine, feeds, log=log, stopped=stopped)
        hooks = RunHooks(engine, schedule, start.run_dir, log, start.heart, saves, evaluations, stopped)
        hooks.catch_up(progress)
        finished = train(engine, feeds.train, schedule, hooks, progress=progress, preference=feeds.preference("train"))
        start.heart.phase("the last save", progress.step)
        saves.wait()
    _say_the_end(start, progress, finished=finished, say=log.say)
    return finished


@dataclass
class RunHooks(Hooks):
    """What a run does around its steps: its log and heartbeat, evaluations, saves, and leaving after a signal."""

    engine: Engine
    schedule: Schedule
    run_dir: Path
    log: RunLog
    heart: Heartbeat
    save: Saves
    evaluate: Evaluations | None
    stopped: Stop
    saved: int = -1  # the step of the last save

    def phase(self, name: str, step: int) -> None:
        """For whoever looks at the heartbeats."""
        self.heart.phase(name, step)

    def on_bad(self, error: RecordError) -> None:
        """List it in the run folder."""
        note_bad(self.run_dir, self.engine.rank, error)

    def on_event(self, step: int, kind: str, message: str, **facts: Any) -> None:
        """Say it, and keep its facts in events.jsonl.

        Args:
            step, kind, message, facts: as in `Hooks.on_event`.
        """
        self.log.say(message)
        self.log.event(step, kind, **facts)

    def catch_up(self, progress: Progress) -> None:
        """Evaluate what a signal cut short before; a new run has nothing to evaluate yet."""
        if progress.step and self._evaluate(progress):
            self._save(progress)

    def after_step(self, progress: Progress, row: dict[str, Any]) -> None:
        """Log, then evaluate, then save: a checkpoint knows the evaluation of its own step, and whether it is best."""
        row["memory_gib"] = memory_gib(self.engine.device)
        self.log.step(row, write=self.schedule.logs(progress.step))
        better = self._evaluate(progress)
        if better or self.schedule.saves(progress.step):
            self._save(progress)

    def should_stop(self, progress: Progress) -> bool:
        """Whether a signal came on any rank, which the checkpoint of this step then precedes."""
        self.heart.phase("sums over ranks", progress.step)
        # After the save, which may take long. One sum for both questions, since each costs a wait for all ranks.
        asked, failed = self.engine.all_sum([float(self.stopped()), float(self.save.failed())])
        if (asked or failed) and self.saved != progress.step:
            self._save(progress)  # after a failed save in the background this raises why
        return bool(asked)

    def _evaluate(self, progress: Progress) -> bool:
        """Evaluate if it is due and not done; True when this is the best model so far."""
        due = self.schedule.evaluates(progress.step) and progress.evaluated != progress.step
        return self.evaluate is not None and due and self.evaluate(progress)

    def _save(self, progress: Progress) -> None:
        self.save(progress)
        self.saved = progress.step


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


def _schedule(config: Config, groups: Sequence[Group], *, steps: int) -> Schedule:
    t = config.train
    rates = {g.name: g.lr for g in groups}
    order = sorted(rates, key=lambda name: not name.startswith("llm"))  # the progress line shows the first
    return Schedule(
        steps=steps,
        rates={name: rates[name] for name in order},
        shape=t.schedule,
        warmup=t.warmup,
        min_ratio=t.min_lr_ratio,
        log_every=t.log_every,
        save_every=t.save_every,
        eval_every=t.eval_every,
        spikes=Spikes(t.spike_sigma, t.spike_window),
    )


def _saves(start: Start, model: Model, engine: Engine, feeds: Feeds, *, order: dict[str, Any], say: Say) -> Saves:
    contents = Contents(
        model.vlm,
        partial(_write_model, model.loaded, feeds.references),
        lambda step: {**order, **feeds.train.order_after(step)},
    )
    t = model.config.train
    return Saves(start.run_dir, engine, contents, keep_last=t.keep_last, background=t.save_in_background, say=say)


def _write_model(model: checkpoint.Loaded, references: References | None, draft: Path, vlm: VLM, step: int) -> None:
    # Not `model.vlm`: a save in the background hands over its copy.
    checkpoint.write_model(draft, replace(model, vlm=vlm), step=step)
    if references is not None:
        references.write(draft)


def _evaluations(
    start: Start,
    evaluate: Evaluate | None,
    model: Model,
    engine: Engine,
    feeds: Feeds,
    *,
    log: RunLog,
    stopped: Stop,
) -> Evaluations | None:
    """What is measured while training; None for nothing."""
    keep, measures = model.config.train.keep_best, list[Measure]()
    if feeds.eval is not None:
        on_bad = partial(note_bad, start.run_dir, engine.rank, part="eval")
        told: dict[str, Any] = {"on_bad": on_bad, "should_stop": stopped, "preference": feeds.preference("eval")}
        measures.append(HeldOut(engine, feeds.eval, **told))
    if evaluate is not None:
        measures.append(partial(evaluate, model.loaded))
    if not measures:
        return None
    return Evaluations(
        engine,
        model.vlm,
        measures,
        best=Best(keep.metric, higher=keep.better == "higher") if keep else None,
        log=log,
        interruptible=stopped.leaving,
        phase=start.heart.phase,
    )


def _say_the_end(start: Start, progress: Progress, *, finished: bool, say: Say) -> None:
    """Say where the run stands, and leave `finished.json` for programs that wait for it."""
    newest = checkpoint.checkpoints(start.run_dir)[-1]
    # A stopped run has none: whoever waits for the file starts the run again instead.
    if finished and start.world.main:
        done = {"steps": progress.step, "checkpoint": str(newest.relative_to(start.run_dir))}
        write_atomic(start.run_dir / "finished.json", json.dumps(done))
    say(f"{'finished' if finished else 'stopped by a signal'} at step {progress.step}; checkpoint: {newest}")
    if progress.best is not None:
        best = progress.best
        say(f"best: step {best['step']}, {best['metric']} {best['value']:.4f}")
