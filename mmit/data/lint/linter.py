"""The linter: reads records once, applies the rules of mmit/data/lint/rules.py and reports what they find.

Takes rows (records, and the errors of rows that are none), gives a Report with every finding and its place. Without
a tokenizer it measures no token, without `open_images` it opens no picture; the report says what was not checked.
Keeps about 1 KB per record, never the records. Changes nothing and repairs nothing.
"""

from __future__ import annotations

import math
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from mmit.data.image_identity import image_name
from mmit.data.lint.images import ImageChecks
from mmit.data.lint.near_duplicates import TextSignatures
from mmit.data.lint.rules import RECORD_RULES, RULES, SEVERITIES, Check, control_check, rule_of
from mmit.errors import RecordError
from mmit.records import Record

_LONG_ANSWER = 40  # characters; shorter answers are shared by many prompts for good reasons
_LEAST_RECORDS = 50  # for outliers: below, nothing is usual
_RARE_SCRIPT = 0.01
_FAR = 6.0  # standard deviations, estimated robustly, of the logarithm of the length

Measure = Callable[[Record], int]


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a rule found something."""

    where: str
    problem: str


@dataclass
class Report:
    """What the linter found; `not_checked` is {what: why}, `kept` {key that stays in the meta unread: rows}."""

    records: int = 0
    test_records: int = 0
    seconds: float = 0.0
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    not_checked: dict[str, str] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)  # what the records hold, in words
    kept: Counter[str] = field(default_factory=Counter)

    def add(self, rule: str, where: str, problem: str) -> None:
        """Note a finding under a key of RULES."""
        self.findings.setdefault(rule, []).append(Finding(where, problem))

    def count(self, severity: str) -> int:
        """Findings of one severity."""
        return sum(len(found) for rule, found in self.findings.items() if RULES[rule].severity == severity)

    def to_json(self) -> dict[str, Any]:
        """Return the whole report, rules in order of severity, every finding with its place."""
        found = {name: self.findings[name] for name in RULES if name in self.findings}
        return {
            "records": self.records,
            "test_records": self.test_records,
            "seconds": round(self.seconds, 3),
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "sources": dict(self.sources),
            "licences": dict(self.licences),
            "not_checked": self.not_checked,
            "read": self.read,
            "kept_in_meta_only": dict(self.kept),
            "rules": {
                name: {
                    "severity": RULES[name].severity,
                    "about": RULES[name].about,
                    "remedy": RULES[name].remedy,
                    "count": len(rows),
                    "rows": [{"where": row.where, "problem": row.problem} for row in rows],
                }
                for name, rows in found.items()
            },
        }


def lint(
    rows: Iterable[Record | RecordError],
    *,
    test: Iterable[Record | RecordError] = (),
    measure: Measure | None = None,
    differs: Callable[[Record], str] | None = None,
    max_length: int | None = None,
    control_tokens: Iterable[str] = (),
    open_images: bool = False,
) -> Report:
    """Check training records, and that none of the `test` records or their images are among them.

    Args:
        rows: of the training data. test: of the test data, which itself is not checked.
        measure: tokens that a record takes in the model; raises RecordError where it cannot be written.
        differs: where its text differs from the chat template's, "" for nowhere.
        max_length: more tokens than this are a finding.
        control_tokens: of the tokenizer at hand, to be looked for as text.
        open_images: decode every picture, and compare them by content too.
    """
    start = time.perf_counter()
    report = Report()
    state = _State(report, ImageChecks(report.add, open_images=open_images))
    checks = {"control-text": control_check(control_tokens), **RECORD_RULES}
    for row in rows:
        report.records += 1
        if isinstance(row, RecordError):
            # The reader could not make a record of it, and its error says which rule was broken.
            report.add(rule_of(row), row.where or f"record {report.records}", row.problem)
            continue
        _check_record(row, report, checks)
        if measure is not None:
            _check_tokens(row, report, measure, differs, max_length=max_length)
        state.take(row)
    for row in test:
        report.test_records += 1
        if isinstance(row, Record):
            state.take_test(row)
    state.compare()
    report.not_checked = _not_checked(measure, max_length, open_images=open_images, test=report.test_records)
    report.seconds = time.perf_counter() - start
    return report


def _not_checked(measure: Measure | None, max_length: int | None, *, open_images: bool, test: int) -> dict[str, str]:
    out = {}
    if measure is None:
        out["tokens"] = "no tokenizer was given"
    elif max_length is None:
        out["longer than the context"] = "no context length is known"
    if not open_images:
        out["content of images"] = "images were not opened"
    if not test:
        out["overlap with test data"] = "no test data was given"
    return out


def _check_record(record: Record, report: Report, checks: dict[str, Check]) -> None:
    try:
        # The readers let a record end with the user's turn, since they do not know what it is for.
        record.validate(for_training=True)
    except RecordError as error:
        report.add(rule_of(error), record.where, error.problem)
    for rule, check in checks.items():
        if problem := check(record):
            report.add(rule, record.where, problem)


def _check_tokens(
    record: Record,
    report: Report,
    measure: Measure,
    differs: Callable[[Record], str] | None,
    *,
    max_length: int | None,
) -> None:
    try:
        length = measure(record)
        if differs is not None and (found := differs(record)):
            report.add("not-the-template", record.where, found)
    except RecordError as error:
        if rule_of(error) not in ("no-answer", "empty-turn"):  # told already
            report.add("not-encodable", record.where, error.problem)
        return
    if max_length is not None and length > max_length:
        report.add("too-long", record.where, f"{length:,} tokens where {max_length:,} fit")


class _State:
    """What is kept of each record in order to compare it with the others; test records come last."""

    def __init__(self, report: Report, images: ImageChecks) -> None:
        self._report, self._images = report, images
        self._where: list[str] = []
        self._texts = TextSignatures()
        self._codes: list[int] = []
        self._answers: dict[int, tuple[int, int]] = {}  # answer -> (first row, its record's code)
        self._scripts: list[str] = []
        self._prompts: list[int] = []
        self._replies: list[int] = []
        self._train = 0

    def take(self, record: Record) -> None:
        """Keep a training record."""
        self._report.sources[record.source or "not stated"] += 1
        self._report.licences[record.licence or "not stated"] += 1
        row, text = len(self._where), self._keep(record, test=False)
        self._train = row + 1
        # Hashes and lengths are kept, not texts: millions of records must fit into memory.
        answers = [turn.text for turn in record.turns if turn.role == "assistant"]
        self._scripts.append(main_script(text))
        self._prompts.append(sum(len(turn.text) for turn in record.turns if turn.role == "user"))
        self._replies.append(sum(map(len, answers)))
        for answer in {a.strip() for a in answers}:
            if len(answer) < _LONG_ANSWER:
                continue
            first, code = self._answers.setdefault(hash(answer), (row, self._codes[row]))
            # A copy of the whole record is told as that, and not a second time for its answers.
            if first != row and code != self._codes[row]:
                self._report.add("duplicate-answer", record.where, f"as in {self._where[first]}: '{answer[:60]}'")

    def take_test(self, record: Record) -> None:
        """Keep a record of the test data."""
        self._keep(record, test=True)

    def _keep(self, record: Record, *, test: bool) -> str:
        self._images.take(record, test=test)
        text = "\n".join([turn.text for turn in record.turns])
        # Short questions are asked of many pictures: only records with the same pictures are compared.
        key = hash(tuple([image_name(image) for image in record.images])) if record.images else 0
        self._where.append(record.where)
        self._texts.add(text, key=key)
        self._codes.append(hash((text, key)))
        return text

    def compare(self) -> None:
        """Find what only shows between records."""
        exact: dict[int, int] = {}
        test = {self._codes[row]: row for row in range(self._train, len(self._codes))}
        copies = set()
        for row, code in enumerate(self._codes[: self._train]):
            if code in test:
                self._report.add("test-record", self._where[row], f"is {self._where[test[code]]}")
            first = exact.setdefault(code, row)
            if first != row:
                copies.add(row)
                self._report.add("duplicate-record", self._where[row], f"is {self._where[first]}")
        # Exact copies have been told above.
        for row, model in sorted(self._texts.pairs(first=self._train).items()):
            if row >= self._train or row in copies or self._codes[row] in test:
                continue
            rule = "near-duplicate-record" if model < self._train else "test-record-near"
            self._report.add(rule, self._where[row], f"is nearly {self._where[model]}")
        self._images.compare()
        _outliers(self._report, self._where, self._scripts, lengths={"prompt": self._prompts, "answer": self._replies})
        if len(self._report.licences) > 1:
            listed = ", ".join(f"{name} ({count:,})" for name, count in self._report.licences.most_common())
            self._report.add("licence-mix", f"{len(self._report.licences)} licences", listed)


# --- outliers -----------------------------------------------------------------------------------------------------


def main_script(text: str) -> str:
    """Return the script most letters of `text` are in: "LATIN", "CYRILLIC", "CJK", ...; "" without letters.

    The first word of the letters' Unicode names; Chinese characters and kana count as CJK. A script is not a
    language: English and Vietnamese are both Latin.
    """
    if text.isascii():
        return "LATIN" if any(map(str.isalpha, text[:200])) or any(map(str.isalpha, text)) else ""
    found: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if name := _script(char):
            found[name] += count
    return found.most_common(1)[0][0] if found else ""


@cache
def _script(char: str) -> str:
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "").split(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "KATAKANA-HIRAGANA") else name


def _outliers(
    report: Report, where: Sequence[str], scripts: Sequence[str], *, lengths: dict[str, Sequence[int]]
) -> None:
    if len(scripts) < _LEAST_RECORDS:
        return
    counts = Counter(script for script in scripts if script)
    rare = {s for s, n in counts.items() if n <= _RARE_SCRIPT * len(scripts)}
    for row, script in enumerate(scripts):
        if script in rare:
            most = counts.most_common(1)[0][0].capitalize()
            report.add("script-outlier", where[row], f"{script.capitalize()} among mostly {most} records")
    for name, values in lengths.items():
        # In logarithms: lengths spread over orders of magnitude, and a long tail is no outlier by itself.
        logs = np.log1p(np.array(values, dtype=np.float64))
        # Median and MAD, since the outliers that are looked for would move mean and standard deviation.
        middle = float(np.median(logs))
        # 1.4826 MADs are a standard deviation of normal data; the least keeps near-constant lengths from being strict.
        spread = max(1.4826 * float(np.median(np.abs(logs - middle))), 0.25)
        for row in np.flatnonzero(np.abs(logs - middle) > _FAR * spread).tolist():
            usual = round(math.expm1(middle))
            report.add("length-outlier", where[row], f"{name} of {values[row]:,} characters; the median is {usual:,}")
