"""Is it the same run? What a resumed run may change, and what it may not.

Owns the role of every config key on resume, and the facts about contents that are kept in a checkpoint beside its data
order: of each source, of the vision encoder, of the LLM's base weights, of a user's own code. A run that goes on with
other contents or another setting that decides its result is refused with both values, since its curve would look like
one run and be two. What changes nothing but speed, rounding, files or measurements is allowed, and each such change
is said.

Takes flat configs and plain facts. Contents are compared, never paths: data and models may be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmit.data.shards.reader import ShardSource
from mmit.data.store import Store, digest
from mmit.errors import CheckpointError
from mmit.models.files import resolve_file
from mmit.models.hub import is_hub_id
from mmit.plugins import is_spec, source_hash
from mmit.yamlio import flatten, inline_yaml

if TYPE_CHECKING:
    from mmit.data.dataset import InstructionData
    from mmit.data.measure import Measurements
    from mmit.models.vision import VisionTower

Say = Callable[[str], None]
Role = Literal["decides", "length", "content", "past", "rounding", "free", "silent"]

# The role of each key; the first pattern that fits a key counts. One that fits none counts as deciding, and a test
# fails until it stands here.
#   decides   another value is another run
#   length    decides too, through the learning rate's course; free where that course has no end
#   content   a name or a path: what it leads to is compared instead
#   past      had its effect before the first step
#   rounding  the same computation, in another order or format of the machine
#   free      changes no weight
#   silent    says itself that this is another start
# fmt: off
ROLES: dict[str, Role] = {
    **dict.fromkeys(("run.dir", "run.resume"), "silent"),
    **dict.fromkeys(("run.init_from", "align", "align.*"), "past"),
    **dict.fromkeys(("train.epochs", "train.steps"), "length"),
    **dict.fromkeys(
        (
            "model.vision.name", "model.vision.weights", "model.vision.towers.*.name", "model.vision.towers.*.weights",
            "model.llm.name", "model.llm.revision", "model.chat.*",
            "data.train.*.path", "data.train.*.format", "data.train.*.image_root", "data.train.*.options*",
            "data.max_length",  # it only says which records are too long
            "data.packing",  # what auto or a word comes to is part of the data order, which is compared
        ),
        "content",
    ),
    **dict.fromkeys(
        (
            "run.on_bad_record", "run.max_bad_fraction", "run.stall_seconds", "model.vision.cache",
            "model.vision.cache_dir", "export*",
            "data.train.*.name", "data.eval*", "data.workers", "data.prefetch_mb", "data.cache_dir",
            "train.save_every", "train.keep_last", "train.keep_best*", "train.save_in_background",
            "train.eval_every", "train.eval_tasks*",
            "train.eval_questions", "train.log_every", "train.report_to*", "train.spike_sigma", "train.spike_window",
        ),
        "free",
    ),
    **dict.fromkeys(
        (
            "train.micro_rows", "train.checkpointing", "train.compile", "train.deterministic", "train.threads",
            "engine.kind", "engine.deepspeed", "device",
        ),
        "rounding",
    ),
    **dict.fromkeys(
        (
            "run.seed",
            "model.vision", "model.vision.towers", "model.vision.towers.*.kind", "model.vision.towers.*.layer",
            "model.vision.towers.*.image_size*", "model.vision.towers.*.key_order",
            "model.vision.kind", "model.vision.layer", "model.vision.select",
            "model.vision.image_size*", "model.vision.native*", "model.vision.fit", "model.vision.tiles*",
            "model.vision.key_order", "model.vision.dtype", "model.projector.kind", "model.projector.options*",
            "model.llm.dtype", "model.llm.random_init*", "model.llm.attention_dropout",
            "tune.*.mode", "tune.*.lr", "tune.*.options*",
            "data.train", "data.train.*.weight", "data.train.*.limit",
            "data.mixing.scheme", "data.mixing.cap", "data.mixing.temperature",
            "data.loss.*", "data.split_turns", "data.pack_tokens", "data.group", "data.share_prefix",
            "data.shuffle", "data.shuffle_window",
            "train.rows_per_step", "train.schedule", "train.warmup", "train.min_lr_ratio", "train.weight_decay",
            "train.betas*", "train.eps", "train.clip", "train.precision", "train.router_loss", "train.objective.*",
        ),
        "decides",
    ),
}
# fmt: on
RESOLVED = ("train.precision", "data.packing")
SAID = {
    "content": "",
    "past": "; it had its effect before the first step and has none now",
    "rounding": "; rounding, and the random numbers of dropout, may differ from here on",
    "free": "",
}
REMEDY = "set it back, or start another run from these weights: run.init_from={folder} and a new run.dir"


def role(key: str) -> Role | None:
    """The role of a dotted key on resume, None for one that the table does not know."""
    return next((found for pattern, found in ROLES.items() if fnmatchcase(key, pattern)), None)


def check_config(then: Mapping[str, Any], now: Mapping[str, Any], *, folder: Path, say: Say) -> None:
    """Compare the flat config of a checkpoint with that of the run which goes on from it.

    Args:
        then, now: {dotted key: value}, of which neither need have all.
        folder: the checkpoint, for messages.
        say: gets every change that is allowed, with what it means.

    Raises:
        CheckpointError: naming every key that decides the result, with both values.
    """
    changed = [key for key in dict.fromkeys([*then, *now]) if _value(then, key) != _value(now, key)]
    # A checkpoint's config holds what `auto` came to; where that is another thing now, the data order differs.
    changed = [key for key in changed if not (key in RESOLVED and now.get(key) == "auto")]
    # The model may have switched it off, as it will again; where it does not, the data order differs.
    changed = [key for key in changed if key != "data.share_prefix" or then.get(key) or not now.get(key)]
    # An empty list or mapping is a leaf of its own in a flat config: what is below it says more.
    changed = [key for key in changed if not any(other.startswith(f"{key}.") for other in changed)]
    refused = []
    for key in changed:
        told = f"{key} was {_shown(then, key)} and is {_shown(now, key)}"
        kind = role(key) or "decides"
        if kind == "decides" or (kind == "length" and not _endless(then, now)):
            refused.append(told)
        elif kind != "silent":
            say(f"resume: {told}{SAID.get(kind, '')}")
    if refused:
        ends = any(role(told.split(" ")[0]) == "length" for told in refused)
        why = " (a longer run has another course of the learning rate)" if ends else ""
        raise CheckpointError(
            f"this would be another run: {'; '.join(refused)}{why}",
            where=f"run.resume: {folder}",
            remedy=REMEDY.format(folder=folder),
        )


def _value(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return list(value) if isinstance(value, tuple) else value


def _shown(config: Mapping[str, Any], key: str) -> str:
    return inline_yaml(_value(config, key)) if key in config else "not given"


def _endless(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a step does not depend on how many steps there are."""
    ends = [(c["train.schedule"], 0 < c["train.warmup"] < 1) for c in (then, now)]
    return all(schedule == "constant" and not share for schedule, share in ends)


def contents(data: InstructionData, scan: Measurements) -> list[dict[str, str]]:
    """What is learned from each source: {"path", "content"}."""
    found = []
    for source, learned in zip(data.sources, scan.contents, strict=True):
        whole = getattr(source, "whole", source)
        # The pictures of shards: the index has a checksum of each member, which is verified whenever one is read.
        index = whole.index.header["fingerprint"] if isinstance(whole, ShardSource) else ""
        found.append({"path": str(source.origin), "content": f"{learned}{index}"})
    return found


def tower_content(tower: VisionTower | None) -> str | None:
    """Hash of the weights and constants of a vision encoder as loaded, wherever they came from."""
    return None if tower is None else tower.fingerprint()[:32]


def code_content(named: Mapping[str, object]) -> dict[str, str]:
    """Hash of the code behind each own part of a config: {config key: its value}. Raises ConfigError: there is none."""
    return {key: source_hash(str(spec), where=key) for key, spec in named.items() if is_spec(spec)}


def base_content(name: str, *, commit: str | None, unused: bool, store: Store) -> dict[str, Any]:
    """What the base weights of an LLM are.

    Args:
        name: as in the config. commit: of the hub, where it came from there.
        unused: they are drawn by the seed, or every checkpoint holds the tuned ones.
        store: remembers the hashes of large files, which are read once and then known by size, time and inode.

    Returns:
        {"files": {name: hash}}, {"commit": ...}, or {} where nothing can be said.
    """
    if unused:
        return {}
    if name.startswith("package:") or name.endswith(".gguf"):
        path = resolve_file(name)
        return {"files": {path.name: digest(path, store)}}
    folder = Path(name).expanduser()
    if folder.is_dir():
        wanted = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
        return {"files": {p.name: digest(p, store) for p in wanted}}
    return {"commit": commit} if commit is not None and is_hub_id(name) else {}


def check_contents(
    then: Mapping[str, Any] | None, now: Mapping[str, Any], *, folder: Path, whole: Sequence[str] = (), say: Say
) -> None:
    """Compare the facts of a checkpoint with those of the run which goes on from it.

    Args:
        then, now: {"sources": [...], "vision": ..., "llm": {...}, "chat": {...}, "code": {...}, "deepspeed": {...}};
            None for a checkpoint of a version that kept none.
        whole: parts ("vision", "llm") that the checkpoint holds whole, so that nothing of their base is used.

    Raises:
        CheckpointError: naming what differs.
    """
    if then is None:
        say(
            "resume: this checkpoint keeps no fingerprints, so whether data, vision encoder and base weights are those "
            "of its run cannot be told"
        )
        return
    problems = [*_other_chat(then, now), *_other_sources(then["sources"], now["sources"]), *_other_code(then, now)]
    for part, name in (("vision", "vision encoder"), ("llm", "language model")):
        # Held whole, it is read from the checkpoint: what lies under the old path now makes no difference.
        if part not in whole:
            problems += _other_part(then[part], now[part], name=name, say=say)
    if problems:
        raise CheckpointError(
            f"this would be another run: {'; '.join(problems)}",
            where=f"run.resume: {folder}",
            remedy=REMEDY.format(folder=folder).replace("set it back", "bring back what the run began with"),
        )
    _say_deepspeed(then.get("deepspeed"), now.get("deepspeed"), say)


def _say_deepspeed(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None, say: Say) -> None:
    """What differs in a DeepSpeed JSON of the same name; that of another name is said as the setting it is."""
    if then is None or now is None or then["name"] != now["name"]:
        return
    old, new = (dict(flatten(found["options"])) for found in (then, now))
    for key in (k for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)):
        told = f"{key} was {_shown(old, key)} and is {_shown(new, key)}"
        say(f"resume: engine.deepspeed ({now['name']}): {told}{SAID['rounding']}")


def _other_code(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Of a user's own parts; a checkpoint of an earlier version keeps none of it. Another spec is another setting."""
    old, new = then.get("code", {}), now.get("code", {})
    return [
        f"the code behind {key} has changed (fingerprint {_short(old[key])} then, {_short(new[key])} now)"
        for key in old
        if key in new and old[key] != new[key]
    ]


def _other_chat(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if then["chat"] == now["chat"]:
        return []
    keys = [k for k in dict.fromkeys([*then["chat"], *now["chat"]]) if then["chat"].get(k) != now["chat"].get(k)]
    return [f"the chat format is another one ({', '.join(keys)} of it)"]


def _other_sources(then: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> list[str]:
    problems = []
    # By position. Sources that were added or taken away are settings (data.train), which `check_config` compares.
    for n, (old, new) in enumerate(zip(then, now, strict=False)):
        if old["content"] != new["content"]:
            place = new["path"] if old["path"] == new["path"] else f"{old['path']} then, {new['path']} now"
            problems.append(
                f"what is learned from data.train.{n} ({place}) has changed: other records, pictures or order, another "
                f"tokenizer, or another conversion (fingerprint {old['content'][:12]} then, {new['content'][:12]} now)"
            )
    return problems


def _other_part(then: Any, now: Any, *, name: str, say: Say) -> list[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        kinds = [k for k in ("files", "commit") if k in then and k in now]
        if not kinds:
            if then != now:
                say(f"resume: whether the {name}'s weights are those of the run cannot be told: {then} then, {now} now")
            return []
        then, now = then[kinds[0]], now[kinds[0]]
    if then == now:
        return []
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        files = [k for k in dict.fromkeys([*then, *now]) if then.get(k) != now.get(k)]
        values = "; ".join(f"{k} {_short(then.get(k))} then, {_short(now.get(k))} now" for k in files[:2])
        return [f"the {name} is another one ({values})"]
    return [f"the {name} is another one (fingerprint {_short(then)} then, {_short(now)} now)"]


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:12]
