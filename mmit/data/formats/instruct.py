"""Text instructions: Alpaca, instructions without outputs, Natural Instructions, inputs/targets, Baize transcripts.

Each function makes one Record of one row. Refuses rows that were written for ranking or for another tokenizer,
since their text is not what should be learnt.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmit.data.formats.chat import Dialogue, said
from mmit.data.formats.common import (
    Format,
    Row,
    Rows,
    ask,
    count_of,
    id_of,
    images_of,
    json_object,
    object_of,
    objects_of,
    one_of,
    references,
    reply,
    rest,
    text_of,
    with_input,
)
from mmit.data.formats.pictures import place_images
from mmit.errors import RecordError
from mmit.records import Record, short


def alpaca(row: Row, *, image_root: str = "") -> Record:
    """Alpaca: {"instruction", "input", "output"}, optionally `system`, `history` ([[q, a], ...]) and `image`.

    The files: alpaca_data.json (52,002 rows, of which 40 % have an input) and, always without input, InstructWild's
    instinwild_{en,ch}.json. The user says the instruction and, if there is an input, a blank line and the input;
    Alpaca's own "Below is an instruction ..." prompts are a chat format's affair.
    """
    dialogue: Dialogue = []
    if row.get("system"):
        dialogue.append(said("system", text_of(row["system"], "system")))
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError("'history' is not a list of pairs", remedy="Write [[question, answer], ...].")
    # The history is learned from too, as any earlier answer of a conversation; a weight on its turns says otherwise.
    for pair in history:
        dialogue += [said("user", text_of(pair[0], "history")), said("assistant", text_of(pair[1], "history"))]
    given = text_of(row["input"], "input") if row.get("input") else ""
    dialogue.append(said("user", with_input(text_of(row.get("instruction"), "instruction"), given)))
    dialogue.append(said("assistant", text_of(row.get("output"), "output")))
    meta = rest(row, "system", "history", "instruction", "input", "output")
    return Record(place_images(dialogue, images_of(row, image_root)), id=id_of(row), meta=meta)


# Keys under which other formats have an answer, which a record without one would lose.
ANSWERS = ("output", "outputs", "answer", "answers", "response", "completion", "target", "targets", "instances")


def instructions(row: Row, *, image_root: str = "") -> Record:
    """Instructions that wait for an output: {"instruction"}, optionally `input`, `image`, and anything else.

    The files: InstructWild's data_v2/user_{1..4}.jsonl (`instruction_type` and `special_tag` on some rows). The
    record ends with the user's turn: it is for generating answers, and training refuses it. A row that has an
    answer is refused, so that it is not lost.
    """
    # Such a row would become a question without an answer, and its answer be forgotten in the meta.
    if answered := [key for key in ANSWERS if row.get(key)]:
        remedy = "Import the file as alpaca, or as json with a mapping such as columns=instruction=A,output=B."
        raise RecordError(f"the row has an answer: '{answered[0]}'", remedy=remedy)
    given = text_of(row["input"], "input") if row.get("input") else ""
    text = with_input(text_of(row.get("instruction"), "instruction"), given)
    turns = place_images([said("user", text)], images_of(row, image_root))
    return Record(turns, id=id_of(row), meta=rest(row, "instruction", "input", "output"))


def natural_instructions_rows(path: str) -> Rows:
    """Yield the instances of a Natural Instructions task file, each with the task it belongs to."""
    task = json_object(path, "Definition", "Instances")
    instances = task.pop("Instances")
    if not isinstance(instances, list):
        raise RecordError("'Instances' is not a list", where=path, remedy="Check the task file.")
    for number, instance in enumerate(instances, 1):
        row_id = instance.get("id") if isinstance(instance, dict) else None
        yield number, {"id": row_id, "name": Path(path).stem, "task": task, "instance": instance}


def natural_instructions(row: Row, *, image_root: str = "", definition: str = "full", positive: int = 0) -> Record:
    """(Super-)Natural Instructions: one file per task, tasks/task001_<source>_<type>.json.

    The file is one object: "Definition" (a list of texts, in old versions a text), "Positive Examples"
    [{input, output, explanation}], "Negative Examples", "Instances" [{id, input, output: [text, ...]}], "Categories",
    "Domains", "Input_language", "Output_language", "Instance License". The user says the definition, a blank line
    and the input. Several outputs are all right answers: the first is learnt, all stay in meta["references"].

    Args:
        row: an instance with its task, {"task", "instance", "name"}.
        image_root: not read: there are no pictures.
        definition: "full", or "none" to leave it out.
        positive: up to so many of the task's examples come before the input, in the wording of Tk-Instruct; they are
            not copied into every record's meta.

    Raises:
        RecordError: a row without its keys. ConfigError: an option that cannot work.
    """
    task, instance = object_of(row.get("task"), "the task"), object_of(row.get("instance"), "the instance")
    one_of(definition, "definition", ("full", "none"))
    parts = references(task.get("Definition"), "Definition") if definition == "full" else []
    examples: list[Row] = []
    if count_of(positive, "positive") and task.get("Positive Examples"):
        examples = objects_of(task, "Positive Examples")[:positive]
    given = text_of(instance.get("input"), "input")
    for number, example in enumerate(examples, 1):
        answer = references(example.get("output"), f"output of positive example {number}")[0]
        asked = text_of(example.get("input"), f"input of positive example {number}")
        # Contract: the very wording of Tk-Instruct, line breaks included. A model that was tuned on it expects it.
        parts.append(f"Positive Example {number} -\nInput: {asked}\nOutput: {answer}")
    if examples:
        given = f"Now complete the following example -\nInput: {given}\nOutput:"
    outputs = references(instance.get("output"), "output")
    meta: Row = {"task": row.get("name", ""), "positive_examples": len(examples)}
    kept = ("Categories", "Domains", "Input_language", "Output_language", "Source", "URL")
    meta |= {key.lower(): task[key] for key in kept if key in task}
    if len(outputs) > 1:
        meta["references"] = outputs
    turns = (ask(with_input("\n\n".join(parts), given)), reply(outputs[0]))
    return Record(turns, id=id_of(instance), meta=meta, licence=_task_licence(task))


def _task_licence(task: Row) -> str | None:
    found = task.get("Instance License") or []
    # "Unknown" is what the release writes where nobody looked: it is no licence, and must not pass for one.
    names = [name for name in (found if isinstance(found, list) else [found]) if isinstance(name, str)]
    return ", ".join(name for name in names if name.strip().lower() not in ("", "unknown")) or None


def inputs_targets(row: Row, *, image_root: str = "") -> Record:
    """Prompted examples of P3, T0 and FLAN: {"inputs", "targets"}, the prompt already written out.

    In P3 (`bigscience/P3`) `inputs` and `targets` are token ids of T5 and the text is in `inputs_pretokenized` and
    `targets_pretokenized`, which therefore go first; the ids are left out. The `_score_eval` parts hold one row per
    answer choice, wrong ones included: a row whose `is_correct` is false is refused. Natural Instructions as rows
    ({"definition", "inputs", "targets"}): the definition and a blank line come before the input. Further keys
    (`answer_choices`, FLAN's `task_name`, `task_source`, `template_type`) stay in the meta, the text's outer whitespace
    where it is.
    """
    # The text goes before its ids: an export may hold both under names that differ in this ending alone.
    suffix = "_pretokenized" if "inputs_pretokenized" in row or "targets_pretokenized" in row else ""
    asked, answer = row.get(f"inputs{suffix}"), row.get(f"targets{suffix}")
    # Ids of T5's tokenizer are numbers that any tokenizer would take.
    if isinstance(asked, list) or isinstance(answer, list):
        problem = "'inputs' or 'targets' is a list, probably the token ids of another tokenizer"
        raise RecordError(problem, remedy="Export inputs_pretokenized and targets_pretokenized as well.")
    if row.get("is_correct") is False:
        problem = "is_correct is false: the target is a wrong answer, written for ranking"
        raise RecordError(problem, remedy="Use the part of P3 without _score_eval, or skip bad records.")
    used = ("inputs", "targets", "inputs_pretokenized", "targets_pretokenized", "definition")
    # Without its definition a row of Natural Instructions asks nothing: its input is the same under several tasks.
    told = "\n\n".join(references(row["definition"], "definition")) if row.get("definition") else ""
    question = with_input(told, text_of(asked, f"inputs{suffix}"))
    turns = (ask(question), reply(text_of(answer, f"targets{suffix}")))
    return Record(turns, id=id_of(row), meta=rest(row, *used))


_SPEAKER = re.compile(r"\[\|(Human|AI)\|\]")


def baize(row: Row, *, image_root: str = "") -> Record:
    """Baize self-chat transcripts: {"topic", "input": "preamble [|Human|] ... [|AI|] ... [|Human|] "}.

    The files: {alpaca,medical,quora,stackoverflow}_chat_data.json. The text before the first speaker becomes the
    system turn. The empty "[|Human|]" that ends every official transcript is no turn. Raises RecordError where
    speakers do not alternate or say nothing, or where the transcript does not end with the AI's words.
    """
    pieces = _SPEAKER.split(text_of(row.get("input"), "input"))
    preamble, speakers, spoken = pieces[0].strip(), pieces[1::2], [text.strip() for text in pieces[2::2]]
    # The official files stop where the human would speak next.
    if speakers and speakers[-1] == "Human" and not spoken[-1]:
        speakers, spoken = speakers[:-1], spoken[:-1]
    if not speakers:
        raise RecordError("the transcript has no turn", remedy="Turns begin with [|Human|] and [|AI|].")
    dialogue: Dialogue = [said("system", preamble)] if preamble else []
    for number, (speaker, text) in enumerate(zip(speakers, spoken, strict=True), 1):
        expected = "Human" if number % 2 else "AI"
        if speaker != expected:
            problem = f"turn {number} of the transcript is [|{speaker}|] where [|{expected}|] belongs"
            raise RecordError(problem, remedy="Fix the transcript, or leave the row out.")
        if not text:
            problem = f"turn {number} of the transcript ([|{speaker}|]) is empty"
            raise RecordError(problem, remedy="Fix the transcript, or leave the row out.")
        dialogue.append(said("user" if speaker == "Human" else "assistant", text))
    if speakers[-1] == "Human":
        problem = f"the transcript ends with the human's words: '{short(spoken[-1])}'"
        raise RecordError(problem, remedy="Fix the transcript, or leave the row out.")
    return Record(place_images(dialogue, None), id=id_of(row), meta=rest(row, "input"))


FORMATS = {
    "alpaca": Format("instruction, optional input, output", alpaca, detect=("instruction", "output")),
    "instructions": Format(
        "instructions that wait for an output (InstructWild v2)", instructions, detect=("instruction",)
    ),
    "natural_instructions": Format(
        "a task file of (Super-)Natural Instructions",
        natural_instructions,
        natural_instructions_rows,
        options={
            "definition": '"full" (default), or "none" to leave the task\'s definition out',
            "positive": "how many of the task's positive examples come before the input, default 0",
        },
        detect=("Definition", "Instances"),
    ),
    "inputs_targets": Format(
        "prompted examples of P3, T0 and FLAN: inputs, targets", inputs_targets, detect=("inputs", "targets")
    ),
    "baize": Format("self-chat transcripts of Baize: topic, input", baize, detect=("topic", "input")),
}
