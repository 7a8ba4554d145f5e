"""The model card of an export: what the model was made of, on which data, by which recipe, and what it scored.

Goes in: the sections of a config, the evaluation reports beside a run, the licences of the records it saw. Comes out:
the text of README.md with the hub's front matter. Says of everything that is not known that it is not known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmit.data.rows import read_rows
from mmit.errors import MmitError
from mmit.models.hub import HUB_ID
from mmit.records import Record
from mmit.yamlio import dump_yaml

ROWS = 200_000  # records of a source whose licences are counted
LIBRARY = {"llava-hf": "transformers", "peft": "peft"}
USE = {
    "llava-hf": "Load it with `AutoModelForImageTextToText` and `AutoProcessor` of transformers, or with `mmit.load`.",
    "gguf": "For llama.cpp: `llama-server -m FILE.gguf --mmproj MMPROJ.gguf`; for text the first file is enough.",
    "llava": "LLaVA's own layout: give its code this folder, and the base below as `--model-base` for an adapter.",
    "peft": "An adapter of the language model alone: `PeftModel.from_pretrained` puts it on the base below.",
    "mmit": "Load it with `mmit.load`.",
}


def model_card(
    config: Mapping[str, Any],
    *,
    format: str,
    step: int,
    checkpoint: Path,
    licence: str | None,
    image: str = "",
    note: str = "",
) -> str:
    """Write the card.

    Args:
        config: the sections of the run's config, as plain data.
        format: of the export.
        step, checkpoint: which checkpoint it was; evaluations of it are looked for in its run.
        licence: the hub's id of the model's licence; None leaves it open.
        image: what a picture becomes, such as its size and number of tokens; "" for a model that sees nothing.
        note: how the export was compared with its source.
    """
    model, vision = config["model"], config["model"]["vision"]
    name = Path(config["run"]["dir"]).name
    bases = [b for b in (model["llm"]["name"], vision and vision["name"]) if b and HUB_ID.fullmatch(b)]
    head: dict[str, Any] = {"tags": ["mmit", "instruction-tuning"], "library_name": LIBRARY.get(format, "mmit")}
    head |= {"pipeline_tag": "image-text-to-text"} if vision else {"pipeline_tag": "text-generation"}
    head |= {"base_model": bases} if bases else {}
    head |= {"license": licence} if licence else {}
    reports = _reports(checkpoint)
    sources = [str(s["path"]) for s in config["data"]["train"] if HUB_ID.fullmatch(str(s["path"]))]
    head |= {"datasets": sources} if sources else {}
    head |= {"model-index": [{"name": name, "results": _results(reports, head["pipeline_tag"])}]} if reports else {}
    parts = [
        f"---\n{dump_yaml(head)}---\n# {name}",
        f"Step {step} of a run of mmit. {USE[format]} {note}".rstrip(),
        "## Parts\n" + _parts(model) + (f"\n- a picture is {image}" if image else ""),
        "## Data\n" + _data(config["data"]["train"]),
        "## Recipe\n" + _recipe(config),
        "## Evaluation\n" + _evaluation(reports),
        "## Limits\n" + _limits(config, bool(image)),
        "## Licences\n" + _licences(config["data"]["train"], licence),
    ]
    return "\n\n".join(parts) + "\n"


def _shown(name: Any) -> str:
    """A hub id as it is, of a path only its last part."""
    text = str(name)
    return text if HUB_ID.fullmatch(text) or text.startswith("package:") else Path(text).name


def _parts(model: Mapping[str, Any]) -> str:
    lines = [f"- language model: `{_shown(model['llm']['name'])}`, chat format `{_shown(model['chat']['format'])}`"]
    vision = model["vision"]
    if vision:
        lines.append(f"- vision tower: {vision['kind']} `{_shown(vision['name'])}`, pictures fitted by {vision['fit']}")
        lines.append(f"- projector: `{model['projector']['kind']}` {json.dumps(model['projector']['options'])}")
    return "\n".join(lines)


def _data(sources: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| source | format | weight |", "|---|---|---|"]
    lines += [f"| {s['name'] or _shown(s['path'])} | {s['format']} | {s['weight']:g} |" for s in sources]
    return "\n".join(lines)


def _recipe(config: Mapping[str, Any]) -> str:
    told = {part: options for part, options in config["tune"].items() if options["mode"] != "frozen"}
    kept = ("epochs", "steps", "rows_per_step", "schedule", "warmup", "weight_decay", "clip", "precision")
    recipe = {"tune": told, "train": {key: config["train"][key] for key in kept}, "seed": config["run"]["seed"]}
    return f"```yaml\n{dump_yaml(recipe)}```"


def _reports(checkpoint: Path) -> list[dict[str, Any]]:
    """The evaluations of a checkpoint that lie in its run."""
    run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
    paths = sorted([*run.glob("eval/report.json"), *run.glob("eval/*/report.json")])
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [report for report in found if Path(report["model"]).name == checkpoint.name]


def _results(reports: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """The reports as the hub's model-index."""
    return [
        {
            "task": {"type": task},
            "dataset": {"type": report["task"], "name": report["task"]},
            "metrics": [{"type": report["metric"], "value": round(float(report["accuracy"]), 4)}],
        }
        for report in reports
    ]


def _limits(config: Mapping[str, Any], sees: bool) -> str:
    """What follows from how the model was made; nothing is claimed that was not looked at."""
    lines = [
        f"- trained on conversations of at most {config['data']['max_length']:,} tokens",
        "- answers may be wrong, and nothing was done against harmful ones beyond what the bases and the data bring",
        "- only the tasks under Evaluation were measured",
    ]
    if sees:
        lines.append("- pictures brought to another size, or padded otherwise, than above give worse answers")
    return "\n".join(lines)


def _evaluation(reports: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for report in reports:
        low, high = report["ci95"]
        rows.append(
            f"| {report['task']} | {report['metric']} | {report['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {report['n']:,} |"
        )
    if not rows:
        return "This checkpoint has not been evaluated (`mmit eval`)."
    return "\n".join(["| task | metric | score | 95 % interval | questions |", "|---|---|---|---|---|", *rows])


def _licences(sources: Sequence[Mapping[str, Any]], licence: str | None) -> str:
    lines = [f"- this model: {licence or 'not stated'}; the licences of its base models apply too"]
    for source in sources:
        found: Counter[str] = Counter()
        root = source["image_root"] and Path(source["image_root"])
        try:
            rows = read_rows(Path(source["path"]), source["format"], image_root=root, limit=source["limit"])
            found.update(r.licence or "not stated" for r in islice(rows, ROWS) if isinstance(r, Record))
        except MmitError:
            found.clear()  # the data need not be where the model is exported
        told = ", ".join(f"{name} ({count:,} records)" for name, count in found.most_common()) or "records not at hand"
        lines.append(f"- data {source['name'] or _shown(source['path'])}: {told}")
    return "\n".join(lines)
