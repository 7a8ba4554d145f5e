"""Loaders of caption benchmarks: COCO (the challenge's files or Karpathy's split) and Flickr30k (Karpathy's split).

In: pictures and the captions people wrote. Out: one question per picture, its references all of its captions.
"""

from __future__ import annotations

from mmit.eval.layouts.common import Folder, Layout, Questions

_WHAT = "Provide a one-sentence caption for the provided image."


def _coco(folder: Folder, split: str) -> Questions:
    name = f"captions_{split}.json"
    data = folder.json(name, f"annotations/{name}", needs=("images", "annotations"))
    captions: dict[int, list[str]] = {}
    for note in data["annotations"]:
        captions.setdefault(note["image_id"], []).append(note["caption"])
    pictures = folder.find(split)
    for row in data["images"]:
        image = folder.picture(row["file_name"], root=pictures)
        yield folder.question(_WHAT, [image], id=row["id"], reference=captions[row["id"]])


def _karpathy(folder: Folder, split: str, dataset: str) -> Questions:
    for row in folder.json(f"dataset_{dataset}.json", needs=("images",))["images"]:
        if row["split"] != split:
            continue
        root = folder.find(row["filepath"] if dataset == "coco" else "flickr30k-images", "images")
        sentences = [sentence["raw"] for sentence in row["sentences"]]
        name = row.get("cocoid", row["imgid"])
        image = folder.picture(row["filename"], root=root)
        yield folder.question(_WHAT, [image], id=name, reference=sentences)


def _coco_karpathy(folder: Folder, split: str) -> Questions:
    return _karpathy(folder, split, "coco")


def _flickr30k(folder: Folder, split: str) -> Questions:
    return _karpathy(folder, split, "flickr30k")


_COCO = "https://cocodataset.org/#download"
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
LAYOUTS: dict[str, Layout] = {
    "coco_captions": Layout(
        _coco,
        {"annotations/captions_{split}.json": "captions", "{split}/": "pictures"},
        f"{_COCO} (annotations and images)",
        ("val2017", "val2014"),
    ),
    "coco_karpathy": Layout(
        _coco_karpathy,
        {"dataset_coco.json": "captions and split", "val2014/": "pictures (train2014/ for split train)"},
        f"{_KARPATHY} and {_COCO}",
        ("test", "val", "restval", "train"),
    ),
    "flickr30k": Layout(
        _flickr30k,
        {"dataset_flickr30k.json": "captions and split", "flickr30k-images/": "pictures"},
        f"{_KARPATHY} and https://shannon.cs.illinois.edu/DenotationGraph/ (pictures on request)",
        ("test", "val", "train"),
    ),
}
