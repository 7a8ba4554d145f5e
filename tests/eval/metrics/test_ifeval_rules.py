"""IFEval's instructions, each with texts that obey and that do not; words and sentences as they are counted."""

from __future__ import annotations

import pytest

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS, ifeval_rules
from mmit.eval.metrics.ifeval import follows
from mmit.eval.metrics.ifeval_rules import RULES, WORD_TOOLS

WORDS = WORD_TOOLS["builtin"]()
CASES = [
    ("keywords:existence", {"keywords": ["sun", "Moon"]}, ["The SUN and moon."], ["sun only"]),
    (
        "keywords:frequency",
        {"keyword": "ab", "frequency": 2, "relation": "at least"},
        ["ab cab"],
        ["ab", "a b"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, ["nothing here"], ["No!"]),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
        ["Quite"],
        ["Queue of q"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        ["Dr. Ray met J. Doe. He left!", "One, e.g. this."],
        ["One. Two? Three!"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n***\ntwo\n***"],
        ["one", "a *** *** b"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        ["one, two-three"],
        ["it's"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
        ['x\n\n"hello, you'],
        ["hello\n\nx", "x\n\nhello\n\ny", "x"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b c]"], ["[a]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\np.s. y"], ["ps: x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P. P. S. y"], ["p.s. x"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n  - b"], ["* a", "** a **\n- b"]),
    ("detectable_format:constrained_response", {}, ["Well: My answer is maybe."], ["My answer is maybe"]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*"],
        ["*a* **", "* *"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1 a section 2 b"],
    ),
    ("detectable_format:json_format", {}, ['```json\n{"a": 1}\n```', "[1]"], ["{'a': 1}", "a"]),
    ("detectable_format:title", {}, ["<<song>>"], ["<< >>", "<song>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, ["say HI now"], ["I say hi"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['"... the END."'], ["the end. Not."]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["GO, WELL-KNOWN one", "DON'T"],
        ["GO now"],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    ("startend:quotation", {}, [' "a" '], ['"', '"a']),
]


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES, ids=[c[0] for c in CASES])
def test_instruction(name, kwargs, good, bad):
    for text in good:
        assert follows(text, name, kwargs=kwargs, words=WORDS), text
    for text in (*bad, "", " \n"):
        assert not follows(text, name, kwargs=kwargs, words=WORDS), text


def test_every_instruction_has_a_case():
    language = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}
    assert {c[0] for c in CASES} == set(RULES) - language


@pytest.mark.parametrize(
    ("name", "kwargs", "good", "bad"),
    [
        ("language:response_language", {"language": "fr"}, "bonjour", "hello"),
        ("change_case:english_capital", {}, "HELLO", "BONJOUR"),
        ("change_case:english_lowercase", {}, "hello", "Hello"),
    ],
)
def test_language_instructions(monkeypatch, name, kwargs, good, bad):
    monkeypatch.setattr(ifeval_rules, "language", lambda text: "fr" if "bon" in text.lower() else "en")
    assert follows(good, name, kwargs=kwargs, words=WORDS)
    assert not follows(bad, name, kwargs=kwargs, words=WORDS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No mark", 1),
        ("Mr. Fox ran. He (the fox) hid!", 2),
        ("Is it 3.5? Yes.", 2),
        ("Wait... what? Go", 3 - 1),
        ('He said "Go." Then left.', 2),
        ("I. Go.", 2),
    ],
)
def test_builtin_sentences(text, count):
    assert WORDS.sentences(text) == count


def test_with_the_published_tokeniser():
    try:
        words = WORD_TOOLS["nltk"]()
    except MmitError as error:
        pytest.skip(error.problem)
    text = "Dr. Smith left at 5 p.m. on Jan. 3. Why? HE said: 'NO WAY!'"
    assert words.sentences(text) == WORDS.sentences(text)
    assert [w for w in words.tokens(text) if w.isupper()] == [w for w in WORDS.tokens(text) if w.isupper()]
    row = {"instruction_id_list": ["length_constraints:number_sentences"]}
    row["kwargs"] = [{"num_sentences": 4, "relation": "less than"}]
    assert METRICS["ifeval:strict-nltk"](["Dr. Smith ran. Why? No."], [row]).value == 1


def test_languages_are_told_by_langdetect():
    pytest.importorskip("langdetect")
    french = "Bonjour, je ne sais pas ce que vous voulez dire par cette phrase."
    assert follows(french, "language:response_language", kwargs={"language": "fr"}, words=WORDS)
    assert not follows(french.upper(), "change_case:english_capital", kwargs={}, words=WORDS)
