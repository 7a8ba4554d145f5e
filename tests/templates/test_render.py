"""Rendering: images are places, fields are text, choices are listed in an order the answer does not depend on."""

from __future__ import annotations

import collections
import json
import os
import random
from pathlib import Path

import pytest

from mmit.errors import ConfigError, MmitError, RecordError
from mmit.records import Image, Text
from mmit.templates import load
from mmit.templates.bank import Template
from mmit.templates.options import OptionStyle
from mmit.templates.render import draw, render
from mmit.templates.shots import Pool, check_shots, with_shots

RENDERS = Path(__file__).parents[3] / "shared" / "data" / "t0_renders"
SHAPES = ("circle", "rectangle", "triangle")


def rendered(jinja: str, fields: dict, *, seed: int = 0, options: OptionStyle | None = None, **template):
    return render(Template("t", jinja, **template), fields, rng=random.Random(seed), options=options, row="r:1")


def test_images_stand_where_the_template_puts_them():
    a, b = Image("a.png"), Image("b.png")
    fields = {"images": [a, b], "q": "?", "x": "y"}
    out = rendered("First {{ images[1] }} then {{ images[0] }}: {{ q }}|||{{ x }}", fields)
    assert out.parts == (Text("First "), b, Text(" then "), a, Text(": ?"))
    assert out.target == "y" and out.choices is None
    again = rendered("{{ image }}{{ image }}same|||y", {"image": a})
    assert again.parts == (a, a, Text("same"))


@pytest.mark.parametrize("text", ["a ||| b", "<image>", "{{ image }}", "\ue0001\ue001", "{% raw %}"])
def test_no_text_of_a_field_becomes_structure(text):
    out = rendered("{{ image }}{{ q }}|||{{ q }}", {"image": Image("a.png"), "q": text})
    assert out.parts == (Image("a.png"), Text(text))
    assert out.target == text


@pytest.mark.parametrize(
    ("jinja", "fields", "said"),
    [
        ("{{ q }}|||{{ a }}", {"q": "x"}, "there is no field 'a'"),
        ("{{ q }}|||{{ a }}", {"q": "x", "a": " "}, "the answer is empty"),
        ("{{ q }}|||{{ a }}", {"q": "", "a": "x"}, "the question is empty"),
        ("{{ q }}|||{{ a }}", {"q": "x", "a": None}, "prints a null"),
        ("{{ q }}|||{{ a }}", {"q": ["x"], "a": "y"}, "prints a list"),
        ("{{ q }}|||{{ a }}", {"q": "x" * 5_000_000, "a": "y"}, "has 5,000,000 characters"),
        ("{% if q %}{{ q }}|||{% endif %}{{ a }}", {"q": "", "a": "y"}, "renders to 1 sides"),
        ("{{ q }}|||{{ image }}", {"q": "x", "image": Image("a.png")}, "the answer holds an image"),
        ("{{ q }}|||y", {"q": "x", "image": Image("a.png")}, "shows none"),
        ("{{ image[:5] }}|||y", {"image": Image("a.png")}, "cuts an image in two|shows none"),
        ("{{ q }}|||{{ answer_choices[7] }}", {"q": "x"}, r"answer_choices|list"),
        ("{{ q }}|||y", {"q": "x", "options_": "z"}, "a field is named 'options_'"),
    ],
)
def test_a_row_that_does_not_suit_is_one_error_with_its_place(jinja, fields, said):
    with pytest.raises(RecordError, match=said) as caught:
        rendered(jinja, fields, choices=SHAPES)
    assert "r:1" in str(caught.value)


def test_choices_of_a_row_may_not_repeat():
    with pytest.raises(RecordError, match="the choice 'a' occurs twice"):
        rendered("{{ q }}|||{{ a }}", {"q": "x", "a": "a", "b": "a"}, choices="{{ a }} ||| {{ b }}")


@pytest.mark.parametrize("style", ["letters", "numbers", "dashes"])
def test_the_order_of_choices_is_uniform_and_the_answer_follows_it(style):
    marks = style != "dashes"
    options = OptionStyle(1.0, (style,), "mark" if marks else "text")
    places = collections.Counter()
    template = Template("t", "Which?|||{{ shape }}", choices=SHAPES)
    for seed in range(3000):
        out = render(template, {"shape": "circle"}, rng=random.Random(seed), options=options, row="r:1")
        assert out.options is not None and set(out.options.order) == set(SHAPES)
        at = out.options.order.index("circle")
        places[at] += 1
        assert out.target == (("ABC"[at] if style == "letters" else str(at + 1)) if marks else "circle")
        mark = {"letters": f"{'ABC'[at]}.", "numbers": f"{at + 1}.", "dashes": "-"}[style]
        assert f"{mark} circle" in out.parts[0].text.splitlines()
    # chi-squared with two degrees of freedom: 13.8 is exceeded with probability 0.001
    assert sum((n - 1000) ** 2 / 1000 for n in places.values()) < 13.8


def test_shares_of_options_inversion_and_examples_hold():
    templates = (Template("a", "A|||x"), Template("b", "B|||x"), Template("i", "I|||x", inverted=True))
    rng = random.Random(0)
    turned = sum(draw(templates, rng=rng, inversion=0.3, count=1)[0].inverted for _ in range(50_000))
    assert abs(turned / 50_000 - 0.3) < 0.01
    options = OptionStyle(0.5, ("letters", "numbers", "dashes"))
    styles = collections.Counter()
    template = Template("t", "Which?|||{{ s }}", choices=SHAPES)
    for _ in range(10_000):
        out = render(template, {"s": "circle"}, rng=rng, options=options)
        styles[out.options.style if out.options else None] += 1
    assert abs(styles[None] / 10_000 - 0.5) < 0.02
    assert all(abs(styles[name] / 10_000 - 1 / 6) < 0.015 for name in options.styles)


def test_options_are_placed_where_a_template_names_them_and_the_answer_must_be_among_them():
    out = rendered("{{ options_ }}\nWhich?|||{{ s }}", {"s": "circle"}, choices=SHAPES)
    assert out.parts[0].text.startswith("OPTIONS:\n- ") and out.parts[0].text.endswith("\nWhich?")
    listed = {"options": OptionStyle(1.0), "choices": SHAPES}
    for options in (OptionStyle(1.0), None):  # whether they are listed or not
        with pytest.raises(RecordError, match="'square' is not among the choices"):
            rendered("Which?|||{{ s }}", {"s": "square"}, choices=SHAPES, options=options)
    turned = rendered("Ask for a {{ s }}.|||Which {{ s }}?", {"s": "circle"}, inverted=True, choices=SHAPES)
    assert turned.target == "Which circle?"
    assert rendered("Which?|||{{ s }}", {"s": "circle"}, choices_in_prompt=True, **listed).options is None
    assert rendered("Which?|||{{ s }}", {"s": "circle"}, inverted=True, **listed).options is None


@pytest.mark.parametrize(
    "arguments", [(1.5,), (0.5, ("roman",)), (0.5, ()), (0.5, ("letters",), "word"), (0.5, ("dashes",), "mark")]
)
def test_unusable_option_styles(arguments):
    with pytest.raises(ConfigError, match="options"):
        OptionStyle(*arguments)


def test_drawn_wordings_differ_and_too_many_are_refused():
    templates = tuple(Template(str(i), f"{i}|||x") for i in range(5))
    for seed in range(50):
        drawn = draw(templates, rng=random.Random(seed), inversion=0.5, count=5)
        assert len({t.id for t in drawn}) == 5
    with pytest.raises(ConfigError, match="6 wordings per row"):
        draw(templates, rng=random.Random(0), inversion=0.0, count=6)


def test_examples_never_share_an_image():
    images = [(f"{i // 3}.png",) for i in range(60)]  # three rows an image
    pool = Pool(list(range(60)), images)
    rng = random.Random(0)
    for asked in range(60):
        for _ in range(50):
            drawn = pool.draw(4, rng=rng, images=images[asked], skip=asked)
            shown = [images[at] for at in (*drawn, asked)]
            assert len(set(shown)) == 5
    with pytest.raises(ConfigError, match="only 19 rows share no image"):
        pool.draw(20, rng=rng, images=images[0], skip=0)


def test_examples_stand_before_the_question_images_included():
    question = rendered("{{ image }}Q|||a", {"image": Image("q.png")})
    shot = rendered("{{ image }}S|||b", {"image": Image("s.png")})
    out = with_shots(question, [shot, rendered("T|||c", {})])
    assert out.parts == (Image("s.png"), Text("S\nb\n\nT\nc\n\n"), Image("q.png"), Text("Q"))
    assert out.target == "a"
    for shares in ({0: 0.5}, {-1: 1.0}, {0: 1.5, 1: -0.5}, {True: 1.0}):
        with pytest.raises(ConfigError, match="shots"):
            check_shots(shares)


def _published(task: str) -> dict[str, list[dict[str, str]]]:
    return {
        path.stem[len(task) + 1 :].rstrip("_"): [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in RENDERS.glob(f"{task}_*.jsonl")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "base", "after"),
    [
        ("ag_news", "classify", " \nWhat label best describes this news article?"),
        ("rotten_tomatoes", "Sentiment_with_choices", " \nIs this review positive or negative?"),
    ],
)
def test_published_renders_of_t0_are_reproduced(task, base, after):
    """Recover text and label from one template's renders; the other templates must write the published texts."""
    sources = os.environ.get("MMIT_PROMPTSOURCE")
    if not sources or not RENDERS.exists():
        pytest.skip("set MMIT_PROMPTSOURCE to PromptSource's folder of templates; the renders must be at hand")
    bank = load(f"promptsource:{Path(sources) / task}")
    by_name = {t.reference.split(":")[0].replace(" ", "_"): t for t in bank.templates}
    published = _published(task)
    base_template = by_name[base]
    compared = 0
    for name, renders in published.items():
        template = by_name[name]
        assert len(renders) == len(published[base])
        for known, wanted in zip(published[base], renders, strict=True):
            text = known["prompt"].rstrip("\n")
            assert text.endswith(after)
            answer = known["completion"].removesuffix("<|endoftext|>").strip()
            choices = [c.strip() for c in str(base_template.choices).split("|||")]
            fields = {"text": text[: -len(after)], "label": choices.index(answer)}
            out = render(template, fields, rng=random.Random(0))
            assert out.parts[0].text.strip() == wanted["prompt"].strip(), name
            assert out.target.strip() == wanted["completion"].removesuffix("<|endoftext|>").strip(), name
            compared += 1
    assert compared == 200 * len(published)


def test_random_fields_never_break_the_renderer():
    rng = random.Random(1)
    alphabet = ["{{", "}}", "|||", "{%", "%}", "\n", "\x1b", "\ue000", "é", "<image>", "a b", "0", "'", '"', "\\"]
    template = Template("t", "{{ image }}Say: {{ q }} now|||{{ a }}!")
    for _ in range(500):
        q, a = ("".join(rng.choices(alphabet, k=rng.randint(0, 8))) for _ in range(2))
        try:
            out = render(template, {"q": q, "a": a, "image": Image("i.png")}, rng=rng)
        except MmitError:
            raise AssertionError(f"refused {q!r} {a!r}") from None
        assert out.parts == (Image("i.png"), Text(f"Say: {q} now")) and out.target == f"{a}!"
