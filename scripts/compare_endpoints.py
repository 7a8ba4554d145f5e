"""Ask two OpenAI-compatible servers the same questions about pictures and compare their answers.

    python scripts/compare_endpoints.py http://127.0.0.1:8000/v1#mine http://127.0.0.1:8001/v1#theirs

Goes in: two addresses, each with the model's name behind a #, and how many questions. Comes out: the share of equal
greedy answers, the first that differ, and how long each server took. Refuses servers to which a picture is another
number of tokens: they bring pictures to another size, and their answers cannot be compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw

from mmit.errors import ConfigError, MmitError
from mmit.records import Image
from mmit.teachers.endpoint import Endpoint
from mmit.teachers.request import Draw, Reply, Request, user
from mmit.text import echo

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
ASKS = (
    "What color is the shape?",
    "What shape is there?",
    "Is there a circle?",
    "Is it red?",
    "What is in the picture?",
)
SIZES = ((96, 96), (160, 96), (96, 160), (336, 336), (200, 120))


def picture(number: int) -> PIL.Image.Image:
    """Return a circle, box or triangle of one colour on grey; colours, shapes and sizes take turns."""
    width, height = SIZES[number % len(SIZES)]
    made = PIL.Image.new("RGB", (width, height), (128, 128, 128))
    draw, colour = PIL.ImageDraw.Draw(made), list(COLOURS.values())[number % len(COLOURS)]
    left, top, right, bottom = width // 4, height // 4, 3 * width // 4, 3 * height // 4
    shape = number % 3
    if shape == 0:
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == 1:
        draw.rectangle((left, top, right, bottom), fill=colour)
    else:
        draw.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=colour)
    return made


def questions(count: int, tokens: int) -> list[Request]:
    """Return questions of one picture each, answered greedily."""
    greedy = Draw(max_tokens=tokens)
    return [Request(user(Image(picture(n)), ASKS[n // 4 % len(ASKS)]), greedy) for n in range(count)]


def replies(server: Endpoint, asked: Sequence[Request]) -> list[Reply]:
    """Replies in the order of the questions."""
    found = {id(request): reply for request, reply in server.ask(asked)}
    return [found[id(request)] for request in asked]


def image_tokens(server: Endpoint) -> list[int]:
    """Tokens that a picture adds to a prompt, one number for each of SIZES.

    Raises:
        ConfigError: the server does not tell how many tokens it read.
    """
    one = Draw(max_tokens=1)
    asked = [Request(user(ASKS[0]), one), *(Request(user(Image(picture(n)), ASKS[0]), one) for n in range(len(SIZES)))]
    counts = [reply.prompt_tokens for reply in replies(server, asked)]
    without, *given = [-1 if count is None else count for count in counts]
    if None in counts:
        remedy = "use a server that sends usage.prompt_tokens: mmit serve, vLLM, SGLang or llama.cpp"
        raise ConfigError("states no number of prompt tokens", where=server.url, remedy=remedy)
    return [count - without for count in given]


def server_of(text: str) -> Endpoint:
    """Return the client of `URL#MODEL`."""
    url, _, model = text.partition("#")
    return Endpoint(url, model or "default", in_flight=4, tries=2, deadline=120.0)


def compare(first: Endpoint, second: Endpoint, asked: Sequence[Request]) -> int:
    """Ask both, print what differs, and return the number of equal answers.

    Raises:
        ConfigError: a picture is another number of tokens to one of them.
    """
    tokens = [image_tokens(first), image_tokens(second)]
    if tokens[0] != tokens[1]:
        at = next(n for n, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b)
        (width, height), a, b = SIZES[at], tokens[0][at], tokens[1][at]
        shown = f"a picture of {width} x {height} is {a} tokens to one and {b} to the other"
        raise ConfigError(
            shown, where=f"{first.url} and {second.url}", remedy="serve the same export with the same picture size"
        )
    echo(f"tokens of a picture: {', '.join(str(count) for count in sorted(set(tokens[0])))} on both")
    answers = [replies(server, asked) for server in (first, second)]
    equal = [a.text == b.text for a, b in zip(*answers, strict=True)]
    echo(f"equal answers: {sum(equal)} of {len(equal)} ({sum(equal) / len(equal):.1%})")
    if not all(equal):
        at = equal.index(False)
        shown = " and ".join(repr(given[at].text) for given in answers)
        echo(f"first difference, question {at + 1} ({asked[at].text}): {shown}")
    for server, given in zip((first, second), answers, strict=True):
        seconds = sorted(reply.seconds for reply in given)
        high = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
        echo(f"{server.url}: median {statistics.median(seconds):.3f} s, p95 {high:.3f} s an answer")
    return sum(equal)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if at least the share asked for is equal, 1 if not, 2 where it cannot be compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url_a", help="base URL and model: http://127.0.0.1:8000/v1#model")
    parser.add_argument("url_b")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--at-least", type=float, default=1.0, help="share of equal answers below which it fails")
    given = parser.parse_args(arguments)
    if given.questions < 1 or given.max_tokens < 1:
        parser.error("--questions and --max-tokens must be above 0")
    try:
        asked = questions(given.questions, given.max_tokens)
        equal = compare(server_of(given.url_a), server_of(given.url_b), asked)
    except MmitError as error:
        echo(str(error), err=True)
        return 2
    return 0 if equal >= given.at_least * given.questions else 1


if __name__ == "__main__":
    sys.exit(main())
