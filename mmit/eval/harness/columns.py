"""mmit's questions as the columns that lmms-eval's tasks read.

In: records of a benchmark's layout. Out: one dict per question, whose `image` holds mmit Images. Only the columns
that prompts and scoring use are there. Opens no picture.
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from mmit.errors import RecordError
from mmit.eval.layouts.common import lettered
from mmit.eval.questions import CHOICES, GROUP, REFERENCE

if TYPE_CHECKING:
    from mmit.records import Record

Columns = dict[str, Any]


def pope(record: Record) -> Columns:
    """POPE."""
    return _asked(record) | {"answer": _reference(record), "category": record.meta[GROUP]}


def mme(record: Record) -> Columns:
    """MME; both questions of a picture have its name as question_id."""
    reference = _reference(record)
    more = {"answer": reference["answer"], "category": reference["category"], "question_id": reference["image"]}
    return _asked(record) | more


def vqav2(record: Record) -> Columns:
    """VQAv2: human answers as numbered objects."""
    answers = [{"answer": text, "answer_id": number} for number, text in enumerate(_reference(record), 1)]
    return _asked(record) | {"answers": answers}


def human_answers(record: Record) -> Columns:
    """TextVQA, VizWiz, DocVQA: human answers as texts."""
    return _asked(record) | {"answers": list(map(str, _reference(record)))}


def one_answer(record: Record) -> Columns:
    """GQA, RealWorldQA."""
    return _asked(record) | {"answer": str(_reference(record))}


def chartqa(record: Record) -> Columns:
    """ChartQA, human or augmented."""
    return _asked(record) | {"answer": str(_reference(record)), "type": f"{record.meta[GROUP]}_test"}


def ocrbench(record: Record) -> Columns:
    """OCRBench."""
    reference = _reference(record)
    answers = reference["answers"]
    kinds = {"dataset": reference["dataset"], "question_type": record.meta[GROUP]}
    return _asked(record) | kinds | {"answer": [answers] if isinstance(answers, str) else list(answers)}


def scienceqa(record: Record) -> Columns:
    """ScienceQA; a hint stays in the question, where the prompt has it anyway."""
    question, choices = split_options(record)
    answer = ascii_uppercase.index(_reference(record))
    return _asked(record) | {"question": question, "choices": choices, "hint": "", "answer": answer}


def ai2d(record: Record) -> Columns:
    """AI2D."""
    question, choices = split_options(record)
    answer = str(ascii_uppercase.index(_reference(record)))
    return _asked(record) | {"question": question, "options": choices, "answer": answer}


def seedbench(record: Record) -> Columns:
    """SEED-Bench; its pictures come in a list."""
    question, choices = split_options(record)
    named = {f"choice_{letter}": text for letter, text in zip("abcd", choices, strict=True)}
    more = {"question": question, "answer": _reference(record), "data_type": "image"}
    return _asked(record) | {"image": list(record.images)} | named | more


def mmbench(record: Record) -> Columns:
    """MMBench; a hint stays in the question, where the prompt has it anyway."""
    reference = _reference(record)
    question = record.turns[-1].text.split(" There are several options:\n")[0]
    options = {letter: reference["options"].get(letter, "nan") for letter in "ABCDE"}
    named = {"index": reference["index"], "answer": reference["answer"], "category": reference["category"]}
    unused = {"hint": "nan", "source": "", "split": "dev", "L2-category": reference["category"]}
    return _asked(record) | options | named | unused | {"question": question}


def split_options(record: Record) -> tuple[str, list[str]]:
    """Take the options off the end of a question: its text, and the options without their letters.

    Raises RecordError if they are not there, one a line behind their letters.
    """
    rest, options = record.turns[-1].text, list[str]()
    for letter in reversed(record.meta[CHOICES]):
        rest, _, option = rest.rpartition(f"\n{letter}. ")
        options.insert(0, option)
    if f"{rest}\n{lettered(options)}" != record.turns[-1].text:
        problem = "the question does not end with its options"
        raise RecordError(problem, where=record.where, remedy="Choose a task that lists them one a line.")
    return rest, options


def _reference(record: Record) -> Any:
    return record.meta[REFERENCE]


def _asked(record: Record) -> Columns:
    return {"question_id": record.id, "image": record.images[0], "question": record.turns[-1].text}


LMMS_COLUMNS: dict[str, Callable[[Record], Columns]] = {
    "pope": pope,
    "mme": mme,
    "vqav2": vqav2,
    "textvqa": human_answers,
    "vizwiz": human_answers,
    "docvqa": human_answers,
    "gqa": one_answer,
    "realworldqa": one_answer,
    "chartqa": chartqa,
    "ocrbench": ocrbench,
    "scienceqa": scienceqa,
    "ai2d": ai2d,
    "seedbench": seedbench,
    "mmbench": mmbench,
}
