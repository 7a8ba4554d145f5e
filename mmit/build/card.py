"""The card of a data set for the hub: sources, licences, counts, recipe, limits.

Goes in: what was counted over the records (`mmit.data.stats`), the files, and build.json where a build wrote them.
Comes out: the text of README.md with the hub's front matter. Says of everything that is not known that it is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.build.licences import UNKNOWN, terms_of
from mmit.yamlio import dump_yaml

if TYPE_CHECKING:
    from mmit.data.stats import Stats

NOT_STATED = "not stated"
# The ids of https://huggingface.co/docs/hub/repositories-licenses that are SPDX names in small letters.
SAME = """apache-2.0 mit bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 isc ms-pl mpl-2.0 ofl-1.1 osl-3.0 postgresql afl-3.0 artistic-2.0 bsl-1.0
ncsa unlicense zlib""".split()
OTHER = {"odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl", UNKNOWN.lower(): "unknown"}
OTHER |= {f"{name}-{version}": name for name in ("agpl-3.0", "gpl-2.0", "gpl-3.0") for version in ("only", "or-later")}
OTHER |= {f"{name}-{version}": name for name in ("lgpl-2.1", "lgpl-3.0") for version in ("only", "or-later")}
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")  # borders of the hub's size categories


def data_card(stats: Stats, *, name: str, files: Mapping[str, Sequence[str]], build: Mapping[str, Any] | None) -> str:
    """Write the card.

    Args:
        stats: of the records.
        name: the data set's title.
        files: split -> paths of its files, from the folder that the card is for.
        build: what build.json holds, where `mmit build` wrote the files.
    """
    whole = stats.whole
    tasks = ["image-text-to-text"] * (whole.images > 0) + ["text-generation"] * (whole.text_only > 0)
    head: dict[str, Any] = {"pretty_name": name, "tags": ["mmit", "instruction-tuning"], "task_categories": tasks}
    head |= {"license": hub_licences(list(stats.licences)), "size_categories": [size_category(whole.records)]}
    splits = [{"split": split, "path": list(paths)} for split, paths in files.items()]
    head["configs"] = [{"config_name": "default", "data_files": splits}]
    told = (
        f"{whole.records:,} conversations, {whole.text_only:,} of them without images; {len(whole.answers):,} answers"
    )
    different = len(stats.image_sizes) + stats.unreadable_images
    use = "`mmit data show FILE` shows them, and a training config names the file under `data.train`."
    parts = [
        f"---\n{dump_yaml(head)}---\n# {name}",
        f"{told}; {different:,} different images. Records of mmit in JSON Lines: {use}",
        "## Sources\n" + _sources(stats),
        "## Licences\n" + _licences(stats),
        "## How it was made\n" + (_built(build) if build else _imported()),
        "## Size\n" + _size(stats),
        "## Limits\n" + _limits(stats, build),
    ]
    return "\n\n".join(parts) + "\n"


def hub_licences(expressions: Sequence[str]) -> list[str]:
    """The hub's ids of all terms that stand in SPDX expressions; "other" for those it has no id for."""
    known = dict(zip(SAME, SAME, strict=True)) | OTHER | {NOT_STATED: "unknown"}
    terms = [term for expression in expressions for term in terms_of(expression)]
    return sorted({known.get(term.lower(), "other") for term in terms})


def size_category(records: int) -> str:
    """The hub's name for a number of records."""
    borders = [1000 * 10**n for n in range(len(SIZES))]
    place = sum(records >= border for border in borders)
    if place == 0:
        return f"n<{SIZES[0]}"
    return f"n>{SIZES[-1]}" if place == len(SIZES) else f"{SIZES[place - 1]}<n<{SIZES[place]}"


def _sources(stats: Stats) -> str:
    lines = ["| source | records | without images | answers |", "|---|--:|--:|--:|"]
    ordered = sorted(stats.sources.items(), key=lambda item: (-item[1].records, item[0]))
    lines += [f"| {_cell(_own(name))} | {s.records:,} | {s.text_only:,} | {len(s.answers):,} |" for name, s in ordered]
    return "\n".join(lines)


def _licences(stats: Stats) -> str:
    lines = ["Of each record, as an SPDX expression: all of its terms apply.", "", "| licence | records |", "|---|--:|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {count:,} |" for name, count in stats.licences.most_common())])


def _built(build: Mapping[str, Any]) -> str:
    accepted, dropped, templates = (build.get(key) or {} for key in ("accepted", "dropped", "templates"))
    held_out = build.get("held_out") or []
    lines = [f"By `mmit build` of mmit {build.get('mmit', '')}.", ""]
    lines += ["| task | records | wordings | held out |", "|---|--:|--:|---|"]
    for task, count in sorted(accepted.items()):
        lines.append(
            f"| {_cell(task)} | {count:,} | {len(templates.get(task, ()))} | {'yes' if task in held_out else 'no'} |"
        )
    if dropped:
        lines += ["", "| dropped because | rows |", "|---|--:|"]
        lines += [
            f"| {_cell(reason)} | {count:,} |" for reason, count in sorted(dropped.items(), key=lambda item: -item[1])
        ]
    lines += ["", "The config, with the digests of what was read:", ""]
    recipe = {"config": build.get("config", {}), "inputs": build.get("inputs", {})}
    lines += ["```yaml", dump_yaml(_without_folders(recipe)).rstrip(), "```"]
    return "\n".join(lines)


def _imported() -> str:
    return "Converted from the sources above into mmit's records (`mmit data import`); texts and images are theirs."


def _size(stats: Stats) -> str:
    told = stats.to_json()
    rows = {"characters of a prompt": told["whole"]["prompt_characters"]}
    rows |= {"characters of an answer": told["whole"]["answer_characters"]}
    rows |= {"width of an image": told["images"]["width"], "height of an image": told["images"]["height"]}
    lines = ["| | smallest | median | 95 % | largest |", "|---|--:|--:|--:|--:|"]
    for what, n in rows.items():
        if n:
            lines.append(f"| {what} | {n['min']:g} | {n['median']:g} | {n['p95']:g} | {n['max']:g} |")
    return "\n".join(lines)


def _limits(stats: Stats, build: Mapping[str, Any] | None) -> str:
    """What follows from how it was counted; nothing is claimed that was not looked at."""
    lines = ["- nobody has read every answer: some may be wrong, and some may be harmful"]
    if build is not None:
        lines.append(
            "- answers follow from templates, rules or teachers as the config above says, and have their faults"
        )
    if stats.unreadable_images:
        lines.append(f"- {stats.unreadable_images:,} images could not be read where this card was made")
    if NOT_STATED in stats.licences or UNKNOWN in stats.licences:
        lines.append("- the licence of some records is not known: find it out before you pass them on")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _own(name: str) -> str:
    """The last part of an absolute path: folders of the machine that made the data say nothing to others."""
    return Path(name).name if Path(name).is_absolute() else name


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_own(str(key)): _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    return _own(value) if isinstance(value, str) else value
