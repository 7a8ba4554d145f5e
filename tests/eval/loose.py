"""`evaluate` and `run_task` with options by name, whichever object they belong to: for tests."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from mmit.eval.baselines import Beside, Subject
from mmit.eval.report import run_task
from mmit.eval.runner import Arm, How, Result, evaluate
from mmit.eval.tasks import Task


def take(kind: type[Any], options: dict[str, Any]) -> Any:
    """Make a dataclass from those of the options that are its fields."""
    return kind(**{field.name: options.pop(field.name) for field in fields(kind) if field.name in options})


def answered(model: Any, task: Task, **options: Any) -> Result:
    """Evaluate a model."""
    options = {"fingerprint": "f", "progress": False} | options
    arm, how = take(Arm, options), take(How, options)
    return evaluate(model, task, arm, how=how, **options)


def reported(model: Any, task: Task, out_dir: Path, **options: Any) -> dict[str, Any]:
    """Evaluate a model beside its baselines."""
    options = {"name": "m", "fingerprint": "f", "progress": False, "model": model} | options
    subject, beside, how = take(Subject, options), take(Beside, options), take(How, options)
    return run_task(subject, task, out_dir=out_dir, beside=beside, how=how, **options)
