"""OpenAI-compatible endpoints: one that judges answers, and one that is evaluated as if it were a model of mmit's.

In: a base URL, a model's name, and the name of the environment variable that holds the key. Out: texts. Speaks
`POST <base>/chat/completions` through the standard library, tries again when the server is busy, and never writes
the key anywhere.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmit.errors import ConfigError, MmitError
from mmit.teachers.messages import openai_messages

if TYPE_CHECKING:
    from mmit.records import Record

BUSY = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a chat model is served; `key_env` names the variable of its key ("" or unset: none is sent)."""

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 4
    pause: float = 1.0
    """seconds before the second try; doubled each time"""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            remedy = "Give the base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1"
            raise ConfigError(f"'{self.url}' is no address of a server", where="url", remedy=remedy)
        if not self.model:
            raise ConfigError("no model named", where="model", remedy="Name the model that the server should use.")

    def chat(self, messages: Sequence[dict[str, Any]], *, max_tokens: int = 512, stop: Sequence[str] = ()) -> str:
        """Return the answer to messages, greedily. Raises MmitError if the server does not give one."""
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "temperature": 0}
        body["max_tokens"] = max_tokens
        if stop:
            body["stop"] = list(stop)
        reply = self._post(json.dumps(body).encode("utf-8"))
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            problem = f"the reply holds no answer: {json.dumps(reply)[:200]}"
            raise MmitError(problem, where=self.url, remedy="The server must speak OpenAI's chat completions.")
        return text.strip()

    def _post(self, body: bytes) -> Any:
        address = self.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_env) if self.key_env else None
        if key:
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(1, self.tries + 1):
            request = urllib.request.Request(address, data=body, headers=headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read().decode("utf-8"))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code not in BUSY or attempt == self.tries:
                    remedy = f"Check the URL, the model's name and the key in {self.key_env or 'no variable'}."
                    raise MmitError(problem, where=address, remedy=remedy) from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                if attempt == self.tries:
                    raise MmitError(f"no answer: {error}", where=address, remedy="Is the server running?") from None
            time.sleep(self.pause * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


class EndpointModel:
    """A served model that answers records as `mmit.generate.Model` does; `batch_size` requests run at once."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def generate(
        self,
        records: Sequence[Record],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        blank_images: bool = False,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Return one answer per record, in their order. Raises MmitError, ImageError."""
        if temperature:
            raise ConfigError("only greedy answers", where="temperature", remedy="Leave temperature at 0.")

        def answer(record: Record) -> str:
            sent = messages(record, blank=blank_images)
            return self.endpoint.chat(sent, max_tokens=max_new_tokens, stop=stop)

        with ThreadPoolExecutor(max_workers=min(batch_size, 16)) as pool:
            return list(pool.map(answer, records))


def messages(record: Record, *, blank: bool = False) -> list[dict[str, Any]]:
    """Return a record's turns as OpenAI messages, its pictures as data URLs; `blank` makes them grey."""
    return openai_messages(record.turns, where=record.where, blank=blank)
