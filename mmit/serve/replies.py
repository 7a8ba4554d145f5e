"""Answers as OpenAI's API tells them: one object at the end, or chunks while they are written.

In: the engine's events. Out: JSON objects. Sends nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mmit.serve.engine import Answering, End, Piece, TokenLogprob
from mmit.serve.refused import Refused, closing

if TYPE_CHECKING:
    from mmit.serve.requests import Wanted


class Reply:
    """The shapes of one request's answers."""

    def __init__(self, wanted: Wanted, answering: Answering) -> None:
        self._wanted, self._answering = wanted, answering
        kind = "chat.completion" if wanted.chat else "text_completion"
        name = "chatcmpl" if wanted.chat else "cmpl"
        self._head = {
            "id": f"{name}-{secrets.token_hex(12)}",
            "object": kind + (".chunk" if wanted.chat and wanted.stream else ""),
            "created": int(time.time()),
            "model": wanted.ask.model,
        }

    def first(self) -> list[dict[str, Any]]:
        """The chunks that open a stream: who speaks."""
        if not self._wanted.chat:
            return []
        return [self._chunk({"index": n, "delta": _said("")}) for n in range(self._wanted.ask.n)]

    def piece(self, piece: Piece) -> dict[str, Any]:
        """The chunk of more text."""
        choice: dict[str, Any] = {"index": piece.index}
        choice |= {"delta": {"content": piece.text}} if self._wanted.chat else {"text": piece.text}
        return self._chunk(choice | {"logprobs": self._logprobs(piece.tokens)})

    def end(self, end: End) -> dict[str, Any]:
        """The chunk that ends an answer."""
        choice: dict[str, Any] = {"index": end.index, "finish_reason": end.reason}
        return self._chunk(choice | ({"delta": dict[str, Any]()} if self._wanted.chat else {"text": ""}))

    def last(self, ends: Sequence[End]) -> list[dict[str, Any]]:
        """The chunk of counts, where it was asked for."""
        return [{**self._head, "choices": [], **self._counts(ends)}] if self._wanted.usage else []

    def whole(self, pieces: Iterable[Piece], ends: Sequence[End]) -> dict[str, Any]:
        """The one object of a request that is not streamed."""
        texts, tokens = [""] * len(ends), [list[TokenLogprob]() for _ in ends]
        for piece in pieces:
            texts[piece.index] += piece.text
            tokens[piece.index] += piece.tokens
        choices = []
        for end in sorted(ends, key=lambda end: end.index):
            choice: dict[str, Any] = {"index": end.index, "finish_reason": end.reason}
            text = texts[end.index]
            choice |= {"message": _said(text) | {"refusal": None}} if self._wanted.chat else {"text": text}
            choices.append(choice | {"logprobs": self._logprobs(tokens[end.index])})
        return {**self._head, "choices": choices, **self._counts(ends)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        counts: dict[str, Any] = {"usage": None} if self._wanted.usage else {}
        return {**self._head, "choices": [{"finish_reason": None, "logprobs": None, **choice}], **counts}

    def _counts(self, ends: Sequence[End]) -> dict[str, Any]:
        """Tokens, and what OpenAI's API has no place for under a key of our own."""
        read, written = self._answering.prompt_tokens, sum(end.completion_tokens for end in ends)
        cached = max((end.cached_tokens for end in ends), default=0)
        details = {"cached_tokens": cached, "image_tokens": self._answering.image_tokens}
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        first = self._answering.first_token_s
        told = {"first_token_s": None if first is None else round(first, 4)}
        return {"usage": usage | {"prompt_tokens_details": details}, "mmit": told}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._wanted.ask.logprobs is None:
            return None
        if self._wanted.chat:
            content = [_token(token) | {"top_logprobs": [_token(top) for top in token.top]} for token in tokens]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{top.text: top.logprob for top in token.top} for token in tokens],
            "text_offset": None,
        }


def failure(end: End, *, ending: bool) -> Refused | None:
    """Why an answer has no regular end, None where it has one."""
    if end.reason in ("stop", "length"):
        return None
    if ending:
        return closing()
    if end.reason == "timeout":
        remedy = "Ask for fewer tokens, or again when less is asked"
        return Refused(504, end.error or "the time was over", remedy, code="timeout")
    if end.reason == "cancelled":
        return Refused(499, "the request was cancelled", code="cancelled")
    remedy = "Ask again; if it happens again, tell whoever runs the server"
    return Refused(500, "the model could not answer", remedy, code="engine_error")


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
