"""Pictures: the right RGB from every mode and format, one clear error for everything else."""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageOps

from mmit.data.images import FORMATS, fit, image_size, load_rgb, to_tensor
from mmit.data.shards.records import picture_size
from mmit.errors import ConfigError, ImageError
from mmit.records import Image


def encode(picture: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def pixels(picture: PIL.Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


def noise(h: int = 12, w: int = 16, channels: int = 3) -> PIL.Image.Image:
    data = np.random.default_rng(0).integers(0, 256, (h, w, channels), dtype=np.uint8)
    return PIL.Image.fromarray(data.squeeze())


def load(source: Any, **options: Any) -> np.ndarray:
    return pixels(load_rgb(Image(source), **options))


def test_path_bytes_and_pil_agree(tmp_path: Path) -> None:
    picture = noise()
    picture.save(tmp_path / "a.png")
    expected = np.asarray(picture)
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), picture):
        assert np.array_equal(load(source), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    flat = PIL.Image.new("RGB", (8, 6), (0, 0, 255))
    assert np.abs(load(encode(flat, kind)).astype(int) - np.asarray(flat)).max() <= 3


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PCX"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG, WEBP, GIF, BMP picture"):
        load(encode(noise(16, 16), kind))


def test_animations_give_the_first_frame() -> None:
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **LOSSLESS.get(kind, {}))
        assert (load(data) == (255, 0, 0)).all()


LOSSLESS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_equal_pillows_conversion(mode: str) -> None:
    picture = noise().convert(mode)
    assert np.array_equal(load(picture), np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg() -> None:
    red = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(load(encode(red, "JPEG", quality=95)).astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_alpha_shows_the_background(mode: str, background: tuple[int, int, int]) -> None:
    picture = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    picture.paste((200, 200, 200, 0), (0, 0, 2, 4))
    if mode == "PA":  # Pillow converts other modes to PA without their alpha
        picture = PIL.Image.new("PA", (4, 4), (0, 255))
        picture.putpalette([0, 0, 0, 200, 200, 200])
        picture.paste((1, 0), (0, 0, 2, 4))
    elif mode in ("LA", "La"):
        picture = picture.convert("LA").convert(mode)
    elif mode == "RGBa":
        picture = picture.convert("RGBa")
    got = load(picture, background=background)
    assert (got[:, :2] == background).all() and (got[:, 2:] == 0).all()


def test_half_transparent_is_mixed() -> None:
    half = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.abs(load(half).astype(int) - 127).max() <= 1


@pytest.mark.parametrize(
    ("mode", "colours", "key"),
    [("P", [0, 1], 0), ("L", [9, 0], 9), ("RGB", [(9, 9, 9), (0, 0, 0)], (9, 9, 9)), ("1", [1, 0], 1)],
)
def test_transparent_colour(mode: str, colours: list, key: Any) -> None:
    picture = PIL.Image.new(mode, (4, 2), colours[0])
    if mode == "P":
        picture.putpalette([9, 9, 9, 0, 0, 0])
    picture.paste(colours[1], (2, 0, 4, 2))
    picture.info["transparency"] = key
    got = load(encode(picture) if mode != "1" else picture)
    assert (got[:, :2] == 255).all() and (got[:, 2:] == 0).all()


def test_palette_with_alpha_table() -> None:
    picture = PIL.Image.new("P", (4, 2), 0)
    picture.putpalette([9, 9, 9, 0, 0, 0])
    picture.paste(1, (2, 0, 4, 2))
    got = load(encode(picture, transparency=bytes([0, 255])))
    assert (got[:, :2] == 255).all() and (got[:, 2:] == 0).all()


def test_sixteen_bit_grey_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    picture = PIL.Image.fromarray(ramp)
    for source in (picture, encode(picture)):
        got = load(source)
        assert np.array_equal(got[..., 0].ravel(), np.arange(256)) and (got[..., :1] == got).all()


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    picture = PIL.Image.fromarray(np.array([[40000] * 4, [257] * 4], dtype=np.uint16))
    got = load(encode(picture, transparency=40000))
    assert (got[0] == 255).all() and (got[1] == 1).all()


def _png(bit_depth: int, colour_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, bit_depth, colour_type, 0, 0, 0))
    trns = chunk(b"tRNS", extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + header + trns + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour() -> None:
    clear, solid = struct.pack(">HHH", 0x8000, 0x8000, 0x8000), struct.pack(">HHH", 0x4000, 0, 0xFFFF)
    rows = (b"\0" + clear + solid) * 2
    got = load(_png(16, 2, rows, clear))
    assert (got[:, 0] == 255).all() and (got[:, 1] == (0x40, 0, 0xFF)).all()
    assert (load(_png(16, 2, rows))[:, 0] == 0x80).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="PIL picture: mode . does not state its range"):
        load(PIL.Image.new(mode, (4, 4)))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation(orientation: int, kind: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(), kind, exif=exif)
    upright = ImageOps.exif_transpose(PIL.Image.open(BytesIO(data))).convert("RGB")
    got = load_rgb(Image(data))
    assert np.array_equal(pixels(got), np.asarray(upright))
    assert np.array_equal(load(got), pixels(got)), "loading twice must not turn twice"
    assert np.array_equal(load(PIL.Image.open(BytesIO(data))), pixels(got))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\0"])
def test_broken_exif_counts_as_none(block: bytes) -> None:
    picture = noise()
    assert np.array_equal(load(encode(picture, exif=block)), np.asarray(picture))


def test_the_given_picture_is_not_changed() -> None:
    picture = noise()
    picture.info["exif"] = PIL.Image.Exif().tobytes()
    before = (picture.tobytes(), dict(picture.info))
    load_rgb(Image(picture)).putpixel((0, 0), (1, 2, 3))
    assert (picture.tobytes(), picture.info) == before


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_errors(kind: str, flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", flag)
    data = encode(noise(24, 24), kind)
    whole = load(data)
    for cut in range(0, len(data), max(1, len(data) // 40)):
        try:
            # Where only what follows the pixels is missing, nothing is lost.
            assert np.array_equal(load(data[:cut]), whole), cut
            assert cut >= len(data) - 24, cut
        except ImageError as error:
            assert error.remedy
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is flag


@given(st.sampled_from(FORMATS), st.integers(0, 200), st.binary(min_size=1, max_size=6))
def test_damage_is_an_image_error_or_a_picture(kind: str, at: int, junk: bytes) -> None:
    data = encode(noise(), kind)
    data = data[:at] + junk + data[at + len(junk) :]
    try:
        load(data, max_pixels=1_000_000)
    except ImageError as error:
        assert error.remedy and len(str(error)) < 500


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("none.png", None, "cannot open the image: No such file"),
        ("text.png", b"<html>404</html>", "it begins with b'<html>40'"),
        ("empty.png", b"", "the image is empty"),
        ("", None, "not a file"),
        ("a\0b", None, "not a valid path"),
    ],
)
def test_bad_files_name_row_file_cause_and_remedy(tmp_path: Path, name: str, content: bytes | None, cause: str) -> None:
    path = str(tmp_path / name)
    if content is not None:
        Path(path).write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_rgb(Image(path), where="set.jsonl:3 (x)")
    assert caught.value.where.startswith("set.jsonl:3 (x): ")
    assert name.replace("\0", "\\x00") in caught.value.where
    assert cause in caught.value.problem and caught.value.remedy


def test_pipes_and_wrong_types_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a file"):
        load_rgb(Image(str(tmp_path / "pipe")))
    for source in (None, 0):
        with pytest.raises(ImageError, match="is no picture"):
            load_rgb(Image(source))  # type: ignore[arg-type]


def test_size_is_judged_by_the_header() -> None:
    # The pixels are missing, so an attempt to decode would give another error.
    header_only = encode(PIL.Image.new("1", (8000, 8000)))[:60]
    with pytest.raises(ImageError, match="8000 x 8000 pixels are more than the 50,000,000"):
        load(header_only)
    with pytest.raises(ImageError, match="more than the 100 allowed"):
        load(noise(), max_pixels=100)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(10, 15))
    for limit in (100, 50):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match=r"pixels.*\nScale the picture down"):
            load(data, max_pixels=10**9)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    load(data)


@pytest.mark.parametrize(("size", "good"), [((2, 2), True), ((1, 5), False), ((2, 400), True), ((2, 401), False)])
def test_shape_limits(size: tuple[int, int], good: bool) -> None:
    for shape in (size, size[::-1]):
        picture = PIL.Image.new("RGB", shape)
        if good:
            load(picture)
        else:
            with pytest.raises(ImageError, match=f"{shape[0]} x {shape[1]} pixels"):
                load(encode(picture))


def test_foreign_text_is_kept_short() -> None:
    with pytest.raises(ImageError) as caught:
        load_rgb(Image("very/" * 5000 + "\n\x1b[31mlong.png"))
    assert len(str(caught.value)) < 400 and "long.png" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("mode", ["resize", "pad", "crop"])
@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 1)])
@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (2, 400), (8, 8)])
def test_fit_gives_the_asked_shape(mode: Any, size: tuple[int, int], shape: tuple[int, int]) -> None:
    out = fit(noise(*shape), size, mode=mode)
    assert out.shape == (3, *size) and out.dtype == torch.uint8 and out.is_contiguous()


def test_fit_leaves_a_picture_of_the_right_size_alone() -> None:
    picture = noise(7, 9)
    for mode in ("resize", "pad", "crop"):
        out = fit(picture, (7, 9), mode=mode)  # type: ignore[arg-type]
        assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(picture))


def test_pad_keeps_proportions_and_fills() -> None:
    white = PIL.Image.new("RGB", (8, 4), "white")
    out = fit(white, (8, 8), mode="pad", fill=(1, 2, 3))
    assert (out[:, 2:6] == 255).all()
    for rows in (out[:, :2], out[:, 6:]):
        assert (rows == torch.tensor([1, 2, 3]).view(3, 1, 1)).all()


def test_crop_keeps_the_centre() -> None:
    picture = PIL.Image.new("RGB", (12, 4), "black")
    picture.paste((255, 255, 255), (4, 0, 8, 4))
    assert (fit(picture, (4, 4), mode="crop", interpolation="nearest") == 255).all()


SHAPES = [(12, 16), (31, 17), (5, 40), (33, 33), (19, 8), (8, 19), (300, 7), (7, 300), (600, 31)]
OPENAI_FILL = (122, 116, 104)  # int(255 * mean)


@pytest.mark.parametrize("side", [8, 24])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_fit_equals_the_processor_of_llava(mode: Any, shape: tuple[int, int], side: int) -> None:
    transformers = pytest.importorskip("transformers")
    edges = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = transformers.LlavaImageProcessorPil(do_pad=mode == "pad", do_rescale=False, do_normalize=False, **edges)
    theirs = processor(noise(*shape), return_tensors="pt")["pixel_values"][0]
    ours = fit(noise(*shape), (side, side), mode=mode, fill=OPENAI_FILL)
    assert torch.equal(ours, theirs.to(torch.uint8))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (20, 12)])
@pytest.mark.parametrize("shape", SHAPES)
def test_pad_is_a_padded_canvas_scaled(shape: tuple[int, int], size: tuple[int, int], interpolation: str) -> None:
    picture, (H, W) = noise(*shape), size
    w, h = picture.size
    whole = (w, max(h, round(w * H / W))) if w / W >= h / H else (max(w, round(h * W / H)), h)
    canvas = PIL.Image.new("RGB", whole, OPENAI_FILL)
    canvas.paste(picture, ((whole[0] - w) // 2, (whole[1] - h) // 2))
    expected = np.asarray(canvas.resize((W, H), PIL.Image.Resampling[interpolation.upper()]))
    out = fit(picture, size, mode="pad", interpolation=interpolation, fill=OPENAI_FILL)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), expected)


def test_a_tensor_of_a_picture_is_its_own_and_contiguous() -> None:
    for size in ((3, 2), (1, 1), (5, 1), (1, 5)):
        picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        tensor = to_tensor(picture)
        assert tensor.shape == (3, *size) and tensor.is_contiguous()
        assert tensor.permute(1, 2, 0).tolist() == np.asarray(picture).tolist()
        before = np.asarray(picture).copy()
        tensor.zero_()  # it may be written to, and the picture stays
        assert np.array_equal(np.asarray(picture), before)


def test_pad_leaves_square_pictures_to_the_resize_alone() -> None:
    assert torch.equal(fit(noise(64, 64), (8, 8), mode="pad", fill=OPENAI_FILL), fit(noise(64, 64), (8, 8)))


def test_fit_refusals() -> None:
    picture = noise()
    with pytest.raises(ConfigError, match="did you mean 'pad'"):
        fit(picture, (8, 8), mode="padd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'bicubic'"):
        fit(picture, (8, 8), interpolation="cubic")
    for size in ((0, 8), (8,), (8.0, 8)):
        with pytest.raises(ConfigError, match="not two positive whole numbers"):
            fit(picture, size)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="load_rgb"):
        fit(picture.convert("L"), (8, 8))


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "behind the pixels"])
def test_a_png_with_much_text_is_sound(tmp_path: Path, after: bool) -> None:
    """A prompt or workflow of several megabytes is no damage; Pillow's limit is about text, not pixels."""
    file = BytesIO()
    PIL.Image.new("RGB", (8, 6), (200, 10, 20)).save(file, "PNG")
    data, text = file.getvalue(), zlib.compress(b"x" * (4 << 20))
    body = b"zTXt" + b"workflow\0\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    at = data.index(b"IEND") - 4 if after else data.index(b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes(data[:at] + chunk + data[at:])
    for source in (str(path), path.read_bytes()):
        assert load_rgb(Image(source)).getpixel((3, 3)) == (200, 10, 20)
        assert image_size(Image(source)) == (8, 6)
    assert picture_size(path.read_bytes(), where="x") == (8, 6)
    path.write_bytes(path.read_bytes()[:48])
    with pytest.raises(ImageError):
        load_rgb(Image(str(path)))
