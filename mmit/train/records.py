"""The records of a run, from its config to micro-batches: opened, measured, put in order, fed to the loop.

`parts.py` makes the model that they are encoded for, and `run.py` calls both in order. Rank 0 measures and hashes, and
the other ranks read what it kept. Refuses records under the policy for bad ones, and a checkpoint of other contents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmit.data.formats.keys import told
from mmit.data.store import Store
from mmit.models.llm import context_length
from mmit.models.planning import row_planner
from mmit.models.tuning import method_of
from mmit.models.virtual import virtual_tokens
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint import resume
from mmit.train.checks import identity
from mmit.train.data.batches import TrainData
from mmit.train.data.order import Ordering, make_row_order, row_order_of, unit_costs
from mmit.train.data.setup import BadRecordPolicy, cache_folder, check_lengths, image_loader, measure, most_bad
from mmit.train.engines.zero import deepspeed_options
from mmit.train.reference import References
from mmit.train.resolve import objective_of, open_records

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.dataset import InstructionData
    from mmit.data.measure import Measurements
    from mmit.data.row_order import RowOrder
    from mmit.errors import RecordError
    from mmit.train.engines.base import Engine
    from mmit.train.engines.world import World
    from mmit.train.features import FeatureCache
    from mmit.train.objective import Preference
    from mmit.train.parts import Model, Start


@dataclass
class Records:
    """The records of a run: opened, measured, and in the order of their rows."""

    train: InstructionData
    scan: Measurements
    row_order: RowOrder
    order: dict[str, Any]  # what decides the order, kept in checkpoints
    eval: tuple[InstructionData, Measurements] | None  # held out


def read_records(start: Start, model: Model) -> Records:
    """Open and measure the records, leave out or refuse bad ones, and put the rows in order."""
    start.heart.phase("measuring the data", 0)
    data, scan = _read_data(start, model, "train")
    if scan.thoughts:
        model.loaded.chat.thinks = True  # in the checkpoint's format too: whether to think is left to the model
    row_order, order = _order(start, model, data, scan)
    return Records(data, scan, row_order, order, _read_data(start, model, "eval") if model.config.data.eval else None)


@dataclass(frozen=True)
class Feeds:
    """The records as the loop sees them: those of training, and those that are held out."""

    train: TrainData
    eval: TrainData | None
    references: References | None  # of a method that compares answers; kept in checkpoints

    def preference(self, part: str) -> Preference | None:
        """The comparing method on the records of "train" or "eval"."""
        return self.references.at_work(part) if self.references is not None else None


def feed(start: Start, model: Model, records: Records, *, engine: Engine, features: FeatureCache | None) -> Feeds:
    """Micro-batches of the records, and the reference that a comparing method measures on them once.

    Args:
        start: of the run. model: loaded and tuned. records: read and measured.
        engine: runs the reference. features: of training's images, None to run the tower each time.
    """
    config, world = model.config, start.world
    given: dict[str, Any] = {"load_image": image_loader(model.preparation) if model.preparation else None}
    given["plan_row"] = row_planner(model.vlm)
    # Features are those of training's images; held-out ones go through the tower each time.
    held_out = _each_once(config, *records.eval, world=world, **given) if records.eval else None
    given["features"] = features
    references, method = None, objective_of(config)
    if method.compares:
        start.heart.phase("measuring the reference", 0)
        data = {"train": _each_once(config, records.train, records.scan, world=world, **given), "eval": held_out}
        references = References.of(method, engine, data, vlm=model.vlm, begin=start.begin, say=start.say)
    train = train_data(config, records.train, records.scan, records.row_order, world=world, **given)
    return Feeds(train, held_out, references)


def _read_data(start: Start, model: Model, part: Literal["train", "eval"]) -> tuple[InstructionData, Measurements]:
    """Open and measure the records, and apply the policy for bad ones. Rank 0 measures; all read what it kept.

    Nodes that do not see its files measure for themselves, one rank of each.
    """
    config, world, run_dir = model.config, start.world, start.run_dir
    options, policy = config.data, BadRecordPolicy(config.run.on_bad_record == "skip", config.run.max_bad_fraction)
    check_lengths(
        max_length=options.max_length,
        capacity=options.pack_tokens,
        limit=context_length(model.vlm.llm),
        virtual=virtual_tokens(model.vlm.llm),
    )
    cache = cache_folder(options.cache_dir, run_dir=run_dir)
    tell = start.say if world.main else lambda text: None
    unreadable: list[RecordError] = []
    found: list[Any] = []

    def work(alive: Callable[[], None]) -> None:
        on_bad = unreadable.append if policy.skip else None
        reading: dict[str, Any] = {"preparation": model.preparation, "cache": cache, "on_bad": on_bad, "say": tell}
        data = open_records(config, part, model.loaded.chat, model.loaded.tokenizer, **reading)
        found[:] = [data, measure(data, store=Store(cache, tell), shown=world.main, alive=alive)]

    # First the main rank, then one of each other node, then the rest: each finds what an earlier one kept, where their
    # nodes share the folder, and otherwise measures.
    for mine in (world.main, world.keeper and not world.main, not (world.keeper or world.main)):
        world.turn(work, mine=mine, also=start.heart.work)
    data, scan = found
    for source, kept in zip(data.sources, scan.kept, strict=True):
        if kept and world.main:
            start.say(f"{source.origin}: kept in meta only: {told(kept)}")
    scan.bad = unreadable + scan.bad
    policy.apply(scan, run_dir=run_dir, main=world.main, say=start.say, part=part)
    return data, scan


def _order(start: Start, model: Model, data: InstructionData, scan: Measurements) -> tuple[RowOrder, dict[str, Any]]:
    """The rows in their order, and what decides it; refuses to continue a checkpoint with other contents."""
    config, world, begin = model.config, start.world, start.begin
    known = resume.order_of(begin)
    # Rank 0 alone reads and hashes the base; the others learn of a refusal at the end of the block.
    store = Store(cache_folder(config.data.cache_dir, run_dir=start.run_dir))
    same: dict[str, Any] | None = None
    with world.together():
        if world.main:
            same = _contents(model, data, scan, store=store, deepspeed=world.deepspeed)
            if begin is not None and known is not None:
                held = {"llm": begin / "llm", "vision": begin / "vision.safetensors"}
                whole = [part for part, path in held.items() if path.exists()]
                identity.check_contents(known.get("content"), same, folder=begin, whole=whole, say=start.say)
    # Why twice: the first call plans all rows, which takes a while for millions of records, and keeps their number in
    # the store. Rank 0 does so alone, kept alive by `first`; the others then read it there.
    if world.size > 1:
        world.first(lambda alive: _plan_rows(config, scan, known, store))
    costs = unit_costs(model.vlm, scan, cached=is_cached(config)) if world.size > 1 else None
    row_order, order = row_order_of(config, scan, costs=costs, known=known, store=store)
    return row_order, order | {"content": same}


def _plan_rows(config: Config, scan: Measurements, known: dict[str, Any] | None, store: Store) -> None:
    row_order_of(config, scan, known=known, store=store)


def _contents(
    model: Model, data: InstructionData, scan: Measurements, *, store: Store, deepspeed: bool
) -> dict[str, Any]:
    """What this run learns from and builds on, by hashes: two runs with the same go on from each other."""
    config, llm, told = model.config, model.config.model.llm, model.loaded.chat.to_json()
    zero = config.engine.deepspeed
    commit = getattr(model.vlm.llm.config, "_commit_hash", None)
    # A language model that is tuned as a whole is in every checkpoint: nothing hangs on where it began.
    unused = llm.random_init is not None or method_of(config.tune.llm.mode).whole
    return {
        "sources": identity.contents(data, scan),
        "vision": model.tower,
        "llm": identity.base_content(llm.name, commit=commit, unused=unused, store=store),
        # `thinks` follows from the sources.
        "chat": {k: v for k, v in told.items() if k != "thinks" and (k != "name" or "template" not in told)},
        # Of a chat format and a data format the tokens tell.
        "code": identity.code_content(checkpoint.own_code(config, {})),
        "deepspeed": {"name": zero, "options": deepspeed_options(zero)} if deepspeed else None,
    }


def is_cached(config: Config) -> bool:
    """Whether features of images are computed once and kept."""
    return config.model.vision is not None and config.model.vision.cache != "off"


def train_data(
    config: Config, data: InstructionData, scan: Measurements, row_order: RowOrder, *, world: World, **feed: Any
) -> TrainData:
    """Micro-batches of records as a config has them.

    Args:
        config: of the run. data: its records. scan: what was measured of them. row_order: their rows.
        world: whose ranks share them.
        feed: further arguments of `TrainData`, and those that are others than the config's.
    """
    given: dict[str, Any] = {
        "micro_rows": config.train.micro_rows,
        "row_tokens": config.data.pack_tokens,
        "skip_bad": config.run.on_bad_record == "skip",
        "max_bad": most_bad(config.run.max_bad_fraction, scan.records),
        "workers": config.data.workers,
        "prefetch": config.data.prefetch_mb << 20,
    }
    place: dict[str, Any] = {"rank": world.rank, "world": world.size, "device": world.device}
    return TrainData(data, scan, row_order, **place, **(given | feed))


def _each_once(config: Config, data: InstructionData, scan: Measurements, *, world: World, **feed: Any) -> TrainData:
    """These records once each, in rows as in training; without `features` images go through the tower each time."""
    each = Ordering(
        [1.0] * len(data.sources),
        {"scheme": "weights"},
        seed=0,
        capacity=config.data.pack_tokens if config.data.packing else None,
        rows_per_step=world.size * config.train.micro_rows,
        epochs=1.0,
        steps=None,
        group=config.data.group,
    )
    return train_data(config, data, scan, make_row_order(scan, each)[0], world=world, **feed)
