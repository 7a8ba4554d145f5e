"""LLaVA's evaluation step with an mmit model: a question file in, an answer file out.

In: JSONL with question_id, image (or none) and text, and a folder of pictures. Out: JSONL with question_id, prompt,
text, answer_id, model_id and metadata, one line per question in their order. The flags are LLaVA's, so its scripts
need only another file name.

python scripts/eval/answer.py --model-path runs/x --question-file q.jsonl --image-folder images --answers-file a.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, MmitError, RecordError
from mmit.records import Image, Record, Text, Turn, image_at, json_lines


def questions(path: str, folder: str) -> list[tuple[dict[str, Any], Record]]:
    """Return each row of a question file with its record. Raises RecordError naming file and line."""
    found = []
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        if isinstance(row, RecordError):
            raise row
        if not isinstance(row, dict) or not {"question_id", "text"} <= row.keys():
            raise RecordError("no question_id or no text", where=where, remedy="Give LLaVA's question file.")
        parts: list[Text | Image] = [image_at(row["image"], folder, where=where)] if row.get("image") else []
        parts.append(Text(row["text"].replace("<image>\n", "").replace("<image>", "")))
        found.append((row, Record((Turn("user", tuple(parts)),), str(row["question_id"]), path, number)))
    return found


def chunk(rows: Sequence[Any], count: int, index: int) -> Sequence[Any]:
    """Return part `index` of `count`, sizes differing by one at most; empty parts are fine."""
    if not 0 <= index < count:
        raise ConfigError(f"chunk {index} of {count}", where="--chunk-idx", remedy="Count chunks from 0.")
    return rows[index * len(rows) // count : (index + 1) * len(rows) // count]


def write_answers(
    path: Path, rows: Sequence[tuple[dict[str, Any], Record]], answers: Sequence[str], model: str
) -> None:
    """Write LLaVA's answer file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for (row, record), answer in zip(rows, answers, strict=True):
            line = {"question_id": row["question_id"], "prompt": record.turns[0].text, "text": answer}
            # VizWiz's submission names pictures, which LLaVA's own file leaves to the question file.
            metadata = {"image": row["image"]} if row.get("image") else {}
            line |= {"answer_id": uuid.uuid4().hex[:22], "model_id": model, "metadata": metadata}
            file.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--answers-file", type=Path, required=True)
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    try:
        rows = chunk(questions(given.question_file, given.image_folder), given.num_chunks, given.chunk_idx)
        answers: list[str] = []
        if rows:
            from mmit.generate import load

            answers = load(given.model_path, device=given.device).generate(
                [record for _, record in rows],
                batch_size=given.batch_size,
                max_new_tokens=given.max_new_tokens,
                temperature=given.temperature,
                top_p=given.top_p,
            )
        write_answers(given.answers_file, rows, answers, Path(given.model_path).name)
    except MmitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows):,} answers written to {given.answers_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
