"""The same stages on Ray: the same bytes, one error, nothing lost, and no more actors than cores.

They run with `-m slow` where Ray is installed (`pip install '.[ray]'`), and are skipped with that reason elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit.build.executor import Asker, RayPool, Spread, cluster_of, run
from mmit.cli import app
from mmit.errors import ConfigError, MmitError
from mmit.teachers import Draw, Request, open_teachers
from mmit.teachers.request import user
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server

HAS_RAY = importlib.util.find_spec("ray") is not None


def needs_ray(test):
    """Starting a cluster takes seconds, so these are slow, too."""
    return pytest.mark.slow(pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install '.[ray]'")(test))


@pytest.mark.parametrize(("named", "cluster"), [("local", None), ("ray", ""), ("ray:auto", "auto")])
def test_executors_by_name(named, cluster):
    assert cluster_of(named) == cluster


@pytest.mark.parametrize("named", ["rya", "local:here", ""])
def test_unknown_executors(named):
    with pytest.raises(ConfigError, match="unknown executor"):
        cluster_of(named)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_message_says_what_to_install():
    with pytest.raises(ConfigError, match=r"Ray is not installed(.|\n)*mmit-tune\[ray\]"):
        RayPool(len)


class Direct:
    """A pool of this process: what `Spread` does needs no cluster to be shown."""

    def __init__(self, stage):
        self.stage = stage

    def as_finished(self, batches):
        for batch in batches:
            yield batch, self.stage(batch)


def requests(count: int) -> list[Request]:
    return [Request(user(f"q{n}"), Draw(seed=n)) for n in range(count)]


def test_replies_before_an_error_are_kept_and_no_further_batch_is_sent():
    with Server() as server:
        described = {"open": f"{server.url}#m", "in_flight": 2, "pause": 0.01}
        spread = Spread(open_teachers(described)[0], 0, Direct(Asker(described, "")))
        assert sorted(request.text for request, _ in spread.ask(requests(5))) == [f"q{n}" for n in range(5)]
        server.faults = [("status", 404, "no such model")]
        got = []
        with pytest.raises(MmitError, match="no such model"):
            got.extend(request.text for request, _ in spread.ask(requests(9)))
        assert len(got) == 1 and len(server.bodies) == 5 + 2


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray")
    module.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield module
    module.shutdown()


def double(batch: list[int]) -> list[int]:
    if 500 in batch:
        raise ConfigError("is 500", where="row", remedy="Leave it out.")
    return [2 * n for n in batch]


@needs_ray
def test_a_stage_keeps_its_order_and_its_errors(ray):
    double = importlib.import_module("tests.build.test_executor").double  # by a name that the actors can import
    assert list(run(double, range(450), cluster="", workers=2)) == [2 * n for n in range(450)]
    with pytest.raises(ConfigError, match=r"row: is 500(.|\n)*Leave it out"):
        list(run(double, range(1000), cluster="", workers=1))


@needs_ray
def test_more_actors_than_cores_are_refused_with_the_numbers(ray):
    with pytest.raises(ConfigError, match="3 workers, but the cluster has 2 cores"):
        RayPool(len, "", 3)


def build(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["build", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but what names the folder or differs by run."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.jsonl"))}
    return {name: text for name, text in files.items() if name != "journal.jsonl"}


@needs_ray
def test_annotated_rows_are_byte_for_byte_the_same(ray, tmp_path):
    lines = [f"text {i},{['bad', 'good', ''][i % 3]}\n" for i in range(500)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    wordings = [
        {"id": str(n), "input": "{{ text }}\nIs it " + word + "?", "target": "{{ label }}"}
        for n, word in enumerate(("good or bad", "bad or good", "fine"))
    ]
    bank = {"task": "mood", "licence": "CC0-1.0", "fields": ["text", "label"], "templates": wordings}
    (tmp_path / "bank.yaml").write_text(dump_yaml(bank | {"choices": ["bad", "good"]}))
    config = {"rows": {"path": "rows.csv", "licence": "MIT"}, "bank": "bank.yaml", "shots": {0: 0.5, 2: 0.5}}
    (tmp_path / "c.yaml").write_text(dump_yaml(config | {"options": {"share": 0.5}}))
    build("annotated", tmp_path / "c.yaml", "--out", tmp_path / "out")
    expected = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    build("annotated", tmp_path / "c.yaml", "--out", tmp_path / "out", "--executor", "ray", "--workers", 2)
    assert contents(tmp_path / "out") == expected and len(expected) == 2


@needs_ray
def test_a_teachers_stages_are_byte_for_byte_the_same_and_go_on_from_the_journal(ray, tmp_path):
    def answer(body) -> str:
        text = body["messages"][-1]["content"]
        return "" if text == "Say 3." else f"A {text} {body['seed']}"

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"instruction": f"Say {n}."}) + "\n" for n in range(60)))
    with Server(answer) as server:
        teacher = {"open": f"{server.url}#m", "terms": "MIT", "in_flight": 4, "pause": 0.01}
        settings = {"rows": {"path": "rows.jsonl", "licence": "MIT"}, "teacher": teacher}
        (tmp_path / "c.yaml").write_text(dump_yaml(settings))
        build("outputs", tmp_path / "c.yaml", "--out", tmp_path / "one")
        ray_ = ("--executor", "ray", "--workers", 2)
        (tmp_path / "c.yaml").write_text(dump_yaml(settings | {"budget": {"requests": 20}}))
        said = build("outputs", tmp_path / "c.yaml", "--out", tmp_path / "two", *ray_, code=3)
        assert "the budget is spent" in said
        assert 20 <= server.served - 60 <= 20 + 2 * 4  # at most what two actors have in flight
        (tmp_path / "c.yaml").write_text(dump_yaml(settings))
        build("outputs", tmp_path / "c.yaml", "--out", tmp_path / "two", *ray_)
        assert server.served == 120
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_workers_without_ray_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say 1."}\n')
    with Server() as server:
        settings = {"rows": {"path": "rows.jsonl", "licence": "MIT"}, "teacher": f"{server.url}#m"}
        (tmp_path / "c.yaml").write_text(dump_yaml(settings))
        said = build("outputs", tmp_path / "c.yaml", "--out", tmp_path / "out", "--workers", 2, code=2)
    assert "counts the actors of --executor ray" in said
