"""Which images are the same: by name without opening a file, by key in a process, by content across files."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import PIL.Image
import pytest

from mmit.data.image_identity import image_digest, image_key, image_name, inside_name
from mmit.errors import ImageError
from mmit.records import Image


def picture(red: int = 0, size: tuple[int, int] = (4, 6)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, (red, 0, 0))


def png(image: PIL.Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_a_file_is_named_by_its_path_without_being_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert image_name(Image("a/../b.png")) == str(tmp_path / "b.png") == image_name(Image(str(tmp_path / "b.png")))
    assert image_key(Image("a/../b.png")) == "a/../b.png"


def test_pictures_without_a_file_are_named_by_what_they_show() -> None:
    data = png(picture())
    assert image_name(Image(data)) == f"sha256:{hashlib.sha256(data).hexdigest()}" == image_key(Image(data))
    assert inside_name(Image(picture())) == inside_name(Image(picture()))
    others = [picture(1), picture(size=(6, 4)), picture().convert("RGBA"), picture().convert("L")]
    assert len({inside_name(Image(one)) for one in (picture(), *others)}) == 5  # equal bytes of another shape differ


def test_a_picture_in_memory_has_the_key_of_its_object() -> None:
    one = picture()
    assert image_key(Image(one)) == image_key(Image(one)) != image_key(Image(picture()))


def test_two_files_of_one_content_have_one_digest(tmp_path: Path) -> None:
    data = png(picture())
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(data)
    paths = [Image(str(tmp_path / name)) for name in ("a.png", "b.png")]
    assert image_name(paths[0]) != image_name(paths[1])
    digests = {image_digest(one) for one in (*paths, Image(data), Image(picture()))}
    assert digests == {hashlib.sha256(data).hexdigest()}
    with pytest.raises(ImageError, match=os.strerror(2)) as caught:
        image_digest(Image(str(tmp_path / "c.png")), remedy="Fetch it.")
    assert caught.value.remedy == "Fetch it." and caught.value.where == str(tmp_path / "c.png")
