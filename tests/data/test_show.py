"""The page of sampled records: complete, self-contained, harmless, and drawn by a real browser."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest
from rich.console import Console

from mmit.data.chat import chat_format, encode
from mmit.data.chat_writer import Encoded
from mmit.data.show import SampledRow, to_page, to_terminal
from mmit.errors import RecordError
from mmit.records import Record, Text, Turn
from tests.data.small_tokenizers import family

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def encoded(record: Record) -> tuple[Encoded, ...]:
    tokenizer = family("byte_level")
    return (encode(record.turns, chat_format("qa", tokenizer), tokenizer),)


def page(*items: SampledRow, image_tokens: int | None = 16) -> str:
    return to_page(
        items, title="data.jsonl", notes=["3 of 9"], tokenizer=family("byte_level"), image_tokens=image_tokens
    )


@pytest.fixture
def pictured(tmp_path) -> Record:
    PIL.Image.new("RGB", (400, 300), (200, 30, 30)).save(tmp_path / "red.png")
    images = [str(tmp_path / "red.png"), PIL.Image.new("RGB", (30, 60), "blue")]
    return Record.triple("What is it?", "A red thing.", images=images, id="x", licence="MIT", meta={"a": "<b>"})


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_card_has_everything(pictured):
    text = page(SampledRow(7, pictured, encoded(pictured)))
    for part in ("3 of 9", "record (x)", "licence MIT", "400 × 300", "30 × 60", "[image x16]", "2 turns", "2 images"):
        assert part in text, part
    images = [attrs for tag, attrs in Tags(text).found if tag == "img"]
    assert [(i["width"], i["height"]) for i in images] == [("240", "180"), ("30", "60")]
    assert all(i["src"].startswith("data:image/jpeg;base64,") and i["alt"] for i in images)
    (sample,) = encoded(pictured)
    assert text.count('class="supervised" title=') == sum(sample.supervised)
    length = len(sample.ids) + 2 * 15
    assert f"{length} tokens" in text


def test_the_bar_adds_up(pictured):
    text = page(SampledRow(1, pictured, encoded(pictured)))
    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%"', text)]
    assert len(widths) == 3 and abs(sum(widths) - 100) < 0.05 and all(widths)


def test_several_samples_of_a_record():
    record = Record.triple("What?", "A.")
    text = page(SampledRow(1, record, encoded(record) * 3))
    assert "sample 3 of 3" in text and "3 samples" in text and text.count("<pre>") == 3


def test_without_a_tokenizer_the_turns_are_shown(pictured):
    text = to_page([SampledRow(1, pictured)], title="x")
    assert '<div class="turn assistant"><b>assistant</b>A red thing.</div>' in text
    assert text.count('<span class="image">image</span>') == 3  # two, and one in the key
    assert "characters" in text


def test_what_is_wrong_is_said(pictured, tmp_path):
    bad = RecordError("the text has 2 <image>", where="rows.json:3", remedy="Write one.")
    gone = Record.triple("What?", "A.", images=[str(tmp_path / "gone.png")])
    text = page(SampledRow(3, bad), SampledRow(4, gone), SampledRow(5, pictured, problem="training refuses it: no"))
    assert "the text has 2 &lt;image&gt;" in text and "Write one." in text and "rows.json:3" in text
    assert "cannot open the image" in text and "training refuses it: no" in text


def test_the_page_stands_alone_and_runs_nothing():
    evil = "<script>alert(1)</script><img src=http://x onerror=alert(1)>\x1b[31m"
    record = Record(
        (Turn("user", (Text(evil),)), Turn("assistant", (Text(evil),))), id=evil, licence=evil, meta={evil: 1}
    )
    for samples in ((), encoded(record)):
        text = to_page(
            [
                SampledRow(1, record, samples),
                SampledRow(2, RecordError(evil, where=evil, remedy=evil)),
                SampledRow(3, record, problem=evil),
            ],
            title=evil,
            notes=[evil],
            tokenizer=family("byte_level"),
        )
        found = Tags(text).found
        assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in found}
        assert not [attrs for _, attrs in found if any(name.startswith("on") for name in attrs)]
        assert ("default-src 'none'" in text) and "prefers-color-scheme: dark" in text


def test_the_terminal_has_the_same(pictured):
    gone = Record.triple("Hi\x1b[31m", "Ho", images=["gone.png"])
    bad = RecordError("no good\x1b[31m", where="rows.json:3")
    items = [
        SampledRow(1, pictured, encoded(pictured)),
        SampledRow(2, gone),
        SampledRow(3, bad),
        SampledRow(4, gone, problem="too long"),
    ]
    console = Console(file=io.StringIO(), width=300, highlight=False)
    for line in to_terminal(items, tokenizer=family("byte_level"), image_tokens=16):
        console.print(line)
    text = console.file.getvalue()
    for part in ("red.png (400 x 300)", "«", "[image x16]", "gone.png: cannot open", "no good\\x1b", "too long"):
        assert part in text, part
    assert "\x1b[31m" not in text and "assistant: Ho" in text


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium to draw the page with")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it(pictured, tmp_path, dark):
    items = [SampledRow(1, pictured, encoded(pictured)), SampledRow(2, RecordError("no record", where="rows.json:2"))]
    (tmp_path / "show.html").write_text(page(*items), encoding="utf-8")
    picture = screenshot(tmp_path / "show.html", dark=dark)
    colours = dict((colour, count) for count, colour in picture.getcolors(1 << 24))
    light, ink = colours.get((246, 247, 249), 0), colours.get((17, 20, 24), 0)
    assert (ink > 100_000 > light) if dark else (light > 100_000 > ink)  # the ground of each scheme
    green = (18, 64, 29) if dark else (201, 239, 207)
    assert colours.get(green, 0) > 500, "no supervised token to be seen"
    red = sum(n for (r, g, b), n in colours.items() if abs(r - 200) + abs(g - 30) + abs(b - 30) < 20)
    assert red > 240 * 180 * 0.9, "no thumbnail to be seen"


def screenshot(file: Path, *, dark: bool) -> PIL.Image.Image:
    out = file.with_name("page.png")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,900"]
    command = [CHROMIUM, *options, *scheme, f"--user-data-dir={file.parent / 'profile'}", f"--screenshot={out}"]
    subprocess.run([*command, file.as_uri()], check=True, capture_output=True, timeout=120)
    return PIL.Image.open(out).convert("RGB")
