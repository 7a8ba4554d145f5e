"""Several processes share an evaluation: nothing lost, nothing doubled, the same file as one alone, killed or not."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmit.errors import MmitError
from mmit.eval import runner
from mmit.eval.ranks import ALONE, Ranks, from_environment
from mmit.eval.runner import Result
from mmit.eval.tasks import Item, Task
from mmit.records import Record
from tests.eval.loose import answered

TASK = Task(name="t", records="r", metric="exact")


def items(n: int = 23) -> list[Item]:
    return [Item(str(i), Record(Record.triple(f"q{i}?", "-").turns[:1], str(i)), f"q{i % 5}?") for i in range(n)]


class Echo:
    def __init__(self, die_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.die_after = die_after

    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        if self.die_after is not None and len(self.asked) >= self.die_after:
            raise KeyboardInterrupt
        self.asked += [record.id for record in records]
        return [record.turns[-1].text for record in records]


def together(folder: Path, world: int, models: Sequence[Echo]) -> list[Result | None]:
    """Run `world` ranks as threads; a rank that dies takes the others along, as a launcher does."""
    barrier, results = threading.Barrier(world), [None] * world

    def wait() -> None:
        barrier.wait(20)

    def rank(number: int) -> None:
        try:
            results[number] = answered(
                models[number],
                TASK,
                out_dir=folder,
                items=items(),
                batch_size=2,
                fingerprint="f",
                ranks=Ranks(number, world, wait),
                progress=False,
            )
        except (KeyboardInterrupt, threading.BrokenBarrierError):
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def alone(folder: Path) -> Result:
    given: dict[str, Any] = {"items": items(), "batch_size": 2, "fingerprint": "f", "progress": False}
    return answered(Echo(), TASK, out_dir=folder, **given)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK", 1)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_file_of_one_alone(tmp_path: Path, world: int) -> None:
    wanted = alone(tmp_path / "alone")
    models = [Echo() for _ in range(world)]
    results = together(tmp_path / "many", world, models)
    assert all(result is not None and result.score == wanted.score for result in results)
    assert (tmp_path / "many" / wanted.path.name).read_bytes() == wanted.path.read_bytes()
    asked = [name for model in models for name in model.asked]
    assert sorted(asked) == sorted(item.id for item in items()) and all(model.asked for model in models)
    assert [path.name for path in (tmp_path / "many").iterdir()] == [wanted.path.name]


def test_killed_ten_times_with_any_number_of_ranks(tmp_path: Path) -> None:
    wanted, draw = alone(tmp_path / "alone"), random.Random(0)
    for _ in range(10):
        world = draw.choice([1, 2, 4])
        models = [Echo(draw.randint(0, 4)) for _ in range(world)]
        together(tmp_path / "many", world, models)
        for path in (tmp_path / "many").glob("*.rank*.jsonl"):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) - draw.randint(0, 30)])
    result = together(tmp_path / "many", 2, [Echo(), Echo()])[0]
    assert result is not None and result.score == wanted.score
    assert sorted(result.path.read_bytes().splitlines()) == sorted(wanted.path.read_bytes().splitlines())


def test_leftovers_of_another_model_are_refused_or_dropped(tmp_path: Path) -> None:
    together(tmp_path, 2, [Echo(2), Echo(2)])
    given: dict[str, Any] = {"items": items(), "batch_size": 2, "fingerprint": "g", "progress": False}
    with pytest.raises(MmitError, match="fingerprint was 'f'"):
        answered(Echo(), TASK, out_dir=tmp_path, **given)
    assert answered(Echo(), TASK, out_dir=tmp_path, overwrite=True, **given).generated == 23
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert from_environment() is ALONE
