from __future__ import annotations

import pytest

import tests.data.small_chats as sc
from mmit.data.chat import chat_format, encode
from mmit.errors import ConfigError, RecordError
from tests.data.small_chats import IMG, ONE, TALK, turns
from tests.data.small_tokenizers import family

BYTES = "byte_level"


@pytest.mark.parametrize(
    ("filter_", "kept"),
    [
        ("", "\n  a \n"),
        ("| trim", "a"),
        (".strip(' ')", "\n  a \n"),
        (".strip('\\n')", "  a "),
        (".lstrip()", "a \n"),
    ],
)
def test_template_trims_as_it_would_trim_the_text(filter_: str, kept: str) -> None:
    tokenizer = family(BYTES)
    chat = chat_format(
        "{% for m in messages %}{{ 'x:' + (m.content " + filter_ + ") + eos_token }}{% endfor %}", tokenizer
    )
    pieces = chat.pieces(turns(("user", "q"), ("assistant", "\n  a \n")))
    assert [p.text for p in pieces if p.kind == "content"] == ["q", kept]


LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "talk", "error", "message"),
    [
        (
            sc.GEMMA,
            TALK,
            RecordError,
            "refuses.*System role not supported(.|\n)*fold its text into the first user",
        ),
        (
            LOOP + "{% if loop.length > 2 %}{{ raise_exception('one exchange only') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            ONE + ONE,
            RecordError,
            "one exchange only(.|\n)*Change the record's turns",
        ),
        (
            LOOP + "{% if m.role != 'system' %}{{ m.content }}<|eos|>{% endif %}{% endfor %}",
            turns(("system", "s"), ("user", "q"), ("assistant", "a")),
            RecordError,
            "drops or alters the text of turn 1 .system.(.|\n)*Fold the system text",
        ),
        (
            LOOP + "{{ m.content | upper }}{% endfor %}",
            ONE,
            ConfigError,
            "drops or alters the text of turn 1 .user.",
        ),
        (LOOP + "{{ m.content + m.content }}{% endfor %}", ONE, ConfigError, "turn 1 .user. 2 times"),
        (
            "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
            ONE,
            ConfigError,
            "drops or alters the text of turn 2",
        ),
        (LOOP + "{{ m.content.lower( }}{% endfor %}", ONE, ConfigError, "the template fails"),
        (LOOP + "{{ m.content + 1 }}{% endfor %}", ONE, ConfigError, "the template fails: TypeError"),
        (
            sc.VLM_NO_END,
            turns(("user", ["a", IMG, "b"]), ("assistant", "c")),
            RecordError,
            "moves an image of turn 1 .user. to another place(.|\n)*before its text",
        ),
        (
            sc.LLAMA2,
            turns(("user", "q"), ("assistant", "a"), ("user", "q")),
            RecordError,
            "no answer to learn",
        ),
        ("plain", ONE, RecordError, "writes no prompt(.|\n)*Remove the text"),
        ("plain", turns(("system", "s"), ("user", [IMG]), ("assistant", "c")), RecordError, "no system turn"),
        ("plain", turns(*[("user", [IMG]), ("assistant", "c")] * 2), RecordError, "exactly one user turn"),
    ],
)
def test_templates_and_turns_that_do_not_fit(template: str, talk: list, error: type, message: str) -> None:
    tokenizer = family(BYTES)
    with pytest.raises(error, match=message):
        encode(talk, chat_format(template, tokenizer), tokenizer)
