"""What tells data from other data: every byte range that is looked at counts, places and names do not."""

from __future__ import annotations

import io
from pathlib import Path

import PIL.Image
import pytest

from mmit.data.marks import ENDS, Contents, content_of, picture_mark, written_floats
from mmit.data.packing import Sample
from mmit.records import Image

LENGTHS = [1, 100, ENDS, ENDS + 1, 2 * ENDS, 3 * ENDS]


def file(folder: Path, content: bytes, name: str = "a.png") -> Image:
    (folder / name).write_bytes(content)
    return Image(str(folder / name))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_picture_file_is_told_by_its_ends_and_its_size_and_not_by_its_name(tmp_path: Path, length: int) -> None:
    content = bytes(range(256)) * (length // 256 + 1)
    content = content[:length]
    mark = picture_mark(file(tmp_path, content))
    (tmp_path / "moved").mkdir()
    assert mark == picture_mark(file(tmp_path / "moved", content, "b.jpg")) and len(mark) == 16
    looked_at = {0, length // 2, length - 1} if length <= 2 * ENDS else {0, ENDS - 1, length - ENDS, length - 1}
    for place in looked_at:
        other = bytearray(content)
        other[place] ^= 1
        assert picture_mark(file(tmp_path, bytes(other))) != mark, place
    assert picture_mark(file(tmp_path, content + b"\0")) != mark
    assert picture_mark(file(tmp_path, content[:-1])) != mark


def test_a_longer_file_of_equal_ends_is_another(tmp_path: Path) -> None:
    marks = {picture_mark(file(tmp_path, bytes(n * ENDS))) for n in (2, 3, 4)}
    assert len(marks) == 3


def test_painting_in_the_middle_of_a_picture_that_is_not_compressed_is_seen(tmp_path: Path) -> None:
    picture = PIL.Image.new("RGB", (80, 80))
    marks = set()
    for colour in ((0, 0, 0), (0, 0, 1)):
        picture.putpixel((40, 40), colour)
        picture.save(tmp_path / "a.bmp")
        assert (tmp_path / "a.bmp").stat().st_size > 4 * ENDS
        marks.add(picture_mark(Image(str(tmp_path / "a.bmp"))))
    assert len(marks) == 2


def test_pictures_in_memory_are_told_by_all_of_their_bytes() -> None:
    content = bytes(5 * ENDS)
    other = bytearray(content)
    other[len(other) // 2] = 1
    assert picture_mark(Image(content)) == picture_mark(Image(bytes(content))) != picture_mark(Image(bytes(other)))


def test_what_is_elsewhere_has_no_mark(tmp_path: Path) -> None:
    assert picture_mark(Image(str(tmp_path / "none.png"))) == b""


def sample(*ids: int, images: tuple[str, ...] = ()) -> Sample:
    return Sample(ids=ids, weights=(1.0,) * len(ids), images=images)


class Shown:
    def __init__(self, colour: tuple[int, int, int]) -> None:
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
        self.image = Image(buffer.getvalue())


def test_a_record_is_told_by_its_tokens_and_its_pictures() -> None:
    red, blue = Shown((255, 0, 0)), Shown((0, 0, 255))
    found = [
        content_of([sample(1, 2, images=("a",))], {"a": red}),
        content_of([sample(1, 2, images=("a",))], {"a": blue}),
        content_of([sample(1, 3, images=("a",))], {"a": red}),
        content_of([sample(1, 2)], {}),
    ]
    assert len(set(found)) == 4
    assert found[0] == content_of([sample(1, 2, images=("b",))], {"b": red})


def test_contents_depend_on_the_order_and_not_on_the_pieces() -> None:
    marks = [bytes([n]) * 16 for n in range(5)]

    def of(these: list[bytes]) -> Contents:
        made = Contents()
        for mark in these:
            made.add(mark)
        return made

    whole = str(of(marks))
    for cut in range(6):
        joined = of(marks[:cut])
        joined.extend(Contents(str(of(marks[cut:]))))
        assert str(joined) == whole
    assert str(of(marks[::-1])) != whole and str(of(marks[:4])) != whole


@pytest.mark.parametrize("values", [(), (0.5,), (0.0, 0.0, 1.0, 1.0, 1.0, 0.3), (1e-17, 1e22, 2.5), (0.0,) * 9])
def test_weights_are_written_as_python_writes_them(values: tuple[float, ...]) -> None:
    assert written_floats(values) == repr(values)
