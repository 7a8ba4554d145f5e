"""Questions and answers under other names: prompt/completion, query/response, dolly, OpenOrca, UltraChat, LIMA, xLAM,
the Cauldron, Self-Instruct seeds, conversations as pairs.

Each function makes one Record of one row; every "<image>" of a row with pictures keeps its place. Layouts are told by
their keys alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from mmit.data.formats.chat import Dialogue, messages, said
from mmit.data.formats.common import (
    Format,
    Row,
    Rows,
    id_of,
    images_of,
    json_rows,
    objects_of,
    rest,
    text_of,
    with_input,
)
from mmit.data.formats.keys import CHOICES, UNSHOWN, calls_of, turn_extras
from mmit.data.formats.pictures import images_first, place_images
from mmit.data.formats.preferences import CHOSEN
from mmit.data.formats.transcripts import hh_messages, is_hh
from mmit.errors import RecordError
from mmit.records import Record, Turn

_WHERE = "Give the prompt in 'prompt', as a text or a list of messages."
ASKED = ("prompt", "query", "question", "instruction")
ANSWERED = ("completion", "response", "answer", "output")


def pair(row: Row, *, image_root: str = "") -> Record:
    """One question and answer: {"prompt" | "query" | "question" | "instruction", "completion" | "response" | "answer"}.

    ms-swift's query/response with `history` ([[q, a], ...]) and `system`, OpenOrca's question/response with
    `system_prompt`, dolly's instruction/response, whose `context` follows the instruction after a blank line, as
    GPTeacher's `input` does. TRL's
    prompt/completion may be lists of messages. Further keys stay in the meta or are read by their meaning.
    """
    # The first of them in this order, so that a row with two is read the same whatever the order of its keys.
    asked = next(key for key in ASKED if key in row)
    answered = next((key for key in ANSWERED if key in row), "response")
    # TRL allows messages on both sides; together they are one conversation, which the importer of messages knows how to
    # read.
    if isinstance(row[asked], list):
        return _of_messages(row, asked, answered, image_root)
    dialogue, used = _asking(row, asked)
    if isinstance(row.get(answered), int) and (key := next((key for key in CHOICES if row.get(key)), "")):
        raise RecordError(f"'{answered}' is {row[answered]}, the place of one of '{key}'", remedy=UNSHOWN)
    dialogue.append(said("assistant", text_of(row.get(answered), answered)))
    meta = rest(row, *used, answered)
    return Record(place_images(dialogue, images_of(row, image_root)), id=id_of(row), meta=meta)


def _asking(row: Row, asked: str) -> tuple[Dialogue, tuple[str, ...]]:
    """The turns before the answer, the last of them being the text under `asked`, and the keys they stand under."""
    dialogue: Dialogue = []
    for entry in row.get("history") or []:
        if not isinstance(entry, list) or len(entry) != 2:
            raise RecordError("'history' is not a list of pairs", remedy="Write [[question, answer], ...].")
        dialogue += [said("user", text_of(entry[0], "history")), said("assistant", text_of(entry[1], "history"))]
    # Only under `instruction` do context and input mean text to be read; beside a question they may be anything, and
    # stay in the meta.
    beside = [key for key in ("context", "input") if row.get(key)] if asked == "instruction" else []
    if len(beside) > 1:
        raise RecordError("the row has both 'context' and 'input'", remedy="Keep one of them, or import it as json.")
    given = text_of(row[beside[0]], beside[0]) if beside else ""
    dialogue.append(said("user", with_input(text_of(row[asked], asked), given)))
    return dialogue, (asked, "history", *(("context", "input") if asked == "instruction" else ()))


def _of_messages(row: Row, asked: str, answered: str, image_root: str) -> Record:
    both = [*objects_of(row, asked), *objects_of(row, answered)]
    beside = {key: value for key, value in row.items() if key not in (asked, answered)}
    return messages({**beside, "messages": both}, image_root=image_root)


def preference(row: Row, *, image_root: str = "") -> Record:
    """A chosen and a rejected answer: {"prompt", "chosen", "rejected"}, each a text or a list of messages.

    TRL's pairs, with a prompt or with whole conversations; RLHF-V's and RLAIF-V's {"question", "image", ...};
    UltraFeedback's conversations beside the text of their prompt; LLaMA-Factory's {"instruction", "input", ...};
    OpenAI's {"input": {"messages"}, "preferred_output", "non_preferred_output"}; hh-rlhf's whole dialogues in one text.
    `preferences.py` reads the answers.
    """
    if is_hh(row.get("chosen")):
        row = {**row, **{key: hh_messages(text_of(row[key], key), key) for key in ("chosen", "rejected") if key in row}}
    chosen = next((row[key] for key in CHOSEN if row.get(key)), None)
    # One message is the answer alone; more are the conversation that it ends, as TRL writes pairs without a prompt.
    whole = isinstance(chosen, list) and len(chosen) > 1
    asked = next((key for key in (*ASKED, "messages", "input") if row.get(key) is not None), "")
    value = row.get(asked)
    if is_hh(value):
        value = hh_messages(text_of(value, asked), asked)
        value = value if value[-1]["content"] else value[:-1]  # "Assistant:" at the end is where the answer goes
    beside = {key: item for key, item in row.items() if key != asked}
    if isinstance(value, dict) and "messages" in value:
        return messages({**beside, **value}, image_root=image_root)
    if isinstance(value, list):
        return messages({**beside, "messages": value}, image_root=image_root)
    if whole:
        # Without its last message: that is the chosen answer, which `preferences` reads from the meta.
        talk = messages({**beside, "messages": objects_of({"chosen": chosen}, "chosen")[:-1]}, image_root=image_root)
        # The text of the prompt is said twice then, and must be the same, or one of the two is not what was answered.
        if isinstance(value, str) and value.strip() not in [turn.text.strip() for turn in talk.turns]:
            problem = f"'{asked}' is said nowhere in the conversation of the chosen answer"
            raise RecordError(problem, remedy="Keep the one that is right.")
        return talk
    if not asked:
        raise RecordError("the row has a chosen answer and no prompt", remedy=_WHERE)
    dialogue, used = _asking(row, asked)
    return Record(place_images(dialogue, images_of(row, image_root)), id=id_of(row), meta=rest(row, *used))


def in_turn(row: Row, *, image_root: str = "", key: str = "data") -> Record:
    """Questions and answers in turn, as texts: UltraChat's {"id", "data": [...]}, LIMA's {"conversations": [...]}."""
    # Known limit: a text is a question or an answer by its place alone, so a file that lost one would swap speakers
    # unseen.
    texts = row.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        remedy = "These rows hold question and answer in turn, as texts."
        raise RecordError(f"'{key}' is not a list of texts, or is empty", remedy=remedy)
    turns = [said("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    return Record(tuple(turns), id=id_of(row), meta=rest(row, key))


def xlam(row: Row, *, image_root: str = "") -> Record:
    """xlam-function-calling-60k: {"query", "tools", "answers"}, the last two as the JSON text of a list.

    Its schemas describe each argument under its name, without JSON Schema's `properties`; they stay as they are.
    """
    asked = said("user", text_of(row.get("query"), "query"))
    answer = Turn("assistant", (), tool_calls=calls_of(row.get("answers"), "'answers'"))
    return Record((asked, answer), id=id_of(row), meta=rest(row, "query", "answers"))


def cauldron(row: Row, *, image_root: str = "") -> Record:
    """The Cauldron: {"images": [...], "texts": [{"user", "assistant", "source"}, ...]}; the pictures come first."""
    turns: Dialogue = []
    sources = []
    for number, entry in enumerate(objects_of(row, "texts"), 1):
        turns.append(said("user", text_of(entry.get("user"), f"user of text {number}")))
        # Keys beside a pair say something of its answer; the number is that of the answer's turn, for messages.
        found, left = turn_extras(entry, "assistant", 2 * number, used=("user", "assistant"))
        turns.append(
            replace(said("assistant", text_of(entry.get("assistant"), f"assistant of text {number}")), **found)
        )
        sources.append(left)
    # A list with a place for each pair, empty ones among them: which answer a key belonged to is not lost.
    meta = rest(row, "texts") | ({"turn_keys": sources} if any(sources) else {})
    return Record(images_first(turns, images_of(row, image_root) or []), id=id_of(row), meta=meta)


_QUESTION_KEYS, _ANSWER_KEYS = ("human", "input", "user", "question"), ("assistant", "output", "bot", "answer")


def conversation(row: Row, *, image_root: str = "") -> Record:
    """A list under `conversation`: messages (Mantis), or pairs {"human" | "input", "assistant" | "output"}.

    Pairs are written by ms-swift and XTuner, whose first pair may hold a `system` text.
    """
    entries = objects_of(row, "conversation")
    if "role" in entries[0]:
        return messages(row, image_root=image_root)
    turns: Dialogue = []
    kept: list[Row] = []
    for number, entry in enumerate(entries, 1):
        asked = next((key for key in _QUESTION_KEYS if key in entry), "")
        answered = next((key for key in _ANSWER_KEYS if key in entry), "")
        if not asked or not answered:
            problem = f"entry {number} of 'conversation' has the keys {', '.join(map(str, entry))}"
            raise RecordError(problem, remedy='Write {"human", "assistant"} pairs, or messages with role and content.')
        if entry.get("system"):
            if number > 1:
                raise RecordError(f"entry {number} has a system text", remedy="Only the first may have one.")
            turns.append(said("system", text_of(entry["system"], "system")))
        turns.append(said("user", text_of(entry[asked], f"{asked} of entry {number}")))
        found, left = turn_extras(entry, "assistant", 2 * number, used=(asked, answered, "system"))
        turns.append(replace(said("assistant", text_of(entry[answered], f"{answered} of entry {number}")), **found))
        kept.append(left)
    meta = rest(row, "conversation") | ({"turn_keys": kept} if any(kept) else {})
    return Record(place_images(turns, images_of(row, image_root)), id=id_of(row), meta=meta)


def self_instruct_rows(path: str) -> Rows:
    """Yield one row for each instance of a task, numbered by the task's line."""
    for number, task in json_rows(path):
        instances = task.get("instances") if isinstance(task, dict) else None
        if not isinstance(instances, list) or not instances:
            yield number, task
            continue
        for instance in instances:
            # All under the line of their task: that is where a bad one is looked up.
            yield number, {**task, "instances": [instance]}


def self_instruct(row: Row, *, image_root: str = "") -> Record:
    """Self-Instruct's seed_tasks.jsonl: {"id", "name", "instruction", "instances": [{"input", "output"}, ...]}.

    A task with several instances becomes as many records.
    """
    instances = objects_of(row, "instances")
    # As a row of JSONL a task cannot become several records, since a row is one; the file's own reader cuts it.
    if len(instances) != 1:
        problem = f"the row has {len(instances)} instances"
        raise RecordError(problem, remedy="Import the file as self_instruct, which makes a record of each.")
    given: Any = instances[0].get("input") or ""
    asked = with_input(text_of(row.get("instruction"), "instruction"), text_of(given, "input"))
    turns = (said("user", asked), said("assistant", text_of(instances[0].get("output"), "output")))
    return Record(turns, id=id_of(row), meta=rest(row, "instruction", "instances"))


FORMATS = {
    "prompt_completion": Format(
        "prompt and completion, texts or messages (TRL)", pair, detect=("prompt", "completion")
    ),
    "prompt_response": Format("prompt and response", pair, detect=("prompt", "response")),
    "query_response": Format("query and response, with history (ms-swift)", pair, detect=("query", "response")),
    "question_response": Format(
        "question and response, with system_prompt (OpenOrca)", pair, detect=("question", "response")
    ),
    "question_answer": Format("question and answer", pair, detect=("question", "answer")),
    "instruction_response": Format("instruction and response", pair, detect=("instruction", "response")),
    "dolly": Format("instruction, context and response", pair, detect=("instruction", "context", "response")),
    "preference": Format("a prompt, a chosen and a rejected answer", preference, detect=("chosen", "rejected")),
    "preference_openai": Format(
        "OpenAI's preferred and non-preferred output", preference, detect=("preferred_output", "non_preferred_output")
    ),
    "ultrachat": Format("UltraChat: questions and answers in turn", in_turn, detect=("id", "data")),
    "lima": Format("LIMA: questions and answers in turn, under 'conversations'", partial(in_turn, key="conversations")),
    "xlam": Format("xLAM: a query, tools and the calls that answer it", xlam, detect=("query", "tools", "answers")),
    "cauldron": Format("the Cauldron: images and texts of user and assistant", cauldron, detect=("texts",)),
    "conversation": Format("messages or pairs under 'conversation' (Mantis)", conversation, detect=("conversation",)),
    "self_instruct": Format(
        "Self-Instruct's seed tasks: an instruction with instances",
        self_instruct,
        self_instruct_rows,
        detect=("instruction", "instances"),
    ),
}
