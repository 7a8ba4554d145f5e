"""Question files: VQAv2 and OK-VQA, GQA, TextVQA, VQA-RAD, SLAKE, and the question JSONL of LLaVA's evaluation.

Each question makes one Record; without an answer, as in test splits, it ends with the user's turn and is for
generation. Of several human answers one is learnt, all stay in meta["answers"]. No instruction about the form of the
answer is added unless `suffix` says so.
"""

from __future__ import annotations

from typing import Any

from mmit.data.formats.common import (
    Format,
    Row,
    Rows,
    ask,
    file_name,
    id_of,
    json_object,
    json_rows,
    keyed,
    most_frequent,
    object_of,
    one_of,
    reply,
    rest,
    text_of,
    text_option,
)
from mmit.data.formats.pictures import image_part
from mmit.errors import RecordError
from mmit.records import Image, Record, short


def vqav2_rows(path: str, *, annotations: str | None = None) -> Rows:
    """Yield the questions of a question file, each with its annotation if there is an annotation file."""
    file = json_object(path, "questions")
    questions = file["questions"]
    if not isinstance(questions, list):
        raise RecordError("'questions' is not a list", where=path, remedy="Check that this is the right file.")
    answers = None
    if annotations:
        # By id and not by order: the two files of a release are sorted differently.
        answers = keyed(json_object(annotations, "annotations")["annotations"], "question_id", where=annotations)
    for number, question in enumerate(questions, 1):
        if isinstance(question, dict):
            # What stands once in the file belongs to each of its rows: a row function sees nothing but its row.
            question = question | {"data_subtype": file.get("data_subtype"), "id": question.get("question_id")}
            if answers is not None:
                question["annotation"] = answers.get(str(question.get("question_id")))
        yield number, question


def vqav2(
    row: Row,
    *,
    image_root: str = "",
    image_pattern: str = "COCO_{data_subtype}_{image_id:012d}.jpg",
    suffix: str = "",
) -> Record:
    """VQAv2 and OK-VQA: v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json.

    The question file is {"data_subtype": "train2014", "questions": [{"question_id", "image_id", "question"}]}, the
    annotation file (option `annotations`) {"annotations": [{"question_id", "multiple_choice_answer", "answers":
    [{"answer"} x 10], "answer_type", "question_type"}]}; OK-VQA has no multiple_choice_answer, so the commonest of
    the answers is learnt. The two files meet by question_id, and their order differs.

    Args:
        row: a question, with the file's data_subtype and its "annotation" where an annotation file was given.
        image_root: the folder of the pictures.
        image_pattern: name of an image file, with {image_id} and {data_subtype}: by default the number with twelve
            digits. test2015's data_subtype names its folder too, so it needs another one.
        suffix: stands behind every question.

    Raises:
        RecordError: a question that the annotation file does not have. ConfigError: an option that cannot work.
    """
    image = _picture(row, image_pattern, image_root, names={"data_subtype": row.get("data_subtype")})
    meta = rest(row, "question", "question_id", "annotation", "data_subtype")
    if "annotation" not in row:
        return _record(row, row.get("question"), image, suffix=suffix, answers=[], meta=meta)
    # The annotation file was given, so a question that it lacks is a mistake of the pair of files; without the file it
    # is a test split.
    if row["annotation"] is None:
        remedy = "Give the annotation file of the same split and version."
        raise RecordError(f"the annotation file has no question {id_of(row)}", remedy=remedy)
    found = object_of(row["annotation"], "the annotation")
    answers = _answers(found.get("answers") or [found.get("multiple_choice_answer")])
    # The release's own choice goes first: which of equally common answers it takes is not told by their order.
    best = found.get("multiple_choice_answer") or most_frequent(answers)
    meta |= {key: found[key] for key in ("answer_type", "question_type", "confidence") if key in found}
    return _record(row, row.get("question"), image, suffix=suffix, answers=answers, best=best, meta=meta)


def gqa_rows(path: str) -> Rows:
    """Yield the questions of a GQA file, an object {question id: question}."""
    for number, (key, question) in enumerate(json_object(path).items(), 1):
        yield number, (question | {"id": key} if isinstance(question, dict) else question)


def gqa(
    row: Row,
    *,
    image_root: str = "",
    answer: str = "answer",
    image_pattern: str = "{imageId}.jpg",
    suffix: str = "",
) -> Record:
    """GQA: train_balanced_questions.json and its kin, {question id: {"imageId", "question", "answer", "fullAnswer"}}.

    The programs and scene references of a question (`semantic`, `annotations`, ...) are not copied; its `types`,
    `groups` and other answer are in the meta.

    Args:
        row: a question with its id.
        image_root: the folder of the pictures.
        answer: "answer" learns the short answer, "fullAnswer" the sentence.
        image_pattern: name of an image file, with {imageId}.
        suffix: stands behind every question.

    Raises:
        RecordError: a row without its keys. ConfigError: an option that cannot work.
    """
    one_of(answer, "answer", ("answer", "fullAnswer"))
    image = _picture(row, image_pattern, image_root, key="imageId")
    # Named one by one: the programs of a question are longer than the question itself.
    kept = ["types", "groups", "isBalanced", "answer", "fullAnswer", "imageId"]
    meta = {key: row[key] for key in kept if key in row}
    answers = [text_of(row[answer], answer)] if row.get(answer) is not None else []
    return _record(row, row.get("question"), image, suffix=suffix, answers=answers, meta=meta)


def textvqa_rows(path: str) -> Rows:
    """Yield the questions of a TextVQA file."""
    data = json_object(path, "data")["data"]
    if not isinstance(data, list):
        raise RecordError("'data' is not a list", where=path, remedy="Check that this is the right file.")
    yield from enumerate(data, 1)


def textvqa(row: Row, *, image_root: str = "", image_pattern: str = "{image_id}.jpg", suffix: str = "") -> Record:
    """TextVQA: TextVQA_0.5.1_{train,val,test}.json, {"data": [{"question_id", "image_id", "question", "answers"}]}.

    Ten people answered each question; the commonest answer is learnt, the one given first where several are. The
    test file has no `answers`. OCR tokens are in files of their own and are not read.

    Args:
        row: an entry of "data".
        image_root: the folder of the pictures: train_images/ (for val too) or test_images/.
        image_pattern: name of an image file, with {image_id}.
        suffix: stands behind every question.

    Raises:
        RecordError: a row without its keys. ConfigError: an option that cannot work.
    """
    image = _picture(row, image_pattern, image_root)
    answers = _answers(row.get("answers") or [])
    meta = rest(row, "question", "question_id", "answers")
    return _record(row, row.get("question"), image, suffix=suffix, answers=answers, meta=meta)


def llava_questions(row: Row, *, image_root: str = "", suffix: str = "") -> Record:
    """LLaVA's question files: JSONL of {"question_id", "image", "text"}, optionally "category".

    They have no answers: the records are for generation. The text often ends with the instruction about the form of
    the answer, and TextVQA's with "Reference OCR token: ..."; "<image>" in it marks nothing and stays text.
    """
    image = [image_part(row["image"], image_root)] if row.get("image") is not None else []
    meta = rest(row, "question_id", "text")
    return _record(row, row.get("text"), image, suffix=suffix, answers=[], meta=meta)


def is_test_phrase(phrase_type: Any) -> bool:
    """Tell whether a VQA-RAD question is of the test split: freeform and para are its training, test_... its test."""
    return text_of(phrase_type, "phrase_type").startswith("test_")


def vqa_rad_rows(path: str, *, split: str = "train") -> Rows:
    """Yield the questions of one split; the file holds both."""
    one_of(split, "split", ("train", "test", "all"))
    for number, row in json_rows(path):
        phrase = row.get("phrase_type") if isinstance(row, dict) else None
        # A row whose split cannot be told is yielded, so that it is refused with its number and not left out in
        # silence.
        if split == "all" or not isinstance(phrase, str) or is_test_phrase(phrase) == (split == "test"):
            yield number, row


def vqa_rad(row: Row, *, image_root: str = "", suffix: str = "") -> Record:
    """VQA-RAD: "VQA_RAD Dataset Public.json", a list of {"qid", "image_name", "question", "answer", ...}.

    Pictures are in "VQA_RAD Image Folder": set `image_root` to it. Answers may be numbers, and answer_type may end
    with a space. Both splits ask about the same pictures. The question in other words (question_rephrase,
    question_frame) is in the meta.
    """
    is_test_phrase(row.get("phrase_type"))  # a row of no split must not pass for training
    return _medical(row, row.get("image_name"), image_root, suffix)


def slake_rows(path: str, *, language: str = "all") -> Rows:
    """Yield the questions of one language, or of both."""
    one_of(language, "language", ("all", "en", "zh"))
    for number, row in json_rows(path):
        if language == "all" or not isinstance(row, dict) or row.get("q_lang") == language:
            yield number, row


def slake(row: Row, *, image_root: str = "", suffix: str = "") -> Record:
    """SLAKE: train.json, validation.json, test.json, lists of {"qid", "img_name", "question", "answer", "q_lang", ...}.

    Pictures are imgs/xmlab0/source.jpg: set `image_root` to imgs. Questions are in English and in Chinese.
    """
    return _medical(row, row.get("img_name"), image_root, suffix)


def _medical(row: Row, name: Any, root: str, suffix: str) -> Record:
    image = image_part(text_of(name, "the image's name"), root)
    answer = row.get("answer")
    # An answer may be a count. True is no number, and is refused as the text it should have been.
    said = str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
    meta = rest(row, "qid", "question", "answer", "image_name", "img_name")
    if isinstance(meta.get("answer_type"), str):
        meta["answer_type"] = meta["answer_type"].strip()
    turns = (ask(text_of(row.get("question"), "question").strip() + text_option(suffix, "suffix"), [image]),)
    return Record((*turns, reply(text_of(said, "answer").strip())), id=id_of(row, "qid"), meta=meta)


def _record(
    row: Row,
    question: Any,
    images: list[Image],
    *,
    suffix: str,
    answers: list[str],
    best: str | None = None,
    meta: Row,
) -> Record:
    asked = text_of(question, "the question").strip() + text_option(suffix, "suffix")
    turns = [ask(asked, images)]
    if answers:
        turns.append(reply(text_of(best or most_frequent(answers), "the answer")))
    # All of them stay: metrics of VQA score against every person's answer.
    if len(answers) > 1:
        meta = meta | {"answers": answers}
    return Record(tuple(turns), id=id_of(row, "question_id") or id_of(row), meta=meta)


def _picture(row: Row, pattern: str, root: str, *, key: str = "image_id", names: Row | None = None) -> list[Image]:
    value = row.get(key)
    if not isinstance(value, (str, int)) or value == "":
        raise RecordError(f"{key} is '{short(value)}'", remedy="Give the image's number or name.")
    if isinstance(value, str) and value.isdecimal() and value.isascii() and f"{{{key}:" in pattern:
        value = int(value)  # some copies of the files write numbers as text
    return [image_part(file_name(pattern, {key: value, **(names or {})}), root)]


def _answers(found: Any) -> list[str]:
    if not isinstance(found, list):
        raise RecordError(f"answers is '{short(found)}', not a list", remedy="Check the file.")
    return [text_of(a.get("answer") if isinstance(a, dict) else a, "an answer") for a in found]


_SUFFIX = {"suffix": 'text after each question, such as "\\nAnswer the question using a single word or phrase."'}
FORMATS = {
    "vqav2": Format(
        "questions of VQAv2 or OK-VQA, answers in a second file",
        vqav2,
        vqav2_rows,
        options=_SUFFIX | {"image_pattern": 'name of an image file, default "COCO_{data_subtype}_{image_id:012d}.jpg"'},
        file_options={"annotations": "the annotation file of the same split; without it records have no answer"},
        detect=("questions.question_id", "questions.image_id", "questions.question"),
    ),
    "gqa": Format(
        "questions of GQA",
        gqa,
        gqa_rows,
        options=_SUFFIX
        | {
            "answer": '"answer" (default, a word or two) or "fullAnswer" (a sentence)',
            "image_pattern": 'name of an image file, default "{imageId}.jpg"',
        },
        detect=("*.imageId", "*.question"),
    ),
    "textvqa": Format(
        "questions of TextVQA",
        textvqa,
        textvqa_rows,
        options=_SUFFIX | {"image_pattern": 'name of an image file, default "{image_id}.jpg"'},
        detect=("data.question_id", "data.image_id", "data.question"),
    ),
    "vqa_rad": Format(
        "VQA-RAD's questions about radiology images",
        vqa_rad,
        vqa_rad_rows,
        options=_SUFFIX,
        file_options={"split": "train (default), test or all, as phrase_type has it"},
        detect=("qid", "image_name", "phrase_type"),
        licence="CC0-1.0",
    ),
    "slake": Format(
        "SLAKE's questions about medical images",
        slake,
        slake_rows,
        options=_SUFFIX,
        file_options={"language": "all (default), en or zh"},
        detect=("qid", "img_name", "q_lang"),
        licence="CC-BY-4.0",
    ),
    "llava_questions": Format(
        "LLaVA's question files, without answers",
        llava_questions,
        options=_SUFFIX,
        detect=("question_id", "image", "text"),
    ),
}
