"""Multimodal instruction sets of one format each: MultiInstruct, Vision-Flan, M3IT, LAMM (2D), PMC-VQA.

Each function makes one Record of one row and states the layout of the official files with its traps. Refuses rows
that need another kind of model (image codes, point clouds) and answers that contradict themselves.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

from mmit.data.formats.chat import llava, read_turns
from mmit.data.formats.common import (
    Format,
    Row,
    Rows,
    ask,
    id_of,
    images_of,
    json_rows,
    one_of,
    pick,
    references,
    reply,
    rest,
    text_of,
    text_option,
    with_input,
)
from mmit.data.formats.pictures import base64_image, image_part, images_first
from mmit.data.formats.tabular import csv_rows
from mmit.errors import ConfigError, RecordError
from mmit.records import Record, short

# Their target is a picture in the codes of OFA's image tokenizer.
_IMAGE_CODES = frozenset(
    [
        "image_generation",
        "infilling",
        "im_region_extraction",
        "im_descriptive_infilling",
        "image_completion",
        "image_completion_w_image_caption",
        "image_completion_w_region_caption",
        "im_descriptive_extraction",
    ]
)


def multiinstruct(row: Row, *, image_root: str = "", separator: str | None = None) -> Record:
    """MultiInstruct's train.jsonl and test.jsonl: {"unique_id", "task_name", "image_path", "prompt", "target", ...}.

    The prompt is written out, with one of the task's five instructions and "||||" between options and between
    regions ("x y x y" in pixels); `separator` writes something else there. `image_path` starts at the folder that
    MultiInstruct was built in. Two traps of the official files: build_dataset.py breaks out of its loop after the
    first line, so that a train.jsonl built with it holds one row per task file; and rows straight from
    training_data/ have no prompt yet. Raises RecordError for the latter and for tasks whose target is a picture.
    """
    task = row.get("task_name")
    if isinstance(task, str) and task in _IMAGE_CODES:
        problem = f"the target of task '{task}' is a picture in the codes of OFA"
        raise RecordError(problem, remedy="Leave the task out: records learn text.")
    if "prompt" not in row:
        remedy = "The row is from training_data/: assemble the file with MultiInstruct's build_dataset.py first."
        raise RecordError("the row has no 'prompt'", remedy=remedy)
    asked = text_of(row["prompt"], "prompt").strip()
    if separator is not None:
        asked = asked.replace("||||", text_option(separator, "separator"))
    path = row.get("image_path")
    # The files write ./ in front of a path that starts at their own folder.
    image = image_part(path.removeprefix("./") if isinstance(path, str) else path, image_root)
    meta = rest(row, "unique_id", "image_path", "prompt", "target")
    turns = (ask(asked, [image]), reply(text_of(row.get("target"), "target")))
    return Record(turns, id=id_of(row, "unique_id"), meta=meta)


def vision_flan(row: Row, *, image_root: str = "") -> Record:
    """Vision-Flan: annotation_191-task_1k.json in LLaVA's layout, pictures in images_191task_1k/ (`image_root`).

    The name of the task is `task_name` ("Caltech101+Living_Thing_classification", some without a data set) or, in
    copies of the file without it, the beginning of the id or of the picture's name, "<dataset>+<task>_<number>...": it
    goes into meta["dataset"] and meta["task"], which are missing where nothing tells. Ids are not unique, many rows of
    a task share one: tell records apart by `row`.
    """
    # LLaVA's layout to the letter; only what is known of the task comes on top.
    record = llava(row, image_root=image_root)
    dataset, task = vision_flan_task(row)
    # Copies of the file without `task_name` keep it in the picture's name.
    if not task and isinstance(row.get("image"), str):
        dataset, task = vision_flan_task({"id": os.path.basename(row["image"])})
    told = {"dataset": dataset, "task": task} if dataset else {"task": task} if task else {}
    kept = {key: value for key, value in record.meta.items() if key != "task_name" or not task}
    return replace(record, meta=kept | told)


_TASK_ID = re.compile(r"([^+/]+)\+([^/]+?)_\d")


def vision_flan_task(row: Row) -> tuple[str, str]:
    """Return (dataset, task) from the task_name or the id of a Vision-Flan row, "" for what it does not tell."""
    name = row.get("task_name")
    if isinstance(name, str) and name:
        # One plus alone parts data set and task; a name with several is kept whole, since either half may hold them.
        dataset, _, task = name.rpartition("+") if name.count("+") == 1 else ("", "", name)
        return dataset, task
    found = _TASK_ID.match(id_of(row))
    return (found[1], found[2]) if found else ("", "")


M3IT_IMAGES = ("image_base64_str", "image_str", "img_str", "image")


def m3it_rows(path: str, *, instructions: str | None = None, seed: int = 0) -> Rows:
    """Yield the rows of one task's train.jsonl, val.jsonl or test.jsonl; those without instruction get one.

    `instructions` is the task's instructions.json, a list of texts, by default the one in the same folder.
    """
    bank: list[str] = []
    place = instructions or os.path.join(os.path.dirname(path), "instructions.json")
    for number, row in json_rows(path):
        if isinstance(row, dict) and "instruction" not in row:
            # Read when the first row needs it: exports that hold the instruction have no such file.
            bank = bank or _instruction_bank(place)
            # Drawn by the row's number and a seed, so that the same row has the same instruction in every run and on
            # every rank.
            row = {**row, "instruction": pick(bank, seed=seed, key=str(number))}
        yield number, row


def _instruction_bank(path: str) -> list[str]:
    remedy = "Give the option instructions: the instructions.json of the task, a list of texts."
    try:
        with open(path, encoding="utf-8-sig") as file:
            bank = json.load(file)
    except OSError as error:
        problem = f"rows have no instruction, and {short(path, 120)} cannot be read: {error.strerror}"
        raise ConfigError(problem, where=path, remedy=remedy) from error
    except ValueError as error:
        raise ConfigError(f"not JSON: {short(str(error))}", where=path, remedy=remedy) from error
    if not isinstance(bank, list) or not bank or not all(isinstance(text, str) for text in bank):
        raise ConfigError("found something other than a list of texts", where=path, remedy=remedy)
    return bank


def m3it(row: Row, *, image_root: str = "") -> Record:
    """M3IT without its loading script: {"instruction", "inputs", "image_base64_str", "outputs"}, data as JSONL.

    The repository holds data/<group>/<task>/{train,val,test}.jsonl and instructions.json, and a script M3IT.py that
    draws an instruction and renames keys; mmit never runs it. Rows are read as they lie there (`input`/`inputs`,
    `output`/`outputs`, the picture in base64 under one of four names, a caption's references in meta.targets) and as
    the script, or an export to parquet, writes them. What the script adds to some answers ("The answer is ...") is
    not added. The user says the instruction, a blank line and the inputs; several pictures, as of the video tasks,
    all come first. Of several outputs the first is learnt, all stay in meta["references"].
    """
    meta = rest(row, "instruction", "inputs", "input", "outputs", "output", *M3IT_IMAGES)
    answers = row.get("outputs", row.get("output"))
    inner = meta.get("meta")
    # Of captions the repository has no output, and its script takes the references in their place.
    if answers is None and isinstance(inner, dict):
        answers = inner.get("targets")
    given = row.get("inputs", row.get("input")) or ""
    # The tasks were collected by several people, and each named the picture otherwise.
    key = next((name for name in M3IT_IMAGES if row.get(name)), "image_base64_str")
    value = row.get(key)
    pictures = value if isinstance(value, list) else [] if value is None else [value]
    # Exports to parquet hold pictures as bytes, files from the repository as base64.
    images = [base64_image(p, key) if isinstance(p, str) else image_part(p, image_root) for p in pictures]
    if not images:
        remedy = f"Give the picture in base64 under one of {', '.join(M3IT_IMAGES)}."
        raise RecordError("the row has no picture", remedy=remedy)
    found = references(answers, "outputs")
    if len(found) > 1:
        meta["references"] = found
    asked = with_input(text_of(row.get("instruction"), "instruction"), text_of(given, "inputs"))
    return Record((ask(asked, images), reply(found[0])), id=id_of(row), meta=meta)


def lamm(row: Row, *, image_root: str = "") -> Record:
    """LAMM, 2D: 2D_Instruct/meta_file/*.json in LLaVA's layout, with `task_type` and `src_image`.

    The text has no "<image>": the picture opens the first human turn, and an "<image>" in the text is text.
    Raises RecordError for rows of the 3D part, whose `pcl` is a point cloud.
    """
    if "pcl" in row:
        raise RecordError("'pcl' is a point cloud", remedy="Import the files of 2D_Instruct only.")
    images = images_of(row, image_root)
    if not images:
        raise RecordError("the row has no 'image'", remedy="Every row of 2D_Instruct names its picture.")
    dialogue, meta = read_turns(row)
    # LAMM's text never marks its picture: a marker in it is somebody's word, and must stay one.
    return Record(images_first(dialogue, images), id=id_of(row), meta=meta)


_PREFIX = re.compile(r"\s*([A-D])\s*:")
_LETTERS = "ABCD"


def pmc_vqa(row: Row, *, image_root: str = "", style: str = "choice") -> Record:
    """PMC-VQA: train.csv, test.csv, test_clean.csv, and train_2.csv, test_2.csv; pictures under `image_root`.

    Columns: Figure_path, Question, "Choice A" .. "Choice D", Answer_label, Answer, in some releases spelt "Anwser"; in
    the second version Caption, and an Answer that may be the letter. Choices are already prefixed (" A:Text").
    `style`: "choice" asks with the choices and learns "B: Text", "letter" learns "B", "open" asks without choices and
    learns the text. Raises RecordError where answer and label contradict each other or fit no choice.
    """
    one_of(style, "style", ("choice", "letter", "open"))
    choices = {letter: _choice(row, letter) for letter in _LETTERS}
    letter = _answer_letter(row, choices)
    asked = text_of(row.get("Question"), "Question").strip()
    if style != "open":
        asked = "\n".join([asked, *(f"{name}: {text}" for name, text in choices.items())])
    answer = {"choice": f"{letter}: {choices[letter]}", "letter": letter, "open": choices[letter]}[style]
    used = ("Figure_path", "Question", "Answer", "Anwser", "Answer_label", *(f"Choice {name}" for name in _LETTERS))
    meta = {name: value for name, value in rest(row, *used).items() if name not in ("", "index")}
    image = image_part(row.get("Figure_path"), image_root)
    return Record((ask(asked, [image]), reply(answer)), meta=meta | {"label": letter})


def _choice(row: Row, letter: str) -> str:
    return _PREFIX.sub("", text_of(row.get(f"Choice {letter}"), f"Choice {letter}"), count=1).strip()


def _answer_letter(row: Row, choices: dict[str, str]) -> str:
    """Return the letter of the right choice, from the label, the letter or the text of the answer."""
    label = str(row.get("Answer_label") or "").strip()
    if label and label not in choices:
        raise RecordError(f"Answer_label is '{short(label)}'", remedy="It must be one of A, B, C, D.")
    given = text_of(row.get("Answer", row.get("Anwser")), "Answer").strip()
    prefix = _PREFIX.match(given)
    # The releases differ: the answer is the letter, the text, or the text behind its letter. Where two of these
    # disagree nobody can say which is right, and the row is refused.
    text = _PREFIX.sub("", given, count=1).strip()
    fits = [name for name, choice in choices.items() if text == choice or given == name]
    if prefix and prefix[1] in fits:
        fits = [prefix[1]]
    if label in fits or (len(fits) == 1 and not label):
        return label or fits[0]
    problem = f"the answer '{short(given)}' fits {len(fits)} choices" + (f", its label is {label}" if label else "")
    raise RecordError(problem, remedy="Correct the row, or leave it out.")


FORMATS = {
    "multiinstruct": Format(
        "MultiInstruct's assembled train.jsonl",
        multiinstruct,
        options={"separator": 'what to write for "||||" between options and regions, default itself'},
        detect=("unique_id", "image_path", "task_name", "target"),
    ),
    "vision_flan": Format("Vision-Flan, rows as LLaVA's with the name of the task", vision_flan),
    "m3it": Format(
        "M3IT's JSONL files, without its loading script",
        m3it,
        m3it_rows,
        file_options={
            "instructions": "the task's instructions.json, default the one beside the file",
            "seed": "which instruction a row without one gets, default 0",
        },
        detect=("instruction", "inputs", "outputs"),
    ),
    "lamm": Format("LAMM, the 2D part", lamm, detect=("conversations", "task_type")),
    "pmc_vqa": Format(
        "PMC-VQA's CSV files",
        pmc_vqa,
        csv_rows,
        options={"style": '"choice" (default: ask with choices, answer "B: text"), "letter" or "open"'},
        detect=("Figure_path", "Question"),
        licence="CC-BY-SA",
    ),
}
