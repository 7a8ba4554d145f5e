"""A refusal in OpenAI's words: the status and code that each of mmit's own errors means."""

from __future__ import annotations

import pytest

from mmit.errors import ConfigError, ImageError, MmitError, RecordError, TooLong
from mmit.serve.engine import Closing, ModelUnknown, QueueFull
from mmit.serve.refused import Refused, full, refusal_of


@pytest.mark.parametrize(
    ("kind", "status", "code", "param"),
    [
        (QueueFull, 429, "queue_full", None),
        (Closing, 503, "closing", None),
        (ModelUnknown, 404, "model_not_found", "model"),
        (TooLong, 400, "context_length_exceeded", "messages"),
        (ImageError, 400, "invalid_image", "messages"),
        (RecordError, 400, "invalid_value", "messages"),
        (ConfigError, 400, "invalid_value", "messages"),
    ],
)
def test_an_error_of_mmit_s_own_checks(kind: type[MmitError], status: int, code: str, param: str | None) -> None:
    found = refusal_of(kind("it is wrong.", where="somewhere", remedy="Set it right."), param="messages")
    assert (found.status, found.code, found.param) == (status, code, param)
    # Whoever may come again is told when.
    assert ("retry-after" in found.headers) == (status in (429, 503))
    if status in (400, 404):
        assert found.message == "it is wrong. Set it right."


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (504, "server_error"),
    ],
)
def test_the_type_follows_from_the_status(status: int, kind: str) -> None:
    body = Refused(status, "no", param="n", code="x").body()
    assert body == {"error": {"message": "no.", "type": kind, "param": "n", "code": "x"}}


def test_a_message_is_one_sentence_or_two_and_holds_no_control_characters() -> None:
    assert Refused(400, "a is wrong", "Write b.").message == "a is wrong. Write b."
    assert Refused(400, "a is wrong.").message == "a is wrong."
    assert "\x1b" not in Refused(400, "the file '\x1b[2Jname'").message
    one, other = full("the queue is full"), full("the queue is full")
    one.headers["x"] = "y"
    assert "x" not in other.headers
