"""`mmit serve` as a process: what hostile clients, a signal under load and other people's clients meet.

MMIT_FUZZ=N sends so many malformed requests (3,000 without it; 10,000 take a minute and a half).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmit.serve.app import READERS, Settings
from mmit.serve.requests import Limits
from mmit.train.run import run
from tests.serve import malformed
from tests.serve.client import CHAT, data_url, png, shown, user
from tests.serve.sockets import served
from tests.test_generate import build
from tests.tiny_run import two_layers as tiny_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FUZZ = int(os.environ.get("MMIT_FUZZ", "3000"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    run(tiny_config(place, train={"steps": 1, "eval_every": None}))
    return place / "run"


@contextmanager
def process(folder: Path, *more: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "mmit", "serve", str(folder), "--port", "0", "--name", "tiny", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    found = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert found.stderr is not None
        told = ""
        while not (at := re.search(r"http://127\.0\.0\.1:(\d+)/ ", told)):
            line = found.stderr.readline()
            assert line, told
            told += line
        yield int(at[1]), found
    finally:
        found.kill()
        found.wait()


def post(port: int, body: Any, path: str = CHAT, timeout: float = 60) -> Any:
    content = json.dumps(body).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        return json.loads(answer.read())


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read()


# --- malformed requests ---------------------------------------------------------------------------------------------


def memory(pid: int) -> int:
    """Kilobytes that are resident."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])  # type: ignore[index]


def test_malformed_requests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None is answered by a 5xx, none keeps a slot, none keeps memory."""
    told: list[str] = []
    with process(folder, "--read-timeout", "0.5", "--max-body-mb", "1") as (port, server):
        assert server.stderr is not None
        reader = threading.Thread(target=lambda: told.extend(server.stderr), daemon=True)  # type: ignore[arg-type]
        reader.start()
        # Clients that send a part of a head or of a body, and then nothing, beside all others.
        held = []
        for n in range(40):
            place = socket.create_connection(("127.0.0.1", port))
            place.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"[: 5 + n])
            held.append(place)
        statuses: Counter[int] = Counter()
        with ThreadPoolExecutor(8) as pool:
            warm = FUZZ // 5
            statuses.update(pool.map(lambda seed: malformed.send(port, seed), range(warm)))
            before = memory(server.pid)
            began = time.monotonic()
            statuses.update(pool.map(lambda seed: malformed.send(port, seed), range(warm, FUZZ)))
        seconds = time.monotonic() - began
        grown = memory(server.pid) / before - 1
        assert server.poll() is None
        until = time.monotonic() + 20
        while (state := json.loads(get(port, "/health")))["running"] or state["waiting"]:
            assert time.monotonic() < until, state
            time.sleep(0.05)
        assert post(port, {"model": "tiny", "messages": [user()], "max_tokens": 4})["choices"]
        for place in held:
            place.close()
    with capsys.disabled():
        print(f"\n{FUZZ} malformed: {dict(sorted(statuses.items()))}, memory {grown:+.1%}, {seconds:.0f} s")  # noqa: T201
    assert not [status for status in statuses if status >= 500], statuses
    assert statuses[200] and statuses[400] and len(statuses) >= 6
    assert grown <= 0.05
    if told and (keep := os.environ.get("MMIT_FUZZ_LOG")):
        Path(keep).write_text("".join(told))
    assert "Traceback" not in "".join(told), "libjpeg's own warnings may be there"


# --- a while of mixed load ------------------------------------------------------------------------------------------


def test_mixed_load_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `bench_serve.py --soak` asks: once it is warm, no thread more, no file more, and memory as it was."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    load = importlib.import_module("bench_serve_load")
    with process(folder) as (port, server):
        place = load.Place(f"http://127.0.0.1:{port}", "tiny")

        idle = load.held(server.pid)

        def some(seconds: float, first: int, clients: int, most: int) -> tuple[Counter[str], Any]:
            """What was asked, and what is held once no more than `most` files are open, or after 20 seconds."""
            asking = load.Load(place, size=load.Size(12, words=60), clients=clients, first=first)
            time.sleep(seconds)
            asking.end()
            assert asking.problems == [] and load.busy(place) == 0
            until = time.monotonic() + 20  # the server sees a moment later that a client, `busy` too, has left
            while (seen := load.held(server.pid)).files > most and time.monotonic() < until:
                time.sleep(0.1)
            return asking.counts, seen

        counts, warm = some(10, 0, clients=2 * READERS, most=10**6)
        more, after = some(20, 10**6, clients=4, most=warm.files)
        assert more.keys() == load.KINDS.keys() and min(counts.total(), more.total()) > 20, (counts, more)
        assert load.remembered(place) > 0
    assert after.files <= warm.files
    # Pools start a thread when all of theirs are busy: a warm server may lack readers, and Starlette's for files.
    assert after.threads <= max(warm.threads, idle.threads + READERS) + 2, (idle, warm, after)
    assert after.memory < 1.05 * warm.memory


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ({}, []),
        ({"memory": 1.06}, ["memory grew from 1,000 to 1,060 MB, more than 5%"]),
        ({"memory": 1.04}, []),
        ({"files": 1}, ["13 files are open, 12 were before"]),
        ({"threads": 1}, ["11 threads, once warm there were 10"]),
        ({"slots": 2}, ["2 slots are taken, and nobody asks"]),
    ],
)
def test_a_soak_tells_what_grew(what: dict[str, Any], told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is warm: what comes before does not count, nor does one minute of many."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    load = importlib.import_module("bench_serve_load")

    def minute(at: int) -> Any:
        warm, late = at >= 15, at > 50
        memory = (1000.0 if warm else 300.0) * (what.get("memory", 1) if late else 1) * (1.5 if at == 40 else 1)
        held = load.Held(memory, 30, 10 if warm else 4)
        return load.Minute(at, held, 0, 3, at, 0, 0)

    last = load.Held(900, 12 + what.get("files", 0), 10 + what.get("threads", 0))
    end = minute(61)._replace(held=last, slots=what.get("slots", 0))
    assert load.grown([minute(n) for n in range(61)], load.Held(200, 12, 4), end) == told


# --- a signal under load --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("grace", ["20", "0"])
def test_a_signal_under_load(folder: Path, grace: str) -> None:
    """Running answers end, or say why they do not; the process ends in time, and in peace."""
    with process(folder, "--grace", grace) as (port, server):
        results: list[tuple[int, int, bytes]] = []

        def ask(n: int) -> None:
            body = {"model": "tiny", "messages": [user(text=f"Question {n}")], "max_tokens": 400, "stream": n % 2 == 0}
            content, status = json.dumps({**body, "temperature": 3.0}).encode(), 200
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}{CHAT}", content, {"Content-Type": "application/json"}
            )
            while status == 200:
                try:
                    with urllib.request.urlopen(asked, timeout=60) as answer:
                        status, told = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, told = error.code, error.read()
                except urllib.error.URLError:
                    return  # nobody listens any more
                results.append((n, status, told))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert server.wait(40) == 0
        assert time.monotonic() - began < float(grace) + 8
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert {n for n, _, _ in results} == set(range(16))
    for n, status, told in results:
        if status != 200:
            assert status == 503 and json.loads(told)["error"]["code"] == "closing"
        elif n % 2 == 0:
            assert told.endswith(b"data: [DONE]\n\n"), "a stream was cut off"
            assert b'"finish_reason":"' in told or (grace == "0" and b'"code":"closing"' in told)
        else:
            assert json.loads(told)["choices"][0]["finish_reason"]


# --- the same answers, and other people's clients ---------------------------------------------------------------------


def questions(count: int) -> list[list[dict[str, Any]]]:
    out = []
    for n in range(count):
        pictures = [shown(data_url(png((16 + n % 9, 20), (n * 37 % 256, 90, n * 11 % 256))))] if n % 3 else []
        out.append([user(*pictures, text=f"What is number {n}?")])
    return out


def streamed(url: str, body: dict[str, Any]) -> str:
    content = json.dumps({**body, "stream": True}).encode()
    asked = urllib.request.Request(url + CHAT, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        lines = [line[6:] for line in answer.read().decode().split("\n\n") if line.startswith("data: {")]
    return "".join(c["delta"].get("content", "") for line in lines for c in json.loads(line)["choices"])


def test_a_hundred_answers_are_the_models_own() -> None:
    """Streamed and not, alone and among 16 clients."""
    model = build()
    asked = questions(100)
    own = [model.chat(messages=messages, max_new_tokens=12, temperature=0) for messages in asked]
    with served({"tiny": build()}) as (url, _):
        port = int(url.rpartition(":")[2])
        bodies = [{"model": "tiny", "messages": m, "max_tokens": 12, "temperature": 0} for m in asked]

        def whole(body: dict[str, Any]) -> str:
            return post(port, body)["choices"][0]["message"]["content"]

        def stream(body: dict[str, Any]) -> str:
            return streamed(url, body)

        for way in (whole, stream):
            assert [way(body) for body in bodies] == own
            with ThreadPoolExecutor(16) as pool:
                assert list(pool.map(way, bodies)) == own


def test_the_client_of_openai() -> None:
    openai = pytest.importorskip("openai")
    model = build()
    with served({"tiny": build()}) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [m.id for m in client.models.list()] == ["tiny"]
        messages: list[Any] = questions(2)[1]
        asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
        own = model.chat(messages=messages, max_new_tokens=8, temperature=0)
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == own and whole.usage.prompt_tokens_details.cached_tokens is not None
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == own
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        assert client.completions.create(model="tiny", prompt="Once", max_tokens=3).choices[0].text is not None
        file = client.files.create(file=("a.png", png()), purpose="vision")
        part = {"type": "file", "file": {"file_id": file.id}}
        assert client.chat.completions.create(**{**asked, "messages": [user(part)]}).choices
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.BadRequestError, match="not supported") as found:
            client.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
        assert found.value.param == "tools" and found.value.code == "unsupported_parameter"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**asked, "model": "other"})


def test_curl(tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    with served({"tiny": build()}) as (url, _):
        body = {"model": "tiny", "messages": questions(2)[1], "max_tokens": 8, "temperature": 0}
        (tmp_path / "body.json").write_text(json.dumps(body))
        asks = [curl, "-sS", "-N", f"{url}{CHAT}", "-H", "Content-Type: application/json", "-d", "@body.json"]
        found = subprocess.run(asks, cwd=tmp_path, capture_output=True, check=True, timeout=60)
        own = build().chat(messages=body["messages"], max_new_tokens=8, temperature=0)
        assert json.loads(found.stdout)["choices"][0]["message"]["content"] == own
        (tmp_path / "a.png").write_bytes(png())
        put = [curl, "-sS", f"{url}/v1/files", "-F", "purpose=vision", "-F", "file=@a.png"]
        made = subprocess.run(put, cwd=tmp_path, capture_output=True, check=True, timeout=60)
        assert json.loads(made.stdout)["bytes"] == len(png())


def test_an_image_of_megabytes_is_refused_politely() -> None:
    """A client that still sends hears why."""
    with served({"tiny": build()}, Settings(limits=Limits(body=1 << 20))) as (url, _):
        body = {"model": "tiny", "messages": [user(shown("data:image/png;base64," + "A" * (3 << 20)))]}
        with pytest.raises(urllib.error.HTTPError) as found:
            post(int(url.rpartition(":")[2]), body)
        assert found.value.code == 413 and "1,048,576 bytes" in json.loads(found.value.read())["error"]["message"]
