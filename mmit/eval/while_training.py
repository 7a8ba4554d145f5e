"""Benchmarks on the live weights of a run: what `train.eval_tasks` measures every `train.eval_every` steps.

In: names of tasks and how many questions of each. Out: a callable for `mmit.train.run.run` that gives one score a task,
under the task's name. Ranks share the questions, and every rank gets all scores. Writes no answers: `mmit eval` does
that with a checkpoint. Refuses tasks that need a judge; a run refuses ZeRO-3 (`train.resolve.check_zero3`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from mmit.errors import ConfigError
from mmit.eval.judges import JUDGES
from mmit.eval.metrics import check_installed, get_metric
from mmit.eval.questions import check_images, sample_items
from mmit.eval.runner import answers_to
from mmit.eval.tasks import load_tasks, task_items
from mmit.generate import Model

if TYPE_CHECKING:
    from mmit.train.checkpoint.model import Loaded

BATCH = 32  # questions at once; beside a training step there is less room than in `mmit eval`


def task_scores(names: Sequence[str], questions: int) -> Callable[[Loaded, int], Mapping[str, float]]:
    """Read the tasks now, so that a missing file ends the command at once, and return what measures them.

    Args:
        names: names or YAMLs of tasks, as `mmit eval --task` takes them.
        questions: asked of each task, the same seeded sample every time.

    Raises:
        ConfigError: a task needs a judge, or two have one name. What `load_task` and `task_items` raise.
    """
    tasks = load_tasks(names, where="train.eval_tasks")
    for task in tasks:
        if task.metric in JUDGES:
            problem, remedy = (
                f"task '{task.name}' needs a judge",
                "Measure it on a checkpoint: mmit eval RUN --task ...",
            )
            raise ConfigError(problem, where="train.eval_tasks", remedy=remedy)
    asked = []
    for task in tasks:
        items = sample_items(task_items(task.model_copy(update={"sample": None})), questions, task.seed)
        check_installed(task.metric, [item.reference for item in items])
        check_images(items)
        asked.append((task, items))

    def measure(live: Loaded, step: int) -> Mapping[str, float]:
        model = Model(live.vlm, live.tokenizer, live.chat, image=live.image)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        scores = {}
        for task, items in asked:
            mine = items[rank::world]
            said = answers_to(model, task, mine, batch_size=BATCH) if mine else []
            if world > 1:
                parts: list[list[str]] = [[] for _ in range(world)]
                dist.all_gather_object(parts, said)
                said = [parts[place % world][place // world] for place in range(len(items))]
            references = [item.reference for item in items]
            scores[task.name] = get_metric(task.metric)(said, references).value
        return scores

    return measure
