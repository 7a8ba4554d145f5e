"""The memory that a step of a run will take, from its config and a sample of its data, without weights.

`train.checkpointing=auto` asks it before a run, and the dry run (`mmit.forecast`) reports it. Refuses what a run would
refuse, in the same words.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmit.data.formats.keys import told
from mmit.data.loader import MicroBatch, micro_batches
from mmit.data.measure import Measurements, is_kept
from mmit.data.prefetch import allowed_cores
from mmit.data.preparation import ImagePreparation, prepare_images
from mmit.data.store import Store
from mmit.errors import MmitError, RecordError, located
from mmit.models.assemble import assemble
from mmit.models.llm import DTYPES, context_length
from mmit.models.llm_layers import MODES
from mmit.models.tuning import Group, apply_tuning, method_of, unquantised
from mmit.models.virtual import virtual_tokens
from mmit.train.checkpoint.model import image_preparation
from mmit.train.data.order import row_order_of
from mmit.train.data.setup import BadRecordPolicy, Say, cache_folder, chat_of, check_lengths
from mmit.train.engines.zero import bucket_size
from mmit.train.memory.devices import find_device
from mmit.train.memory.step_bytes import Bytes, measure_bytes
from mmit.train.resolve import open_records, resolved

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.dataset import InstructionData
    from mmit.data.row_order import RowOrder
    from mmit.models.vlm import VLM

SAMPLE = 2000  # records measured; more are told from them
MICROS = 16  # micro-batches that are built, evenly over the run
ALONE = "one device, or ZeRO-0"
ROOM = 0.9  # of a device's memory that a forecast may take


def least_recompute(config: Config, *, ranks: int, stage: int | None) -> tuple[str, str]:
    """The least activation checkpointing that fits the device this runs on, and why in words.

    Args:
        stage: of ZeRO, None without DeepSpeed.
    """
    device = find_device(None, kind=config.device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = device.memory if device.cuda else device.memory // ranks_here
    vlm, _, tokenizer = empty_model(config)
    config = resolved(config, vlm, tokenizer, measure=False, say=lambda _: None)
    cache = cache_folder(config.data.cache_dir, run_dir=Path(config.run.dir))
    data, scan, _ = sample_data(config, vlm, tokenizer, cache=cache)
    built = list(
        sample_micro_batches(config, data, scan, row_order_of(config, scan, store=Store(cache))[0], ranks=ranks)
    )
    micros = -(-config.train.rows_per_step // (ranks * config.train.micro_rows))
    tried = []
    # From the cheapest in time to the one that saves most. Each on a model of its own: measuring makes it useless.
    for mode in MODES:
        vlm, groups, _ = empty_model(config)
        found = step_memory(config, vlm, groups, built, micros=micros, flash=device.cuda, recompute=mode)
        sizes = stages(found, ranks=ranks, precision=config.train.precision)
        need = device.need(sizes[f"ZeRO-{stage}" if stage else ALONE])
        tried.append(f"{mode} {need / 2**30:.2f} GiB")
        if need <= ROOM * room:
            return mode, f"forecast {', '.join(tried)}; {device.name} has {room / 2**30:.1f} GiB for each rank"
    return mode, f"forecast {', '.join(tried)}, more than the {room / 2**30:.1f} GiB of {device.name}; this may not fit"


def empty_model(config: Config, *, say: Say = lambda _: None) -> tuple[VLM, list[Group], Any]:
    """The composite of a config without weights, its tuning applied, and its tokenizer."""
    model = config.model.model_dump()
    dtype = DTYPES[config.train.precision]
    vlm, tokenizer = assemble(model, dtype=dtype, packed=config.data.packing is not False, empty=True)
    tune = config.tune.model_dump()
    tune["llm"] = unquantised(tune["llm"])
    for plan in tune.values():  # starts that need the numbers in the weights have the shapes of the usual one
        if plan["options"].get("init") in ("pissa", "olora", "orthogonal"):
            plan["options"]["init"] = True
    groups = apply_tuning(vlm, tune, say=say)
    vlm.split()  # looks at shapes, as long as these are all there is
    vlm.train()
    return vlm, groups, tokenizer


def sample_data(
    config: Config, vlm: VLM, tokenizer: Any, *, cache: Path, say: Say = lambda _: None
) -> tuple[InstructionData, Measurements, float]:
    """Measure an even sample of the records, or read what a run found about all of them.

    Args:
        vlm, tokenizer: of `empty_model`.
        cache: see `setup.cache_folder`.
        say: gets what a start would report of the data.

    Returns:
        the data, a scan as long as all of them, and how many records each measured one stands for.

    Raises:
        RecordError: as a run, of the records that were measured. MmitError: none can be used.
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
    policy = BadRecordPolicy(config.run.on_bad_record == "skip", config.run.max_bad_fraction)
    unreadable: list[RecordError] = []
    reading: dict[str, Any] = {"preparation": _preparation(config, vlm), "cache": cache}
    data = open_records(config, "train", chat, tokenizer, **reading, on_bad=unreadable.append if policy.skip else None)
    numbers: np.ndarray | None = None
    # Evenly over all sources, so that each is met; a run that measured everything before is asked instead.
    if len(data) > SAMPLE and not is_kept(data, store):
        numbers = np.unique(np.linspace(0, len(data) - 1, SAMPLE).astype(int))
    scan = data.scan(numbers=numbers, store=store, workers=allowed_cores())
    for source, kept in zip(data.sources, scan.kept, strict=True):
        if kept:
            some = "" if numbers is None or source.rows_checked else f"of {len(numbers):,} records that were measured, "
            say(f"{source.origin}: {some}kept in meta only: {told(kept)}")
    if numbers is None:
        scan.bad = unreadable + scan.bad
        policy.apply(scan, run_dir=None, main=True, say=say)
        return data, scan, 1.0
    if scan.bad and not policy.skip:
        raise scan.bad[0]
    if not len(scan.length):
        raise MmitError("no usable record was found", where="data.train", remedy="check the files and formats")
    share = len(data) / len(numbers)
    wanted = round(len(scan.length) * share)
    # Every unit as often as the next; sources keep their order, which the row_order relies on.
    pick = np.sort(np.resize(np.arange(len(scan.length)), wanted))
    for name in ("record", "first", "last", "length", "source"):
        setattr(scan, name, getattr(scan, name)[pick])
    return data, scan, share


def _preparation(config: Config, vlm: VLM) -> ImagePreparation | None:
    with located("model.vision"):
        image = image_preparation(vlm.vision, config.model.vision)
        return prepare_images(image, tokens=vlm.image_tokens, grid=vlm.image_grid)


def sample_micro_batches(
    config: Config, data: InstructionData, scan: Measurements, row_order: RowOrder, *, ranks: int
) -> Iterator[MicroBatch]:
    """Some micro-batches, evenly over the run, without pictures.

    Those of grouped records grow from the first in a step to the last, so their places are spread too: from the
    largest, which decides about memory, to the smallest.

    Args:
        config: of the run. data: its records. scan: what was measured of them. row_order: its rows.
        ranks: that the run would have.
    """
    t = config.train
    units: list[list[int]] = []
    short: list[list[int]] = []  # of a last step that has fewer rows
    steps = np.unique(np.linspace(0, row_order.steps - 1, MICROS).astype(int)).tolist()
    micros = -(-t.rows_per_step // (ranks * t.micro_rows))
    grouped = config.data.group and not config.data.packing and t.micro_rows > 1
    last = ranks * micros - 1 if grouped else 0
    for step, place in zip(steps, np.linspace(last, 0, len(steps)).astype(int).tolist(), strict=True):
        micro, rank = divmod(place, ranks)
        positions = row_order.micro_positions(step, rank=rank, world=ranks, micro_rows=t.micro_rows)[micro]
        rows = [row_order.row(p) for p in positions]
        (units if rows and all(rows) else short).append([u for row in rows if row for u in row])
    skip = config.run.on_bad_record == "skip"
    yield from micro_batches(data, scan, units or short[:1], load_image=None, skip_bad=skip)


def crops_of(batch: MicroBatch) -> int:
    """Pictures or crops of them that the tower sees: those whose tokens are spliced in."""
    index = batch.tensors["image_index"]
    return int(index.max()) // batch.tensors["image_tokens"] + 1 if len(index) else 0


def step_memory(
    config: Config,
    vlm: VLM,
    groups: Sequence[Group],
    built: Sequence[MicroBatch],
    *,
    micros: int,
    flash: bool,
    recompute: str,
) -> Bytes:
    """Bytes of a step with the largest of the micro-batches.

    Args:
        vlm, groups: of `empty_model`, of no use afterwards. built: micro-batches to choose from.
        micros: of a step on each rank. flash, recompute: see `measure_bytes`.
    """
    cached = config.model.vision is not None and config.model.vision.cache != "off"
    # Two candidates for the peak: tokens decide in the LLM, crops in the tower, and no row need have most of both.
    longest = max(built, key=lambda b: (b.tokens, b.targets))
    most = max(built, key=lambda b: (crops_of(b), b.targets))
    chosen = [longest] if longest is most else [longest, most]
    batches = [_with_pictures(batch, vlm, cached=cached) for batch in chosen]
    memory = measure_bytes(
        vlm, groups, batches, precision=config.train.precision, accumulate=micros > 1, flash=flash, recompute=recompute
    )
    if method_of(config.tune.llm.mode).four_bit:  # half a byte a weight, and a scale of 8 bits per 64 weights
        head = vlm.llm.get_output_embeddings()
        linear = [m.weight for m in vlm.llm.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        frozen = [w for w in linear if not w.requires_grad]
        saved = sum(w.numel() * (w.element_size() - 0.516) for w in frozen)
        memory = dataclasses.replace(memory, llm=memory.llm - round(saved))
    return memory


def _with_pictures(batch: MicroBatch, vlm: VLM, *, cached: bool) -> Mapping[str, Any]:
    tensors, count = dict(batch.tensors), crops_of(batch)
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
    # Of what stages divide, a rank keeps its share; what they do not, it holds whole.
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
