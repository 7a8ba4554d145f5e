"""The verifiable instructions of IFEval, one function each, and the two ways to count sentences and words.

In: an answer and the instruction's arguments. Out: obeyed or not. Where the published code draws a missing
argument at random, the caller refuses the row instead; no argument is ever invented here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmit.errors import MmitError


@dataclass(frozen=True, slots=True)
class Words:
    """How texts are cut: `sentences` counts them, `tokens` lists words and marks."""

    sentences: Callable[[str], int]
    tokens: Callable[[str], list[str]]


_ABBREVIATIONS = frozenset(
    (
        "mr mrs ms dr prof st sr jr vs etc e.g i.e inc ltd co corp gen col sen rep rev hon capt lt sgt jan "
        "feb mar apr aug sept oct nov dec no vol fig al approx dept est u.s u.k a.m p.m"
    ).split()
)
_END = re.compile(r"(\S*?)([.?!]+)[\"'”’)\]]*(?=\s|$)")
_CONTRACTION = re.compile(r"(?i)(n't|'s|'m|'d|'ll|'re|'ve)$")
_MARKS = re.compile(r"\.\.\.|--|[;@#$%&?!\[\](){}<>\"“”`]|[:,](?!\d)")


def _count_sentences(text: str) -> int:
    """Count nearly as the Punkt model: an abbreviation or initial does not end a sentence."""
    count, last = 0, 0
    for match in _END.finditer(text):
        word, marks = match.group(1).lstrip("\"'“‘([").lower(), match.group(2)
        following = text[match.end() :].lstrip()
        initial = len(word) == 1 and word.isalpha() and word != "i"
        weak = marks == "." and (word in _ABBREVIATIONS or initial)
        dots = len(marks) > 1 and set(marks) == {"."}
        if following and (weak or (dots and following[:1].islower())):
            continue
        count, last = count + 1, match.end()
    return count + bool(text[last:].strip())


def _split_tokens(text: str) -> list[str]:
    """Cut words from marks and contractions as the Penn Treebank does; hyphenated words stay whole."""
    found: list[str] = []
    for word in _MARKS.sub(lambda m: f" {m.group()} ", text).split():
        # Only the last period of a sentence is cut off there; elsewhere "U.S." keeps it, which no rule here
        # sees.
        core = word.strip("'")
        cut = _CONTRACTION.search(core)
        found.extend([core[: cut.start()], cut.group()] if cut and cut.start() else [core or word])
    return found


def _builtin() -> Words:
    return Words(_count_sentences, _split_tokens)


def _nltk() -> Words:
    if find_spec("nltk") is None:
        raise MmitError(
            "the tokeniser 'nltk' needs the package nltk",
            where="ifeval",
            remedy="pip install 'mmit-tune[ifeval]', python -m nltk.downloader punkt_tab; or use tokeniser=builtin.",
        )
    nltk = import_module("nltk")
    try:
        nltk.sent_tokenize("One. Two.")
    except LookupError as error:
        raise MmitError(
            "nltk has no punkt data",
            where="ifeval",
            remedy="Run python -m nltk.downloader punkt_tab, or use tokeniser=builtin.",
        ) from error
    return Words(lambda text: len(nltk.sent_tokenize(text)), nltk.word_tokenize)


WORD_TOOLS: dict[str, Callable[[], Words]] = {"builtin": _builtin, "nltk": _nltk}


def language(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language, None where there is nothing to tell it by."""
    if find_spec("langdetect") is None:
        raise MmitError(
            "an instruction about the language of the answer needs the package langdetect",
            where="ifeval",
            remedy="pip install 'mmit-tune[ifeval]', or langdetect alone.",
        )
    langdetect = import_module("langdetect")
    # Its detector is random unless seeded.
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


Arguments = Mapping[str, Any]


def _compare(count: int, relation: str, threshold: int) -> bool:
    if relation == "less than":
        return count < threshold
    if relation == "at least":
        return count >= threshold
    raise MmitError(f"unknown relation {relation!r}", where="ifeval", remedy="valid: less than, at least")


def _keywords(text: str, a: Arguments, words: Words) -> bool:
    return all(re.search(k, text, flags=re.IGNORECASE) for k in a["keywords"])


def _keyword_frequency(text: str, a: Arguments, words: Words) -> bool:
    found = re.findall(a["keyword"].strip(), text, flags=re.IGNORECASE)
    return _compare(len(found), a["relation"], a["frequency"])


def _forbidden(text: str, a: Arguments, words: Words) -> bool:
    return not any(re.search(rf"\b{w}\b", text, flags=re.IGNORECASE) for w in a["forbidden_words"])


def _letter_frequency(text: str, a: Arguments, words: Words) -> bool:
    count = text.lower().count(a["letter"].strip().lower())
    # Anything but "less than" counts as "at least" here, and for capital words.
    wanted: int = a["let_frequency"]
    return count < wanted if a["let_relation"] == "less than" else count >= wanted


def _response_language(text: str, a: Arguments, words: Words) -> bool:
    return language(text) in (a["language"], None)


def _number_sentences(text: str, a: Arguments, words: Words) -> bool:
    return _compare(words.sentences(text), a["relation"], a["num_sentences"])


def _number_paragraphs(text: str, a: Arguments, words: Words) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not p.strip() for p in parts[1:-1]):
        return False
    # Only the outermost parts may be empty, and a lone empty part counts once.
    ends = {0, len(parts) - 1}
    return bool(len(parts) - sum(not parts[i].strip() for i in ends) == a["num_paragraphs"])


def _number_words(text: str, a: Arguments, words: Words) -> bool:
    return _compare(len(re.findall(r"\w+", text)), a["relation"], a["num_words"])


def _nth_paragraph_first_word(text: str, a: Arguments, words: Words) -> bool:
    parts = text.split("\n\n")
    count, nth = sum(bool(p.strip()) for p in parts), a["nth_paragraph"]
    if not 1 <= nth <= count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split("[.,?!'\"]", word)[0].lower()
    return bool(count == a["num_paragraphs"] and first == a["first_word"].lower())


def _placeholders(text: str, a: Arguments, words: Words) -> bool:
    return bool(len(re.findall(r"\[.*?\]", text)) >= a["num_placeholders"])


def _postscript(text: str, a: Arguments, words: Words) -> bool:
    marker = a["postscript_marker"].strip()
    forms = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    form = forms.get(marker, rf"\s*{marker.lower()}.*$")
    return re.search(form, text.lower(), flags=re.MULTILINE) is not None


def _bullets(text: str, a: Arguments, words: Words) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return bool(len(stars) + len(dashes) == a["num_bullets"])


def _constrained(text: str, a: Arguments, words: Words) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, a: Arguments, words: Words) -> bool:
    single = sum(bool(h.strip("*").strip()) for h in re.findall(r"\*[^\n\*]*\*", text))
    double = sum(bool(h[2:-2].strip()) for h in re.findall(r"\*\*[^\n\*]*\*\*", text))
    return bool(single + double >= a["num_highlights"])


def _sections(text: str, a: Arguments, words: Words) -> bool:
    heads = re.split(rf"\s?{a['section_spliter'].strip()}\s?\d+\s?", text)
    return bool(len(heads) - 1 >= a["num_sections"])


def _json(text: str, a: Arguments, words: Words) -> bool:
    body = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(text: str, a: Arguments, words: Words) -> bool:
    return any(t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, a: Arguments, words: Words) -> bool:
    parts = text.split("******")
    if any(not p.strip() for p in parts[1:-1]):
        return False
    answers = [p.strip() for p in parts if p.strip()]
    return len(answers) == 2 and answers[0] != answers[1]


def _repeat_prompt(text: str, a: Arguments, words: Words) -> bool:
    return text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())


def _end(text: str, a: Arguments, words: Words) -> bool:
    return text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower())


def _capital_words(text: str, a: Arguments, words: Words) -> bool:
    count = sum(w.isupper() for w in words.tokens(text))
    below = a["capital_relation"] == "less than"
    wanted: int = a["capital_frequency"]
    return count < wanted if below else count >= wanted


def _all_capitals(text: str, a: Arguments, words: Words) -> bool:
    return text.isupper() and language(text) in ("en", None)


def _all_lowercase(text: str, a: Arguments, words: Words) -> bool:
    return text.islower() and language(text) in ("en", None)


def _no_comma(text: str, a: Arguments, words: Words) -> bool:
    return "," not in text


def _quotation(text: str, a: Arguments, words: Words) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


Rule = tuple[tuple[str, ...], Callable[[str, Arguments, Words], bool]]
# The arguments each instruction needs, and its check.
RULES: dict[str, Rule] = {
    "keywords:existence": (("keywords",), _keywords),
    "keywords:frequency": (("keyword", "frequency", "relation"), _keyword_frequency),
    "keywords:forbidden_words": (("forbidden_words",), _forbidden),
    "keywords:letter_frequency": (("letter", "let_frequency", "let_relation"), _letter_frequency),
    "language:response_language": (("language",), _response_language),
    "length_constraints:number_sentences": (("num_sentences", "relation"), _number_sentences),
    "length_constraints:number_paragraphs": (("num_paragraphs",), _number_paragraphs),
    "length_constraints:number_words": (("num_words", "relation"), _number_words),
    "length_constraints:nth_paragraph_first_word": (
        ("num_paragraphs", "nth_paragraph", "first_word"),
        _nth_paragraph_first_word,
    ),
    "detectable_content:number_placeholders": (("num_placeholders",), _placeholders),
    "detectable_content:postscript": (("postscript_marker",), _postscript),
    "detectable_format:number_bullet_lists": (("num_bullets",), _bullets),
    "detectable_format:constrained_response": ((), _constrained),
    "detectable_format:number_highlighted_sections": (("num_highlights",), _highlights),
    "detectable_format:multiple_sections": (("section_spliter", "num_sections"), _sections),
    "detectable_format:json_format": ((), _json),
    "detectable_format:title": ((), _title),
    "combination:two_responses": ((), _two_responses),
    "combination:repeat_prompt": (("prompt_to_repeat",), _repeat_prompt),
    "startend:end_checker": (("end_phrase",), _end),
    "change_case:capital_word_frequency": (("capital_frequency", "capital_relation"), _capital_words),
    "change_case:english_capital": ((), _all_capitals),
    "change_case:english_lowercase": ((), _all_lowercase),
    "punctuation:no_comma": ((), _no_comma),
    "startend:quotation": ((), _quotation),
}
# Those whose rule asks which language a text is in.
NEEDS_LANGUAGE = frozenset(
    ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
)
