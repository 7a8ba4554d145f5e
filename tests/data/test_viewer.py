from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mmit.data.chat import chat_format, encode
from mmit.data.chat_writer import Encoded
from mmit.data.viewer import cells, legend, to_html, to_rich
from mmit.records import Image, Record, Text, Turn
from tests.data.small_tokenizers import family

NAMES = ["byte_level", "llama", "llama_legacy", "gemma", "unigram"]


def record(question: str, answer: str) -> list[Turn]:
    return [
        Turn("user", (Image("a.png"), Text(question), Image("b.png"))),
        Turn("assistant", (Text(answer),)),
    ]


def encoded_by(name: str, question: str = "What\tis it?", answer: str = "A 😀 cat.\nYes") -> Encoded:
    tokenizer = family(name)
    return encode(record(question, answer), chat_format("qa", tokenizer), tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_shown_once(name: str) -> None:
    encoded = encoded_by(name)
    shown = cells(encoded, family(name))
    assert tuple(i for cell in shown for i in cell.ids) == encoded.ids
    assert [m for cell in shown for m in [cell.supervised] * len(cell.ids)] == list(encoded.supervised)
    assert all(cell.text for cell in shown)
    assert "".join(c.text for c in shown if c.supervised and c.origin == "content") == "·A·😀·cat.⏎\nYes"
    assert "What⇥is·it?" in "".join(c.text for c in shown)


def test_terminal_marks_the_supervised_part_without_colour_too() -> None:
    plain = to_rich(encoded_by("byte_level"), family("byte_level"), image_tokens=16).plain.replace("│", "")
    assert plain.startswith("[image x16]Question:·What⇥is·it?[image x16]⏎\nAnswer:«·A·😀·cat.⏎\nYes<|eos|>»\n")
    assert plain.count("«") == plain.count("»") == 2  # one pair is in the legend


def test_terminal_colours() -> None:
    text = to_rich(encoded_by("byte_level"), family("byte_level"))
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["[image]"] == "black on blue"
    assert styles["<|eos|>"] == "black on green"
    assert styles["⏎\n"] in ("dim", "black on green")


def test_nothing_in_a_record_runs() -> None:
    encoded = encoded_by("byte_level", "<script>alert(1)</script>\x1b[31m\u202e[bold]x[/bold]", '"><b>')
    page = to_html(encoded, family("byte_level"), title="<b>")
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert set(tags) == {"html", "head", "meta", "title", "style", "body", "pre", "span", "p"}
    assert "\u202e" not in page and "\\u202e" in page
    assert "://" not in page and "src=" not in page
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200, highlight=False).print(to_rich(encoded, family("byte_level")))
    assert "\\u001b" in out.getvalue() and "\x1b[31m\u202e" not in out.getvalue()
    shown = to_rich(encoded, family("byte_level")).plain.replace("│", "")
    assert "[bold]x[/bold]" in shown  # rich markup in a record is text


def test_page_shows_the_same_tokens() -> None:
    encoded = encoded_by("llama")
    page = to_html(encoded, family("llama"), image_tokens=16)
    shown = cells(encoded, family("llama"))
    body = page.split("<pre>")[1].split("</pre>")[0]
    assert body.count("<span") == len(shown)
    assert body.count('class="supervised"') == sum(cell.supervised for cell in shown)
    assert body.count("[image x16]") == 2


def test_weights_are_shades() -> None:
    tokenizer = family("byte_level")
    talk = Record(
        (
            Turn("user", (Text("Q?"),)),
            Turn("assistant", (Text("one "), Text("half", 0.5), Text(" none", 0.0))),
            Turn("user", (Text("And?"),)),
            Turn("assistant", (Text("two"),), weight=2.0),
        )
    )
    encoded = encode(talk, chat_format("qa", tokenizer), tokenizer)
    assert {weight for weight in encoded.weights} == {0.0, 0.5, 1.0, 2.0}
    text = to_rich(encoded, tokenizer)
    plain = text.plain.replace("│", "")
    assert "«·one·»«0.5:half»·none«<|eos|>»" in plain and "«2:·two<|eos|>»" in plain
    styles = {str(span.style) for span in text.spans}
    assert {"black on green", "black on dark_sea_green", "black on bright_green"} <= styles
    assert "(weights" in text.plain.splitlines()[-1]
    page = to_html(encoded, tokenizer)
    shades = re.findall(r"rgba\(47, 158, 68, ([0-9.]+)\)", page)
    assert sorted(set(shades)) == ["0.23", "0.60"] or sorted(set(shades)) == ["0.22", "0.60"]
    assert ", weight 0.5" in page and ", weight 2" in page
    assert "rgba" not in to_html(encoded_by("byte_level"), tokenizer)


def test_legend_counts() -> None:
    encoded = encoded_by("byte_level")
    text = len(encoded.ids) - 2
    assert legend(encoded) == f"{text} text tokens, {sum(encoded.supervised)} supervised, 2 image slots"
    assert legend(encoded, image_tokens=16).endswith(f", {text + 32} positions in the model")


def test_a_token_that_decodes_to_nothing_keeps_its_name() -> None:
    # The dummy prefix of an old Llama tokenizer after an image.
    encoded = encode(record("\nx", "y"), chat_format("vicuna_v1", family("llama_legacy")), family("llama_legacy"))
    assert "▁" in [cell.text for cell in cells(encoded, family("llama_legacy"))]


def test_bytes_that_never_make_a_character_are_shown() -> None:
    tokenizer = family("byte_level")
    half = tokenizer("😀")["input_ids"][:2]
    broken = Encoded(tuple(half), (True,) * len(half), ("content",) * len(half))
    (cell,) = cells(broken, tokenizer)
    assert cell.ids == tuple(half) and "\ufffd" in cell.text
