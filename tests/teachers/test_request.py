"""A request is its content: what it says, shows and draws, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import PIL.Image
import pytest

from mmit.records import Image
from mmit.teachers.request import Draw, Reply, Request, user


def picture(colour: str) -> bytes:
    buffer = BytesIO()
    PIL.Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_digest_is_the_content_and_not_what_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    asked = Request(user(Image(str(tmp_path / "a.png")), "What?"), Draw(seed=1), purpose="write")
    assert replace(asked, purpose="judge").digest == asked.digest
    (tmp_path / "moved.png").write_bytes(picture("red"))  # the same picture elsewhere
    assert Request(user(Image(str(tmp_path / "moved.png")), "What?"), Draw(seed=1)).digest == asked.digest
    assert Request(user(Image(picture("red")), "What?"), Draw(seed=1)).digest == asked.digest


@pytest.mark.parametrize(
    "other",
    [
        Request(user("What ?"), Draw(seed=1)),
        Request(user("What?"), Draw(seed=2)),
        Request(user("What?"), Draw(seed=1, stop=("\n",))),
        Request(user("What?"), Draw(seed=1, temperature=0.5)),
        Request(user("Wh", "at?"), Draw(seed=1)),
        Request(user(Image(picture("red")), "What?"), Draw(seed=1)),
        Request((*user("What?"), *user("What?")), Draw(seed=1)),
    ],
)
def test_another_content_is_another_request(other: Request) -> None:
    assert other.digest != Request(user("What?"), Draw(seed=1)).digest and len(other.digest) == 32


def test_the_text_is_that_of_the_last_turn_and_tokens_count_as_far_as_stated() -> None:
    assert Request((*user("a"), *user(Image(picture("red")), "b", "c"))).text == "bc"
    assert Reply("", "t", "x", prompt_tokens=3, new_tokens=2).tokens == 5
    assert Reply("", "t", "x", new_tokens=2).tokens == 2
