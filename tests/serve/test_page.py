"""The page to chat on, in a headless Chromium: drop an image, ask, watch it stream, stop, regenerate, dark, on a phone.

MMIT_SCREENSHOTS=FOLDER keeps screenshots of what it looks like.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmit.serve.app import Settings
from tests.serve.client import png
from tests.serve.sockets import served
from tests.test_generate import build

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow
DROP = """([data, type]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), held = new DataTransfer();
  held.items.add(new File([bytes], "shape.png", { type: "image/png" }));
  const more = type === "paste" ? { clipboardData: held } : { dataTransfer: held };
  const kind = type === "paste" ? ClipboardEvent : DragEvent;
  document.dispatchEvent(new kind(type, { bubbles: true, cancelable: true, ...more }));
}"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = build()
    model.vlm.llm.register_forward_pre_hook(lambda *_: time.sleep(0.005))  # slow enough to be stopped
    with served({"tiny": model}, max_running=2) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 720})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_default_timeout(15_000)
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    assert not [text for text in wrong if "400 (Bad Request)" not in text], wrong
    context.close()


def keep(page: Any, name: str) -> None:
    if folder := os.environ.get("MMIT_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def drop(page: Any, kind: str = "drop") -> None:
    page.evaluate(DROP, [base64.b64encode(png((48, 48))).decode(), kind])
    page.wait_for_selector("#waiting img")


def ask(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")


def done(page: Any) -> None:
    page.wait_for_selector("#again")


def wait(page: Any, expression: str) -> Any:
    """The value of an expression once it is true; the page's policy lets Playwright's own waiting evaluate nothing."""
    until = time.monotonic() + 15
    while not (found := page.evaluate(expression)):
        assert time.monotonic() < until, expression
        time.sleep(0.01)
    return found


def test_an_image_is_dropped_and_asked_about(page: Any) -> None:
    keep(page, "empty")
    drop(page)
    keep(page, "dropped")
    ask(page, "What is it?")
    page.wait_for_selector("#stop:not(.hidden)")
    done(page)
    keep(page, "answered")
    assert re.search(r"image: 16 tokens", page.inner_text(".turn.user"))
    assert re.search(r"first token \d+ ms.*tokens?", page.inner_text(".turn.assistant .facts"), re.S)
    assert page.locator(".turn.user img").count() == 1
    page.reload()
    page.locator("#chats .open", has_text="What is it?").click()
    assert page.locator(".turn.user img").count() == 1, "it is in the history"
    page.click("#chats .drop")
    assert page.locator("#chats .open", has_text="What is it?").count() == 0


def test_it_streams_stops_and_answers_again(page: Any) -> None:
    page.click("#options")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "350")
    keep(page, "settings")
    page.keyboard.press("Escape")
    ask(page, "Tell me everything.")
    early = wait(page, "document.querySelector('.turn.assistant .words')?.textContent.length > 20 && 20")
    keep(page, "streaming")
    page.click("#stop")
    done(page)
    assert "stopped" in page.inner_text(".turn.assistant .facts")
    kept = page.inner_text(".turn.assistant .words")
    assert len(kept) >= early
    page.click("#again")
    page.wait_for_selector("#stop:not(.hidden)")
    page.keyboard.press("Escape")
    done(page)
    assert page.locator(".turn.assistant").count() == 1


def test_settings_reach_the_server(page: Any) -> None:
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if "completions" in request.url else None)
    page.click("#options")
    for name, value in {"system": "Be brief.", "temperature": "0", "max_tokens": "5", "seed": "3"}.items():
        page.fill(f"#{name}", value)
    page.click("#settings .main")
    drop(page, "paste")
    ask(page, "Hello")
    done(page)
    (body,) = asked
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["seed"], body["stream"]) == (0, 5, 3, True)
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "text"]


def test_text_of_a_model_is_text(page: Any) -> None:
    evil = "<img src=x onerror=alert(1)><b>bold</b> **x** </script><script>alert(2)</script>"
    chunk = {"choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body=body, content_type="text/event-stream"))
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    ask(page, evil)
    done(page)
    assert (
        page.inner_text(".turn.assistant .words") == evil and page.locator("#log img, #log b, #log script").count() == 0
    )
    assert page.inner_text(".turn.user .words") == evil


def test_an_error_is_shown_with_its_remedy(page: Any) -> None:
    page.click("#options")
    page.fill("#max_tokens", "5000")
    page.click("#settings .main")
    with page.expect_response("**/v1/chat/completions"):
        ask(page, "Hello")
    page.wait_for_selector("[role=alert]")
    assert "from 1 to 4096" in page.inner_text("[role=alert]") and page.inner_text("#again") == "Try again"
    keep(page, "error")


def test_dark_and_a_phone(browser: Any, url: str) -> None:
    context = browser.new_context(viewport={"width": 380, "height": 700}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    drop(page)
    ask(page, "What is it, and where, in a question that is longer than the screen of a phone is wide?")
    done(page)
    keep(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380, "nothing is wider than the screen"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(26, 27, 29)"
    page.click("#menu")
    time.sleep(0.1)
    keep(page, "phone-menu")
    assert page.locator("#new").is_visible()
    page.click("#new")
    page.click("#options")
    keep(page, "phone-settings")
    page.select_option("#theme", "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()


def test_by_keyboard_and_for_a_screen_reader(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input:not(.hidden), select, textarea")]
          .filter((node) => !(node.labels?.length || node.getAttribute("aria-label") || node.textContent.trim()))
          .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    seen = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"new", "model", "options", "text", "attach", "send"} <= set(seen)
    ask(page, "Hello")
    done(page)
    assert wait(page, "document.querySelector('#said').textContent").startswith("Model: ")


def test_a_key_is_asked_for(browser: Any) -> None:
    with served({"tiny": build(vision=False)}, Settings(keys=("first-key",))) as (url, _):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#settings[open]")
        page.fill("#key", "first-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model option", state="attached")
        assert "reads text only" in page.inner_text("#log")
        page.close()
