"""What `meta.build` of a record says of where it comes from, the same keys for every stage that asks teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmit.teachers import Reply, Request


def asked(
    how: str,
    request: Request,
    replies: Sequence[Reply],
    *,
    template: str,
    parents: Sequence[str],
    seed: int,
    score: float | None = None,
) -> dict[str, Any]:
    """Return the provenance of a record that teachers wrote.

    Args:
        how: the stage. template: the wording or style it asked with.
        request: what the record's answer was asked with; its digest is the prompt's hash.
        replies: all that the record is made of, the answer's last.
        parents: ids of the rows, seeds or records it was made from.
        seed: of the build. score: what a selection gave it; None where none was asked for.
    """
    return {
        "how": how,
        "template": template,
        "teacher": ", ".join(dict.fromkeys(reply.teacher for reply in replies)),
        "request": replies[-1].id,
        "requests": [reply.id for reply in replies],
        "prompt": request.digest,
        "parents": list(parents),
        "seed": seed,
        "score": score,
    }
