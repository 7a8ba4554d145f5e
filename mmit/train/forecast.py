"""The dry run: what a run would take, from its config and its data, without weights.

In: a config. Out: a `Forecast` with steps, tokens, pictures, FLOPs by part, and memory per rank for each ZeRO stage.
The model is assembled empty; of large sources that no run has measured, an even sample of records stands for all.
Refuses what a run would refuse, in the same words.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmit import precision
from mmit.data.ahead import allowed_cores
from mmit.data.formats.keys import told
from mmit.data.loader import MicroBatch, micro_batches
from mmit.data.measure import Scan, is_kept
from mmit.data.preparation import ImagePreparation, prepare_images
from mmit.data.store import Store, borrowed
from mmit.errors import MmitError, RecordError, located
from mmit.models.assemble import assemble
from mmit.models.llm import DTYPES, context_length
from mmit.models.recompute import MODES
from mmit.models.rules import read_rules
from mmit.models.tuning import Group, apply_tuning, check_options, parameter_table, unquantised
from mmit.models.virtual import virtual_tokens
from mmit.train.chat import chat_of
from mmit.train.checkpoint import image_preparation
from mmit.train.cost import Bytes, RowFacts, count_pairs, measure_bytes, measure_rates
from mmit.train.data_setup import Say, cache_folder, check_lengths, judge, make_walk, open_data
from mmit.train.devices import find_device
from mmit.train.settle import settle_packing
from mmit.train.zero import bucket_size

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.dataset import InstructionData
    from mmit.data.walk import Walk
    from mmit.models.vlm import VLM

SAMPLE = 2000  # records measured; more are told from them
MICROS = 16  # micro-batches that are built, evenly over the run
ALONE = "one device, or ZeRO-0"
ROOM = 0.9  # of a device's memory that a forecast may take


@dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    records: int
    measured: int  # of these records
    pictures: float  # distinct ones in the data
    tokens: float  # in an epoch's rows, shared beginnings once
    supervised: float
    steps: int
    epochs: float
    fill: float  # of the rows' capacity
    rows_per_step: int
    micro_batches: int  # per step and rank
    row: RowFacts  # mean micro-batch
    flops: dict[str, dict[str, float]]  # of a step over all ranks, by part
    once: float  # FLOPs of filling the feature cache
    parameters: list[dict[str, Any]]
    memory: Bytes
    ranks: int
    stages: dict[str, int]  # bytes per rank
    notes: tuple[str, ...] = ()  # what the model decides about the run

    @property
    def step_flops(self) -> float:
        """All of a step's FLOPs, recomputation too."""
        return sum(sum(kinds.values()) for kinds in self.flops.values())


def forecast(config: Config, *, ranks: int = 1, flash: bool = False, recompute: str | None = None) -> Forecast:
    """Forecast a run on `ranks` devices.

    Args:
        flash: the devices have fused attention (CUDA); False for CPUs.
        recompute: train.checkpointing where it is not the config's own.

    Raises:
        MmitError: whatever the run would be refused for; a configuration or tokenizer that cannot be reached.
    """
    check_options(config.tune.model_dump())
    config = planned(config, cuda=flash)
    notes: list[str] = []
    vlm, groups, tokenizer = empty_model(config, say=notes.append)
    config = settled(config, vlm, tokenizer, measure=False, say=notes.append)
    if read_rules(vlm.llm).experts:
        notes.append(
            "the memory of experts is forecast from above: as if each token had a copy of its experts' weights"
        )
    with borrowed(cache_folder(config.data.cache_dir, run_dir=Path(config.run.dir))) as cache:
        data, scan, share = _sample_data(config, vlm, tokenizer, cache=cache, say=notes.append)
        walk = walk_of(config, scan, store=Store(cache))[0]
        built = list(_micro_batches(config, data, scan, walk, ranks=ranks))
    mode = recompute or config.train.checkpointing
    mode = "none" if mode == "auto" else mode
    cached = config.model.vision is not None and config.model.vision.cache != "off"
    facts = [_facts(batch) for batch in built]
    mean = RowFacts(*np.mean([dataclasses.astuple(f) for f in facts], axis=0).tolist())
    table = parameter_table(vlm)
    rates = measure_rates(vlm)
    micros = -(-config.train.rows_per_step // (ranks * config.train.micro_rows))
    share_again = {"none": 0.0, "selective": 0.5, "full": 1.0}[mode]
    per_micro = rates.flops(mean, recompute=share_again, cached=cached)
    step = min(config.train.rows_per_step, walk.total_rows) / config.train.micro_rows
    pictures = scan.pictures * share
    rows = walk.total_rows / max(walk.epoch_at(walk.total_rows), 1e-9)  # in an epoch
    memory = _memory(config, vlm, groups, built, micros=micros, flash=flash, recompute=mode)
    return Forecast(
        records=len(data),
        measured=scan.records,
        pictures=pictures,
        tokens=rows * mean.tokens / config.train.micro_rows,
        supervised=scan.supervised * share,
        steps=walk.steps,
        epochs=walk.epoch_at(walk.total_rows),
        fill=mean.tokens / (config.train.micro_rows * config.data.pack_tokens),
        rows_per_step=config.train.rows_per_step,
        micro_batches=micros,
        row=mean,
        flops={part: {k: step * v for k, v in kinds.items()} for part, kinds in per_micro.items()},
        once=scan.crops * share * rates.tower.forward if cached else 0.0,
        parameters=table,
        memory=memory,
        ranks=ranks,
        stages=stages(memory, ranks=ranks, precision=config.train.precision),
        notes=tuple(notes),
    )


def least_recompute(config: Config, *, ranks: int, stage: int | None) -> tuple[str, str]:
    """The least activation checkpointing that fits the device this runs on, and why in words.

    Args:
        stage: of ZeRO, None without DeepSpeed.
    """
    device = find_device(None, kind=config.device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = device.memory if device.cuda else device.memory // ranks_here
    vlm, _, tokenizer = empty_model(config)
    config = settled(config, vlm, tokenizer, measure=False, say=lambda _: None)
    cache = cache_folder(config.data.cache_dir, run_dir=Path(config.run.dir))
    data, scan, _ = _sample_data(config, vlm, tokenizer, cache=cache)
    built = list(_micro_batches(config, data, scan, walk_of(config, scan, store=Store(cache))[0], ranks=ranks))
    micros = -(-config.train.rows_per_step // (ranks * config.train.micro_rows))
    tried = []
    for mode in MODES:
        vlm, groups, _ = empty_model(config)
        found = _memory(config, vlm, groups, built, micros=micros, flash=device.cuda, recompute=mode)
        sizes = stages(found, ranks=ranks, precision=config.train.precision)
        need = device.need(sizes[f"ZeRO-{stage}" if stage else ALONE])
        tried.append(f"{mode} {need / 2**30:.2f} GiB")
        if need <= ROOM * room:
            return mode, f"forecast {', '.join(tried)}; {device.name} has {room / 2**30:.1f} GiB for each rank"
    return mode, f"forecast {', '.join(tried)}, more than the {room / 2**30:.1f} GiB of {device.name}; this may not fit"


def planned(config: Config, *, cuda: bool) -> Config:
    """The config with the number format that `train.precision=auto` takes on the devices of a forecast.

    Args:
        cuda: they are GPUs, all of which mmit knows have bf16 units; else CPUs like this machine's.
    """
    if config.train.precision != "auto":
        return config
    name = "bf16" if cuda else precision.choose(torch.device("cpu")).name
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": name})})


def settled(config: Config, vlm: VLM, tokenizer: Any, *, measure: bool, say: Say) -> Config:
    """The config with what the model decides about its data, see `settle_packing`."""
    update = settle_packing(config.data.model_dump(), vlm, tokenizer, measure=measure, say=say)
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def with_whole_paths(config: Config) -> Config:
    """The config with local folders of models as absolute paths, which its checkpoints refer to from anywhere."""
    model = config.model
    changed: dict[str, Any] = {"llm": model.llm.model_copy(update={"name": _whole(model.llm.name)})}
    if model.vision is not None:
        changed["vision"] = model.vision.model_copy(update={"name": _whole(model.vision.name)})
    return config.model_copy(update={"model": model.model_copy(update=changed)})


def _whole(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name


def empty_model(config: Config, *, say: Say = lambda _: None) -> tuple[VLM, list[Group], Any]:
    """The composite of a config without weights, its tuning applied, and its tokenizer."""
    model = config.model.model_dump()
    dtype = DTYPES[config.train.precision]
    vlm, tokenizer = assemble(model, dtype=dtype, packed=config.data.packing is not False, empty=True)
    tune = config.tune.model_dump()
    if tune["llm"]["mode"] == "qlora":
        tune["llm"] = unquantised(tune["llm"])
    for plan in tune.values():  # starts that need the numbers in the weights have the shapes of the usual one
        if plan["options"].get("init") in ("pissa", "olora", "orthogonal"):
            plan["options"]["init"] = True
    groups = apply_tuning(vlm, tune, say=say)
    vlm.split()  # looks at shapes, as long as these are all there is
    vlm.train()
    return vlm, groups, tokenizer


def _sample_data(
    config: Config, vlm: VLM, tokenizer: Any, *, cache: Path, say: Say = lambda _: None
) -> tuple[InstructionData, Scan, float]:
    """Measure an even sample of the records, or read what a run found about all of them.

    `say` gets what a start would report of the data. Returns a scan as long as the whole data, and whole over sample.
    """
    options = config.data
    chat = chat_of(config.model.chat.model_dump(), tokenizer)
    check_lengths(
        max_length=options.max_length,
        capacity=options.pack_tokens,
        limit=context_length(vlm.llm),
        virtual=virtual_tokens(vlm.llm),
    )
    store = Store(cache)
    skip = config.run.on_bad_record == "skip"
    unreadable: list[RecordError] = []
    data = open_data(
        [s.model_dump() for s in options.train],
        chat,
        tokenizer,
        cache=cache,
        on_bad=unreadable.append if skip else None,
        preparation=_preparation(config, vlm),
        max_length=options.max_length,
        capacity=options.pack_tokens,
        split_turns=options.split_turns,
        share_prefix=options.share_prefix and options.packing is not False,
        loss=options.loss.model_dump(),
    )
    numbers: np.ndarray | None = None
    if len(data) > SAMPLE and not is_kept(data, store):
        numbers = np.unique(np.linspace(0, len(data) - 1, SAMPLE).astype(int))
    scan = data.scan(numbers=numbers, store=store, workers=allowed_cores())
    for source, kept in zip(data.sources, scan.kept, strict=True):
        if kept:
            some = "" if numbers is None or source.judged else f"of {len(numbers):,} records that were measured, "
            say(f"{source.origin}: {some}kept in meta only: {told(kept)}")
    if numbers is None:
        scan.bad = unreadable + scan.bad
        judge(scan, skip=skip, max_bad_fraction=config.run.max_bad_fraction, run_dir=None, main=True, say=say)
        return data, scan, 1.0
    if scan.bad and not skip:
        raise scan.bad[0]
    if not len(scan.length):
        raise MmitError("no usable record was found", where="data.train", remedy="check the files and formats")
    share = len(data) / len(numbers)
    wanted = round(len(scan.length) * share)
    # Every unit as often as the next; sources keep their order, which the walk relies on.
    pick = np.sort(np.resize(np.arange(len(scan.length)), wanted))
    for name in ("record", "first", "last", "length", "source"):
        setattr(scan, name, getattr(scan, name)[pick])
    return data, scan, share


def _preparation(config: Config, vlm: VLM) -> ImagePreparation | None:
    with located("model.vision"):
        image = image_preparation(vlm.vision, config.model.vision)
        return prepare_images(image, tokens=vlm.image_tokens, grid=vlm.image_grid)


def walk_of(
    config: Config,
    scan: Scan,
    *,
    known: dict[str, Any] | None = None,
    costs: Any = None,
    store: Store | None = None,
) -> tuple[Walk, dict[str, Any]]:
    """The rows of a run, forecast or real, and what decides their order; the rest: see `make_walk`."""
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
        group=config.data.group,
        known=known,
        costs=costs,
        store=store,
    )


def _micro_batches(
    config: Config, data: InstructionData, scan: Scan, walk: Walk, *, ranks: int
) -> Iterator[MicroBatch]:
    """Some micro-batches, evenly over the run, without pictures.

    Those of grouped records grow from the first in a step to the last, so their places are spread too: from the
    largest, which decides about memory, to the smallest.
    """
    t = config.train
    units: list[list[int]] = []
    short: list[list[int]] = []  # of a last step that has fewer rows
    steps = np.unique(np.linspace(0, walk.steps - 1, MICROS).astype(int)).tolist()
    micros = -(-t.rows_per_step // (ranks * t.micro_rows))
    grouped = config.data.group and not config.data.packing and t.micro_rows > 1
    last = ranks * micros - 1 if grouped else 0
    for step, place in zip(steps, np.linspace(last, 0, len(steps)).astype(int).tolist(), strict=True):
        micro, rank = divmod(place, ranks)
        positions = walk.micro_positions(step, rank=rank, world=ranks, micro_rows=t.micro_rows)[micro]
        rows = [walk.row(p) for p in positions]
        (units if rows and all(rows) else short).append([u for row in rows if row for u in row])
    skip = config.run.on_bad_record == "skip"
    yield from micro_batches(data, scan, units or short[:1], load_image=None, skip_bad=skip)


def _facts(batch: MicroBatch) -> RowFacts:
    return RowFacts(batch.tokens, batch.targets, _crops(batch), count_pairs(batch.tensors["nodes"]))


def _crops(batch: MicroBatch) -> int:
    """Pictures or crops of them that the tower sees: those whose tokens are spliced in."""
    index = batch.tensors["image_index"]
    return int(index.max()) // batch.tensors["image_tokens"] + 1 if len(index) else 0


def _memory(
    config: Config,
    vlm: VLM,
    groups: Sequence[Group],
    built: Sequence[MicroBatch],
    *,
    micros: int,
    flash: bool,
    recompute: str,
) -> Bytes:
    """Bytes of a step with the largest of the micro-batches."""
    cached = config.model.vision is not None and config.model.vision.cache != "off"
    longest = max(built, key=lambda b: (b.tokens, b.targets))
    most = max(built, key=lambda b: (_crops(b), b.targets))
    chosen = [longest] if longest is most else [longest, most]
    batches = [_with_pictures(batch, vlm, cached=cached) for batch in chosen]
    memory = measure_bytes(
        vlm, groups, batches, precision=config.train.precision, accumulate=micros > 1, flash=flash, recompute=recompute
    )
    if config.tune.llm.mode == "qlora":  # half a byte a weight, and a scale of 8 bits per 64 weights
        head = vlm.llm.get_output_embeddings()  # type: ignore[operator]
        linear = [m.weight for m in vlm.llm.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        frozen = [w for w in linear if not w.requires_grad]
        saved = sum(w.numel() * (w.element_size() - 0.516) for w in frozen)
        memory = dataclasses.replace(memory, llm=memory.llm - round(saved))
    return memory


def _with_pictures(batch: MicroBatch, vlm: VLM, *, cached: bool) -> Mapping[str, Any]:
    tensors, count = dict(batch.tensors), _crops(batch)
    if count and vlm.vision is not None:
        if cached:
            tensors["features"] = torch.zeros(count, vlm.vision.tokens, vlm.vision.dim, dtype=vlm.vision.dtype)
        else:
            tensors["pixels"] = torch.zeros(count, 3, *vlm.vision.image_size, dtype=torch.uint8)
    return tensors


def stages(memory: Bytes, *, ranks: int, precision: str) -> dict[str, int]:
    """Bytes per rank without DeepSpeed and under its ZeRO stages, as mmit/configs/deepspeed has them.

    ZeRO (arXiv:1910.02054): stage 1 partitions masters and moments, 2 gradients, 3 weights. DeepSpeed adds a bucket
    for gradients on their way (in float32 under stage 1), of the size that `zero.complete` fills in, and under stage 3
    up to 10^9 gathered weights. Its gradients are summed in float32.
    """
    bucket = bucket_size(memory.trained)
    element = 4 if precision == "fp32" else 2
    weights = memory.llm + memory.rest
    states = 12 * memory.trained  # masters and moments, which stages 1 to 3 keep in float32 whatever the precision
    gradients = 4 * memory.trained
    gathered = min(memory.llm, 1_050_000_000 * element)
    return {
        ALONE: memory.total,
        "ZeRO-1": weights + states // ranks + gradients + memory.single + 4 * bucket,
        "ZeRO-2": weights + (states + gradients) // ranks + memory.single + element * bucket,
        "ZeRO-3": memory.llm // ranks
        + memory.rest
        + gathered
        + (states + gradients) // ranks
        + memory.single
        + element * bucket,
    }
