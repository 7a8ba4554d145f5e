"""A model behind an OpenAI-compatible URL, evaluated as if it were a model of mmit's.

In: a teacher (`mmit.teachers.endpoint.Endpoint`, which owns retries, pace and deadline) and records. Out: one answer
per record, and an account of what was sent and received. A question that the server refuses is an error, never a wrong
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import PIL.Image

from mmit.data.images import image_size
from mmit.errors import ConfigError, MmitError
from mmit.records import Image
from mmit.teachers.desk import Account, priced
from mmit.teachers.request import Draw, Request

if TYPE_CHECKING:
    from mmit.records import Record, Turn
    from mmit.teachers.request import Teacher


class EndpointModel:
    """A teacher that answers records as `mmit.generate.Model` does.

    Attributes:
        account: requests, attempts and tokens so far.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.account = Account()

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
        """Return one answer per record, in their order.

        Args:
            batch_size: not used; the teacher knows how many requests it may have in flight.

        Raises:
            MmitError: no answer after all attempts, or the server refuses a question. ImageError: an unreadable image.
        """
        if temperature:
            raise ConfigError("only greedy answers", where="temperature", remedy="Leave temperature at 0.")
        draw = Draw(max_tokens=max_new_tokens, stop=tuple(stop))
        requests = [Request(_turns(record, blank=blank_images), draw, "answer") for record in records]
        place = {id(request): n for n, request in enumerate(requests)}  # two questions may have the same content
        answers = [""] * len(records)
        for request, reply in self.teacher.ask(requests):
            n = place[id(request)]
            if reply.finish == "refused" or (reply.finish == "length" and reply.new_tokens == 0):
                reason = "refuses the question" if reply.finish == "refused" else "says that the question is too long"
                remedy = "Leave the question out, or evaluate another model."
                raise MmitError(f"{self.teacher.name} {reason}", where=records[n].where, remedy=remedy)
            self.account.add(replace(reply, cost=priced(reply, self.teacher.price)))
            answers[n] = reply.text
        return answers


def _turns(record: Record, *, blank: bool) -> tuple[Turn, ...]:
    """The turns of a record; `blank` replaces each image by a grey one of its size."""
    if not blank:
        return record.turns
    return tuple(
        replace(turn, parts=tuple(_grey(p, record.where) if isinstance(p, Image) else p for p in turn.parts))
        for turn in record.turns
    )


def _grey(image: Image, where: str) -> Image:
    return Image(PIL.Image.new("RGB", image_size(image, where=where), (127, 127, 127)))
