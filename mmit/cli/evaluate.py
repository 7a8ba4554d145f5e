"""`mmit eval`: a model's scores on tasks, beside their baselines; `mmit compare`: two models on the same questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.loading import AllowCode, Device, Dtype, ForeignBase, ForeignChat, TemplateArgs, template_args_of
from mmit.text import echo, terminal

if TYPE_CHECKING:
    from mmit.eval.baselines import Subject
    from mmit.eval.tasks import Task

DEFAULT_TASK = "easy_vqa"
KEY = "OPENAI_API_KEY"

RunArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN_OR_CHECKPOINT]",
        help="A run's folder, one of its checkpoints, a llava-hf folder, or the base URL of an OpenAI-compatible "
        "endpoint.",
    ),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "--tasks",
        "-t",
        help=f"Names or YAMLs of tasks, with commas or repeated. (default: {DEFAULT_TASK})",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Questions asked, a fixed seeded sample. (default: the task's)")
]
BaselineNOption = Annotated[
    int, typer.Option(min=1, help="Questions asked of the untuned model, in probes and in other wordings.")
]
ProbeOption = Annotated[str, typer.Option(help="What is done to the pictures, with commas: blank, swap, or none.")]
TemplatesOption = Annotated[
    int, typer.Option(min=0, help="Ask in so many wordings, the task's own first; 0 asks in that alone.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help=f"Folder of the results. (default: RUN/eval, of other tasks than {DEFAULT_TASK} RUN/eval/TASK)",
    ),
]
DevicesOption = Annotated[
    int | None, typer.Option(min=1, help="Start this many processes here, which share the questions.")
]
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with one folder per benchmark; a task of your own looks there before its own folder.",
    ),
]
JudgeUrlOption = Annotated[
    str | None, typer.Option(envvar="MMIT_JUDGE_URL", help="Base URL of the judge, for tasks that need one.")
]
JudgePromptOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The judge's prompt in place of mmit's wording.")
]


def evaluate(
    context: typer.Context,
    run: RunArgument = None,
    task: TaskOption = None,
    limit: LimitOption = None,
    *,
    model: Annotated[str | None, typer.Option(help="Another way to give RUN_OR_CHECKPOINT.")] = None,
    baseline_n: BaselineNOption = 500,
    baselines: Annotated[bool, typer.Option(help="Score the baselines, probes and wordings too.")] = True,
    probe: ProbeOption = "blank",
    templates: TemplatesOption = 0,
    out: OutOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 64,
    device: Device = "auto",
    dtype: Dtype = None,
    devices: DevicesOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop answers on file and start anew.")] = False,
    data_root: DataRootOption = None,
    chat: ForeignChat = None,
    base: ForeignBase = None,
    template_arg: TemplateArgs = None,
    allow_code: AllowCode = False,
    endpoint_model: Annotated[str | None, typer.Option(help="Model of the endpoint that is evaluated.")] = None,
    judge_url: JudgeUrlOption = None,
    judge_model: Annotated[str | None, typer.Option(envvar="MMIT_JUDGE_MODEL", help="The judge's model.")] = None,
    judge_prompt: JudgePromptOption = None,
    key_env: Annotated[str, typer.Option(help="Environment variable with the key of endpoint and judge.")] = KEY,
) -> None:
    """Score a model on tasks and write a report.

    Beside the score stand chance and the majority answer, the untuned model (the same base with a fresh projector and
    no adapter), and the tuned model without the pictures. Answers are kept as they come, so that an evaluation that was
    cut off goes on where it stopped; the processes of --devices, torchrun or the deepspeed launcher share the
    questions. Several tasks get a table in summary.md and summary.tex too.
    """
    from mmit.eval.tasks import load_tasks

    run = _one_model(run, model)
    tasks = load_tasks(_names(task), where="--task", data_root=data_root)
    probes = _probes(probe)
    metric_of = _judges(tasks, url=judge_url, model=judge_model, prompt=judge_prompt, key_env=key_env)
    if devices is not None and devices > 1:
        raise typer.Exit(_on_devices(context, devices, device))
    from mmit.eval.baselines import Beside
    from mmit.eval.ranks import from_environment
    from mmit.eval.runner import How
    from mmit.eval.summary import check_tasks, run_tasks
    from mmit.eval.tasks import task_items

    # Before any model is loaded: a missing file, a bad row or a missing package should not cost minutes.
    asked = [(one, task_items(one.model_copy(update={"sample": None}))) for one in tasks]
    beside = Beside(baseline_n if baselines else 0, probes, templates)
    check_tasks(asked, beside, sample=limit)
    told: dict[str, Any] = {"template_args": template_args_of(template_arg), "out": out}
    if run.startswith(("http://", "https://")):
        where, subject = _endpoint(run, model=endpoint_model, key_env=key_env, batch_size=batch_size, **told)
    else:
        told |= {"foreign": {"chat": chat, "base": base}, "allow_code": allow_code}
        where, subject = _folder(run, **told, device=device, dtype=dtype)
    alone = len(tasks) == 1
    run_tasks(
        subject,
        asked,
        folder_of=lambda one: results_folder(where, one.name, out, alone=alone),
        summary_in=None if alone else out or results_folder(where, DEFAULT_TASK, None, alone=True),
        metric_of=metric_of,
        beside=beside,
        how=How(sample=limit, batch_size=batch_size, ranks=from_environment(), overwrite=overwrite),
    )


def _one_model(run: str | None, model: str | None) -> str:
    from mmit.errors import ConfigError

    if (run is None) == (model is None):
        problem = "no model" if run is None else f"two models, {run} and {model}"
        remedy = "Give one: a run's folder, a checkpoint, a llava-hf folder or an endpoint's URL."
        raise ConfigError(problem, where="mmit eval", remedy=remedy)
    return run or model or ""


def _on_devices(context: typer.Context, devices: int, device: str) -> int:
    """Start this command once for each device, and return the exit code."""
    from mmit.cli.launch import check_devices, launch, words_of_ranks

    check_devices(devices, device=device)
    return launch(words_of_ranks(context), devices=devices, device=device)


def _names(given: list[str] | None) -> list[str]:
    """Return the tasks asked for, each once: two of one name would write the same files."""
    names = [name.strip() for one in given or [DEFAULT_TASK] for name in one.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _endpoint(
    url: str, *, model: str | None, key_env: str, batch_size: int, template_args: dict[str, Any], out: Path | None
) -> tuple[Path, Subject]:
    """Return where results go, and the endpoint with what a report says of it."""
    from mmit.errors import ConfigError
    from mmit.eval.baselines import Subject
    from mmit.eval.endpoint import EndpointModel
    from mmit.teachers.endpoint import Endpoint

    if template_args:
        raise ConfigError("an endpoint writes its prompts itself", where="--template-arg", remedy="Leave it out.")
    if out is None:
        raise ConfigError("no folder for the results", where="--out", remedy="An endpoint has none: give --out.")
    # The server's own batching is as good as ours: so many questions at a time, at most 16.
    endpoint = Endpoint(url, model or "", key_env=key_env, in_flight=min(batch_size, 16))
    name = f"{endpoint.model} at {url}"
    return out, Subject(EndpointModel(endpoint), name, name, no_untuned="an endpoint shows the model alone")


def _folder(
    run: str,
    *,
    foreign: dict[str, Any],
    template_args: dict[str, Any],
    allow_code: bool,
    out: Path | None,
    **place: Any,
) -> tuple[Path, Subject]:
    """Return where results go by default, and the model of a folder with what a report says of it.

    `foreign` are options for a folder of another project, `place` where the model computes and in which numbers.
    """
    from mmit.errors import ConfigError
    from mmit.eval.baselines import Subject
    from mmit.eval.runner import Lazy
    from mmit.generate import load
    from mmit.interop.foreign import is_foreign
    from mmit.models.hub import is_hub_id, model_folder
    from mmit.train.checkpoint.folders import staying
    from mmit.train.checkpoint.model import MANIFEST, find, no_untuned

    if out is None and is_hub_id(run):
        raise ConfigError("no folder for the results", where="--out", remedy="The hub's cache is none: give --out.")
    folder = model_folder(run)
    # Answers to other prompts are another model's.
    told = f" {json.dumps(template_args, sort_keys=True)}" if template_args else ""
    options: dict[str, Any] = {**place, "template_args": template_args}
    if is_foreign(folder):
        other = _told(load(folder, **foreign, **options))
        why = "the weights before training are not in the folder"
        return folder, Subject(other, run, _content(folder) + told, other.number_format, no_untuned=why)
    checkpoint = find(folder, warn=lambda text: echo(text, err=True))
    options["allow_code"] = allow_code
    with staying(checkpoint):
        why = no_untuned(checkpoint)
        fingerprint = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16] + told
    model = _told(load(checkpoint, **options))

    def before() -> Any:
        # A run that goes on may have removed this checkpoint by now; any other of it has the same model.
        source = checkpoint if checkpoint.exists() else find(checkpoint.parents[1])
        return load(source, untuned=True, **options)

    untuned = Lazy(before)  # one for all tasks
    given: dict[str, Any] = {"no_untuned": why} if why else {"untuned": lambda: untuned}
    return Path(run), Subject(model, str(checkpoint), fingerprint, model.number_format, **given)


def _told(model: Any) -> Any:
    for note in model.notes:
        echo(note, err=True)
    return model


def _content(folder: Path) -> str:
    """Hash what a folder of another project says and weighs."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".bin")):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _probes(given: str) -> list[str]:
    from mmit.errors import ConfigError, nearest
    from mmit.eval.baselines import PROBES

    names = [name.strip() for name in given.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in PROBES:
            raise ConfigError(f"unknown probe '{name}'", where="--probe", remedy=nearest(name, [*PROBES, "none"]))
    return names


def _judges(
    tasks: list[Task], *, url: str | None, model: str | None, prompt: Path | None, key_env: str
) -> Callable[[Task, Path], Any]:
    """Return what makes the metric of a task that needs a judge; raises ConfigError if there is none."""
    from mmit.errors import ConfigError
    from mmit.eval.judges import JUDGES, Judge

    needing = [one.name for one in tasks if one.metric in JUDGES]
    if needing and not (url and model):
        problem = f"task '{needing[0]}' needs a judge"
        remedy = f"Give --judge-url and --judge-model of an OpenAI-compatible endpoint; its key is read from {key_env}."
        raise ConfigError(problem, where="--judge-url", remedy=remedy)
    wording = None
    if prompt is not None:
        try:
            wording = prompt.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read: {error}", where=str(prompt), remedy="Check --judge-prompt.") from None

    def metric(one: Task, folder: Path) -> Any:
        if one.metric not in JUDGES:
            return None
        from mmit.teachers.endpoint import Endpoint

        judge = Endpoint(url or "", model or "", key_env=key_env)
        return Judge(one.metric, judge, path=folder / "judgements.jsonl", judge=judge.model, prompt=wording)

    return metric


def results_folder(run: Path, task: str, out: Path | None, *, alone: bool) -> Path:
    """Say where a task's results go.

    A checkpoint inside a run gets a folder of its own beside those of the run's other checkpoints.

    Args:
        run: the run, checkpoint or folder that is evaluated.
        task: its name.
        out: folder that was asked for, or None.
        alone: it is the only task.
    """
    if out is not None:
        return out if alone else out / task
    base = run / "eval"
    if run.resolve().parent.name == "checkpoints":
        base = run.resolve().parents[1] / "eval" / run.name
    return base if task == DEFAULT_TASK else base / task


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Results of one model: a folder of `mmit eval`.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Results of the other.")],
    *,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as JSON too.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Say whether one model is better than another on the questions that both answered.

    Pairs the answers by question. Right-or-wrong answers are tested by McNemar's exact test, partial credit by a paired
    bootstrap; the difference comes with its 95 % interval.
    """
    import json

    from mmit.eval import compare as comparing
    from mmit.io import write_atomic

    found = comparing.compare(a, b, seed=seed)
    terminal().print(comparing.console_table(found))
    for line in comparing.notes(found):
        echo(line)
    if out is not None:
        content = {"a": str(a), "b": str(b), "seed": seed, "tasks": [one.to_json() for one in found]}
        write_atomic(out, json.dumps(content, indent=2) + "\n")
