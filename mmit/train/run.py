"""A training run from its config, read as a table of contents: parts, data, engine, loop, checkpoint.

The one place where config sections are taken apart; what it calls takes plain arguments. `scripts/train.py` and
`mmit train` both come here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmit.config import Config
from mmit.data.chat import ChatFormat, chat_format, encode
from mmit.data.dataset import InstructionData, Scan, image_key, split_pairs
from mmit.data.images import fit, load_rgb
from mmit.data.loader import MicroBatch, micro_batches
from mmit.data.mixture import Walk, epoch_order
from mmit.data.packing import plan_rows
from mmit.data.sources import open_source
from mmit.data.viewer import to_rich
from mmit.errors import CheckpointError, ConfigError, RecordError, located
from mmit.models.assemble import assemble
from mmit.models.llm import DTYPES, context_length
from mmit.models.tuning import apply_tuning, parameter_table
from mmit.models.vlm import VLM
from mmit.records import Image
from mmit.train import checkpoint
from mmit.train.align import align_words
from mmit.train.engine import DeepSpeedEngine, Engine, TorchEngine, join_deepspeed
from mmit.train.features import FeatureCache, compute_features
from mmit.train.loop import Plan, Progress, train
from mmit.train.metrics_log import RunLog

EXIT_STOPPED = 143  # ended by SIGTERM or SIGINT after saving; 128 + 15 as shells report it


def run(config: Config) -> int:
    """Train as `config` says. Returns the exit code: 0, or EXIT_STOPPED after a signal (a checkpoint is saved).

    Raises MmitError for anything a user can mend.
    """
    world = _join_ranks(config)
    run_dir = Path(config.run.dir)
    say = _speaker(world.rank == 0)
    resume = _resume_from(config, run_dir, say)
    _make(run_dir)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)

    dtype = torch.float32 if config.train.precision == "fp32" else DTYPES[config.train.precision]
    model = config.model.model_dump()
    if resume is not None and (resume / "llm").exists():
        model["llm"].update(name=str(resume / "llm"), revision=None, random_init=None)
    vlm, tokenizer = assemble(model, dtype=dtype, seed=config.run.seed, packed=config.data.packing)
    with located("model.chat.format"):
        chat = chat_format(config.model.chat.format, tokenizer)
    load_image = _image_loader(vlm, config)

    groups = apply_tuning(vlm, config.tune.model_dump())

    data, scan = _read_data(config, vlm, tokenizer, chat, run_dir=run_dir, world=world, say=say)
    walk = _walk(config, data, scan)

    if resume is not None:
        checkpoint.read_weights(vlm, resume)
    elif config.run.init_from:
        checkpoint.read_weights(vlm, checkpoint.find(config.run.init_from, warn=say))
    vlm.to(world.device)
    features = _cache_features(config, vlm, scan.images, load_image, run_dir=run_dir, say=say)
    if config.align is not None and resume is None:
        _align(config, vlm, tokenizer, load_image, features, run_dir=run_dir, say=say)
    if world.rank == 0:
        _echo(config, vlm, data, scan, walk, tokenizer=tokenizer, say=say)

    engine = _engine(config, vlm, groups, world=world)
    progress = _restore(engine, resume, scan=scan, seed=config.run.seed)
    vlm.train()
    log = RunLog(run_dir, active=world.rank == 0, total=walk.steps, start=progress.step)
    loader = None if features is not None else load_image
    batches = _batches(config, data, scan, walk, engine=engine, start=progress.step, load_image=loader)
    with _signals() as stopped:
        try:
            finished = train(
                engine,
                walk,
                batches,
                plan=_plan(config, scan),
                progress=progress,
                log=log,
                prepare=partial(_prepare, device=world.device, features=features),
                save=partial(_save, config, vlm, tokenizer, chat, engine, run_dir, scan, log),
                on_bad=partial(_note_bad, run_dir, world.rank),
                should_stop=stopped,
            )
        finally:
            log.close()
    what = "finished" if finished else "stopped by a signal"
    last = checkpoint.checkpoints(run_dir)[-1]
    if finished and world.rank == 0:
        done = {"steps": progress.step, "checkpoint": str(last.relative_to(run_dir))}
        (run_dir / "finished.json").write_text(json.dumps(done))
    say(f"{what} at step {progress.step}; checkpoint: {last}")
    return 0 if finished else EXIT_STOPPED


class _World:
    """Rank, number of ranks, device, and whether DeepSpeed's launcher started us."""

    def __init__(self, rank: int, size: int, device: torch.device, *, deepspeed: bool) -> None:
        self.rank, self.size, self.device, self.deepspeed = rank, size, device, deepspeed

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def _join_ranks(config: Config) -> _World:
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) >= 1
    kind = config.engine.kind
    if kind == "auto":
        kind = "deepspeed" if launched else "torch"
    if kind == "torch" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "the torch engine runs on one device, but several ranks were started",
            where="engine.kind",
            remedy="set engine.kind=deepspeed, or start one process",
        )
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device", where="device", remedy="set device=cpu, or check the driver")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if kind == "torch":
        return _World(0, 1, device, deepspeed=False)
    if not launched:
        raise ConfigError(
            "the DeepSpeed engine needs ranks, and no launcher started any",
            where="engine.kind",
            remedy="start it with: deepspeed --num_gpus N scripts/train.py --config FILE; or set engine.kind=auto",
        )
    rank, size = join_deepspeed(cuda=cuda)
    return _World(rank, size, device, deepspeed=True)


def _speaker(active: bool) -> Any:
    from rich.console import Console

    console = Console(stderr=True)

    def say(text: Any) -> None:
        if active:
            console.print(text, highlight=False)

    return say


def _resume_from(config: Config, run_dir: Path, say: Any) -> Path | None:
    if config.run.resume is None:
        if checkpoint.checkpoints(run_dir):
            raise ConfigError(
                "holds checkpoints of an earlier run",
                where=str(run_dir),
                remedy="set run.resume=auto to continue it, or another run.dir",
            )
        return None
    if config.run.resume == "auto":
        found = checkpoint.newest(run_dir, warn=say)
        if found is None and checkpoint.checkpoints(run_dir):
            problem = "none of its checkpoints is whole"
            raise CheckpointError(problem, where=str(run_dir), remedy="remove them to start anew")
        return found
    return checkpoint.find(config.run.resume, warn=say)


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot be made: {error.strerror}", where=f"run.dir: {run_dir}", remedy="set run.dir to another folder"
        ) from error


def _image_loader(vlm: VLM, config: Config) -> Any:
    if vlm.vision is None or config.model.vision is None:
        return None
    return partial(_load_image, checkpoint.image_preparation(vlm, config.model.vision.fit))


def _load_image(preparation: dict[str, Any], image: Image, where: str) -> torch.Tensor:
    p = preparation
    return fit(
        load_rgb(image, where=where),
        tuple(p["size"]),
        mode=p["mode"],
        interpolation=p["interpolation"],
        fill=tuple(p["fill"]),
    )


def _read_data(
    config: Config, vlm: VLM, tokenizer: Any, chat: ChatFormat, *, run_dir: Path, world: _World, say: Any
) -> tuple[InstructionData, Scan]:
    """Open, measure and judge the records; each rank measures for itself, the result is the same."""
    options = config.data
    if options.max_length > options.pack_tokens:
        raise ConfigError(
            f"max_length={options.max_length} is more than pack_tokens={options.pack_tokens}: a record may not fit",
            where="data",
            remedy="raise data.pack_tokens or lower data.max_length",
        )
    limit = context_length(vlm.llm)
    if limit is not None and options.max_length > limit:
        raise ConfigError(
            f"max_length={options.max_length} is more than the {limit} tokens the LLM was built for",
            where="data.max_length",
            remedy=f"set data.max_length={limit} or less",
        )
    unreadable: list[RecordError] = []
    skip = config.run.on_bad_record == "skip"
    sources = []
    if world.rank != 0:  # rank 0 converts foreign formats first, the others then find the result
        world.barrier()
    for i, s in enumerate(options.train):
        with located(f"data.train.{i}"):
            source = open_source(
                s.path,
                format=s.format,
                image_root=s.image_root,
                name=s.name,
                limit=s.limit,
                cache=run_dir / "data",
                on_bad=unreadable.append if skip else None,
            )
        sources.append(source)
    if world.rank == 0:
        world.barrier()
    data = InstructionData(
        sources,
        partial(_encode, chat, tokenizer),
        image_tokens=vlm.image_tokens,
        max_length=options.max_length,
        capacity=options.pack_tokens,
        split_turns=options.split_turns,
        share_prefix=options.share_prefix and options.packing,
    )
    scan = data.scan(workers=options.workers)
    scan.bad = unreadable + scan.bad
    _judge(config, scan, run_dir, main=world.rank == 0, say=say)
    return data, scan


def _encode(chat: ChatFormat, tokenizer: Any, turns: Any) -> Any:
    return encode(turns, chat, tokenizer)


def _judge(config: Config, scan: Scan, run_dir: Path, *, main: bool, say: Any) -> None:
    """Apply the stated policy to bad records; all of them are listed in `bad_records.jsonl`."""
    if main and scan.bad:
        run_dir.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"where": e.where, "problem": e.problem, "remedy": e.remedy}) for e in scan.bad]
        (run_dir / "bad_records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if scan.bad and config.run.on_bad_record == "error":
        first = scan.bad[0]
        listed = f" (the first of {len(scan.bad)} bad records, listed in {run_dir / 'bad_records.jsonl'})"
        more = listed if len(scan.bad) > 1 else ""
        raise type(first)(first.problem + more, where=first.where, remedy=first.remedy)
    allowed = config.run.max_bad_fraction * max(scan.records, 1)
    if len(scan.bad) > allowed:
        raise RecordError(
            f"{len(scan.bad)} of {scan.records} records are bad, more than run.max_bad_fraction="
            f"{config.run.max_bad_fraction:g} allows; the first: {scan.bad[0]}",
            where=str(run_dir / "bad_records.jsonl"),
            remedy="mend the data, or raise run.max_bad_fraction",
        )
    if scan.bad:
        say(f"{len(scan.bad)} bad records are left out, listed in {run_dir / 'bad_records.jsonl'}")
    if not len(scan.length):
        raise RecordError("no usable record is left", where="data.train", remedy="check the files and formats")


def _walk(config: Config, data: InstructionData, scan: Scan) -> Walk:
    sizes = [int((scan.source == i).sum()) for i in range(len(data.sources))]
    weights = [s.weight for s in config.data.train]

    def rows_of(epoch: int) -> list[list[int]]:
        order = epoch_order(sizes, weights, seed=config.run.seed, epoch=epoch)
        if not config.data.packing:
            return [[int(u)] for u in order]
        return plan_rows(scan.length, capacity=config.data.pack_tokens, order=order, shared=scan.shared)

    t = config.train
    return Walk(rows_of, rows_per_step=t.rows_per_step, epochs=t.epochs, steps=t.steps)


def _cache_features(
    config: Config, vlm: VLM, images: dict[Any, Image], load_image: Any, *, run_dir: Path, say: Any
) -> FeatureCache | None:
    vision = config.model.vision
    if vision is None or vision.cache == "off" or vlm.vision is None or not images:
        return None
    if config.tune.vision.mode != "frozen":
        raise ConfigError(
            "features of a tower that is trained cannot be cached",
            where="model.vision.cache",
            remedy="set model.vision.cache=off or tune.vision.mode=frozen",
        )
    say(f"computing features of {len(images)} pictures once")
    return compute_features(
        vlm.vision,
        images,
        load_image,
        kind=vision.cache,
        folder=run_dir / "cache",
        preparation=checkpoint.image_preparation(vlm, vision.fit),
    )


def _align(
    config: Config, vlm: VLM, tokenizer: Any, load_image: Any, features: FeatureCache | None, *, run_dir: Path, say: Any
) -> None:
    """Word alignment of the projector (see train/align.py)."""
    assert config.align is not None
    if vlm.projector is None or vlm.vision is None:
        raise ConfigError("there is no projector to align", where="align", remedy="set model.vision, or align=null")
    options = config.align
    with located("align.captions"):
        source = open_source(options.captions, cache=run_dir / "data")
    records = [source[i] for i in range(len(source))]
    for record in records:
        if len(record.images) != 1 or record.turns[-1].role != "assistant":
            raise RecordError(
                "is not a caption (one image, one answer)", where=record.where, remedy="check align.captions"
            )
    words = [tokenizer(" " + r.turns[-1].text, add_special_tokens=False)["input_ids"] for r in records]
    keys = [image_key(r.images[0]) for r in records]
    if features is None or any(k not in features for k in keys):
        features = compute_features(
            vlm.vision,
            {k: r.images[0] for k, r in zip(keys, records, strict=True)},
            load_image,
            kind="memory",
            folder=run_dir / "cache",
            preparation={},
        )
    loss = align_words(
        vlm.projector,
        features.get(keys),
        words,
        vlm.word_embeddings.detach(),
        epochs=options.epochs,
        lr=options.lr,
        seed=config.run.seed,
    )
    say(f"word alignment: {len(records)} captions, {options.epochs} epochs, loss {loss:.3f}")


def _engine(config: Config, vlm: VLM, groups: Any, *, world: _World) -> Engine:
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
        vlm.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not world.deepspeed:
        return TorchEngine(vlm, groups, **common)
    return DeepSpeedEngine(vlm, groups, config=_deepspeed_json(config.engine.deepspeed), **common)


def _deepspeed_json(name: str) -> dict[str, Any]:
    folder = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
    path = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"no DeepSpeed config '{name}'",
            where="engine.deepspeed",
            remedy="use zero0 ... zero3, or the path of a JSON",
        ) from None
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", where=str(path), remedy="mend the file") from None


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
    load_image: Any,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches from step `start` on."""
    units: list[list[int]] = []
    for step in range(start, walk.steps):
        micros = walk.micro_positions(
            step, rank=engine.rank, world=engine.world, micro_rows=config.train.micro_rows
        )
        for positions in micros:
            rows = [walk.row(p) for p in positions]
            units.append([u for row in rows if row for u in row])
    return micro_batches(
        data,
        scan,
        units,
        load_image=load_image,
        skip_bad=config.run.on_bad_record == "skip",
        workers=config.data.workers,
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
    engine: Engine,
    run_dir: Path,
    scan: Scan,
    log: RunLog,
    progress: Progress,
) -> None:
    """Write checkpoints/step-N and remove those beyond `keep_last`."""
    folder = run_dir / "checkpoints" / f"step-{progress.step:06d}"

    def fill(draft: Path) -> None:
        trainer = draft / "trainer"
        trained = [p for p in vlm.parameters() if p.requires_grad]
        with engine.whole(trained):
            if engine.rank == 0:
                checkpoint.write_model(draft, vlm, config=config, tokenizer=tokenizer, chat=chat, step=progress.step)
                trainer.mkdir()
                state = {**asdict(progress), "seed": config.run.seed, "world": engine.world, "units": len(scan.length)}
                (trainer / "progress.json").write_text(json.dumps(state, indent=1))
        engine.barrier()
        engine.save_state(trainer)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        save_file(rng, trainer / f"rng-{engine.rank}.safetensors")

    checkpoint.write_folder(folder, fill, main=engine.rank == 0, barrier=engine.barrier)
    if engine.rank == 0:
        for old in checkpoint.checkpoints(run_dir)[: -config.train.keep_last]:
            shutil.rmtree(old)
    log.say(f"saved {folder}")


def _restore(engine: Engine, folder: Path | None, *, scan: Scan, seed: int) -> Progress:
    """Bring the optimizer, the random state and the position back."""
    if folder is None:
        torch.manual_seed(seed + 1000 * engine.rank)
        return Progress()
    trainer = folder / "trainer"
    try:
        saved = json.loads((trainer / "progress.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            "holds a model but no trainer state", where=str(folder), remedy="start from its weights with run.init_from"
        ) from None
    for key, now in (("seed", seed), ("units", len(scan.length))):
        if saved.pop(key) != now:
            raise CheckpointError(
                f"was made with other data or another seed ({key} differs), so the data order cannot be continued",
                where=str(folder),
                remedy="resume with the config and data it was made with, or use run.init_from",
            )
    saved.pop("world")
    engine.load_state(trainer)
    rng = trainer / f"rng-{engine.rank}.safetensors"
    if rng.exists():
        state = load_file(rng)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    return Progress(**saved)


def _note_bad(run_dir: Path, rank: int, error: RecordError) -> None:
    name = "bad_records.jsonl" if rank == 0 else f"bad_records-{rank}.jsonl"
    with open(run_dir / name, "a", encoding="utf-8") as file:
        file.write(json.dumps({"where": error.where, "problem": error.problem, "remedy": error.remedy}) + "\n")


@contextmanager
def _signals() -> Iterator[Any]:
    """Turn SIGTERM and SIGINT into a request that the loop answers after the current step."""
    asked = {"stop": False}

    def ask(signum: int, frame: Any) -> None:
        asked["stop"] = True

    old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked["stop"]
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _echo(
    config: Config, vlm: VLM, data: InstructionData, scan: Scan, walk: Walk, *, tokenizer: Any, say: Any
) -> None:
    """Say what is about to happen: counts, trainable parameters, one example with its mask."""
    from rich.table import Table

    tokens = int(scan.length.sum())
    say(
        f"{scan.records - len(scan.bad)} records of {len(data.sources)} sources, {len(scan.images)} pictures, "
        f"{tokens} tokens, {scan.supervised} supervised; {walk.steps} steps of {config.train.rows_per_step} rows of "
        f"{config.data.pack_tokens} tokens"
    )
    table = Table("component", "parameters", "trained", "share", "dtype", "lr")
    for row in parameter_table(vlm):
        lr = getattr(config.tune, row["component"]).lr
        table.add_row(
            row["component"],
            f"{row['total']:,}",
            f"{row['trained']:,}",
            f"{100 * row['trained'] / max(row['total'], 1):.2f} %",
            row["dtype"],
            f"{lr:g}" if lr is not None and row["trained"] else "-",
        )
    say(table)
    record = data.record(int(scan.record[0]))
    turns = split_pairs(record)[0] if data.split_turns else record.turns
    say(to_rich(data.encode(turns), tokenizer, image_tokens=vlm.image_tokens))
