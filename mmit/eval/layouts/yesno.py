"""Loaders of questions with two possible answers: POPE, MME, NLVR, NLVR2.

In: each benchmark's folder, laid out as its makers distribute it. Out: questions; references as the metrics of
the same names take them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmit.errors import RecordError
from mmit.eval.layouts.common import Columns, Folder, Layout, Lmms, LmmsTask, Questions, asked
from mmit.eval.metrics.yesno import MME_COGNITION, MME_PERCEPTION
from mmit.eval.questions import GROUP, REFERENCE

if TYPE_CHECKING:
    from mmit.records import Record

_POPE = ("random", "popular", "adversarial")
_PICTURES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")
_YES_OR_NO = " Please answer yes or no."


def _pope(folder: Folder, split: str) -> Questions:
    pictures = folder.find("val2014", "images")
    for kind in _POPE if split == "all" else (split,):
        name = f"coco_pope_{kind}.json"
        for _, row in folder.rows(name, f"coco/{name}", f"output/coco/{name}"):
            image = folder.picture(row["image"], root=pictures)
            # LLaVA numbers the questions of each split from 1 too.
            name_of = f"{kind}-{row['question_id']}"
            yield folder.question(row["text"], [image], id=name_of, reference=row["label"], group=kind)


def _mme(folder: Folder, split: str, suffix: bool = False) -> Questions:
    categories = {path.name: path for path in sorted(folder.path.glob("*")) if path.is_dir()}
    release = folder.path / "MME_Benchmark_release_version"
    if release.is_dir():
        inner = release / "MME_Benchmark" if (release / "MME_Benchmark").is_dir() else release
        categories = {path.name: path for path in sorted(inner.glob("*")) if path.is_dir()}
    known = [name for name in (*MME_PERCEPTION, *MME_COGNITION) if name in categories]
    if not known:
        raise folder.lacks("a folder per category (existence, count, ...)")
    for category in known:
        texts = categories[category] / "questions_answers_YN"
        places = [texts if texts.is_dir() else categories[category]]
        places.append(categories[category] / "images" if texts.is_dir() else categories[category])
        for path in sorted(places[0].glob("*.txt")):
            yield from _mme_picture(folder, path, places[1], category=category, suffix=suffix)


def _mme_picture(folder: Folder, path: Path, pictures: Path, *, category: str, suffix: bool) -> Questions:
    found = [file for end in _PICTURES if (file := pictures / f"{path.stem}{end}").is_file()]
    if not found:
        raise folder.lacks(f"the picture {pictures / path.stem}.jpg or .png")
    lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        folder.at = f"{path}:{number}"
        text, tab, answer = line.rpartition("\t")
        if not tab:
            raise RecordError("no tab between question and answer", where=folder.at, remedy="Fetch the file again.")
        text = text.strip() if suffix else text.strip().replace(_YES_OR_NO, "")
        reference = {"answer": answer.strip(), "category": category, "image": f"{category}/{path.stem}"}
        name = f"{category}/{path.stem}#{number}"
        yield folder.question(text, [folder.picture(str(found[0]))], id=name, reference=reference, group=category)


def _nlvr(folder: Folder, split: str) -> Questions:
    path = folder.find(f"{split}/{split}.json", f"nlvr/{split}/{split}.json")
    pictures = path.parent / "images"
    for _, row in folder.rows_of(path):
        root = pictures / str(row["directory"])
        for turn in range(6):  # the three boxes of a picture in every order
            name = f"{row['identifier']}-{turn}"
            image = folder.picture(f"{split}-{name}.png", root=root)
            reference = {"label": row["label"], "identifier": name}
            yield folder.question(row["sentence"], [image], id=f"{split}-{name}", reference=reference)


def _nlvr2(folder: Folder, split: str) -> Questions:
    for _, row in folder.rows(f"{split}.json", f"data/{split}.json"):
        name = row["identifier"]
        stem = name.rsplit("-", 1)[0]
        roots = [folder.path / split, folder.path / "images" / split]
        root = next((path for path in roots if path.is_dir()), None)
        if root is None:
            raise folder.lacks(f"the folder {split}/ of pictures")
        if "directory" in row and (root / str(row["directory"])).is_dir():
            root = root / str(row["directory"])  # the training pictures come in numbered folders
        images = [folder.picture(f"{stem}-img{side}.png", root=root) for side in (0, 1)]
        reference = {"label": row["label"], "identifier": name}
        yield folder.question(row["sentence"], images, id=name, reference=reference)


def _pope_columns(record: Record) -> Columns:
    return asked(record) | {"answer": record.meta[REFERENCE], "category": record.meta[GROUP]}


def _mme_columns(record: Record) -> Columns:
    # Both questions of a picture have its name as question_id.
    reference = record.meta[REFERENCE]
    more = {"answer": reference["answer"], "category": reference["category"], "question_id": reference["image"]}
    return asked(record) | more


LAYOUTS: dict[str, Layout] = {
    "pope": Layout(
        _pope,
        {
            "coco_pope_random.json": "questions, also found in coco/",
            "coco_pope_popular.json": "questions",
            "coco_pope_adversarial.json": "questions",
            "val2014/": "pictures of COCO val2014",
        },
        "https://github.com/RUCAIBox/POPE (output/coco) and https://cocodataset.org/#download (val2014)",
        ("all", *_POPE),
        lmms=Lmms(
            _pope_columns,
            {
                "pope": LmmsTask("pope/pope.yaml", "all"),
                "pope_random": LmmsTask("pope/pope_random.yaml", "random"),
                "pope_pop": LmmsTask("pope/pope_popular.yaml", "popular"),
                "pope_adv": LmmsTask("pope/pope_adv.yaml", "adversarial"),
            },
        ),
    ),
    "mme": Layout(
        _mme,
        {
            "<category>/*.txt": "two lines 'question<tab>Yes' per picture, also found in questions_answers_YN/, and "
            "the folder of categories also in MME_Benchmark_release_version/",
            "<category>/*.jpg": "pictures of the same name (.png too), beside the .txt or in images/",
        },
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (on request)",
        ("test",),
        {"suffix": "true leaves 'Please answer yes or no.' in the questions"},
        lmms=Lmms(_mme_columns, {"mme": LmmsTask("mme/mme.yaml")}),
    ),
    "nlvr": Layout(
        _nlvr,
        {
            "{split}/{split}.json": "one statement a line",
            "{split}/images/<directory>/": "pictures {split}-<identifier>-0.png to -5.png",
        },
        "https://github.com/lil-lab/nlvr/tree/master/nlvr (clone it; the folder nlvr/ in it is the one above)",
        ("dev", "test", "train"),
    ),
    "nlvr2": Layout(
        _nlvr2,
        {"{split}.json": "one statement a line, also found in data/", "{split}/": "pictures <id>-img0.png, -img1.png"},
        "https://github.com/lil-lab/nlvr/tree/master/nlvr2 (pictures on request)",
        ("test1", "dev", "test2", "train"),
    ),
}
