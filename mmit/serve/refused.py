"""Why a request gets no answer, as OpenAI's API says it: status, message with the remedy, type, parameter, code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmit.errors import ImageError, MmitError, TooLong
from mmit.serve.engine import Closing, ModelUnknown, QueueFull
from mmit.text import plain

# The type that OpenAI's API has for a status; other 4xx are the request's, other 5xx the server's.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_S = 1  # a place in the queue comes free with every answer


class Refused(Exception):
    """A request that is refused.

    Args:
        status: of HTTP. problem, remedy: sentences without their last stop.
        param: what of the request is at fault, such as "messages[0].content". code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        problem: str,
        remedy: str = "",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.param, self.code = status, param, code
        self.message = plain(". ".join(text.rstrip(".") for text in (problem, remedy) if text) + ".")
        self.headers = dict(headers or {})
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def full(problem: str) -> Refused:
    """The refusal of a request for which there is no room now."""
    headers = {"retry-after": str(RETRY_S)}
    return Refused(429, problem, "Ask again later", code="queue_full", headers=headers)


def closing() -> Refused:
    """The refusal of whatever comes, or is not finished, while the server ends."""
    headers = {"retry-after": "10", "connection": "close"}
    return Refused(503, "the server is shutting down", "Ask again when it is back", code="closing", headers=headers)


def refusal_of(error: MmitError, *, param: str | None = None) -> Refused:
    """The refusal that an error of the model's own checks means."""
    if isinstance(error, QueueFull):
        return full(error.problem)
    if isinstance(error, Closing):
        return closing()
    if isinstance(error, ModelUnknown):
        return Refused(404, error.problem, error.remedy, param="model", code="model_not_found")
    code = "invalid_value"
    if isinstance(error, TooLong):
        code = "context_length_exceeded"
    elif isinstance(error, ImageError):
        code = "invalid_image"
    return Refused(400, error.problem, error.remedy, param=param, code=code)
