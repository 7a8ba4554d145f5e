"""lmms-eval and lm-eval, by their own command lines and offline, give the quickstart model the scores of `mmit eval`.

Needs the environment of tests/eval/harness/README.md, and a finished run: $MMIT_HARNESS_RUN, by default
runs/quickstart. Each harness and each model is started once for all tasks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmit.records import Image, Record, Text, Turn, write_jsonl
from tests.eval.harness.data import choices, write_all

pytestmark = pytest.mark.harness
ROOT = Path(__file__).resolve().parents[3]
RUN = Path(os.environ.get("MMIT_HARNESS_RUN", ROOT / "runs" / "quickstart"))
BIN = Path(sys.executable).parent
TOKENS = 16
SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\n\nAnswer with the option's letter from the given choices directly."
Yaml = dict[str, Any]

# harness's task -> (its metric, mmit's task, that task's YAML where mmit ships none of this profile)
LMMS: dict[str, tuple[str, str, Yaml]] = {
    "pope": (
        "pope_accuracy",
        "pope_lmms",
        {"layout": "pope", "folder": "pope", "prompt": SHORT, "metric": "pope:lmms"},
    ),
    "mme": ("", "mme", {}),
    "vqav2_val": (
        "exact_match",
        "vqav2_lmms",
        {"layout": "vqav2", "folder": "vqav2", "prompt": SHORT, "metric": "vqa:lmms_vqav2"},
    ),
    "textvqa_val": ("exact_match", "textvqa", {}),
    "vizwiz_vqa_val": ("exact_match", "vizwiz", {}),
    "gqa": ("exact_match", "gqa", {}),
    "scienceqa_img": ("exact_match", "scienceqa_img", {}),
    "seedbench": ("seed_all", "seedbench_img", {}),
    "ai2d": ("exact_match", "ai2d", {}),
    # lmms-eval has an empty line before MMBench's instruction.
    "mmbench_en_dev_static": (
        "gpt_eval_score",
        "mmbench_lmms",
        {"layout": "mmbench", "folder": "mmbench", "prompt": LETTER, "metric": "mmbench:static"},
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lmms_eval")
    pytest.importorskip("lm_eval")
    if not RUN.is_dir():
        pytest.skip(f"no run in {RUN}: set MMIT_HARNESS_RUN, or bash scripts/quickstart.sh")
    folder = tmp_path_factory.mktemp("harness")
    write_all(folder / "data")
    return folder


def call(place: Path, *command: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "hf"), "TQDM_DISABLE": "1"}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def results(folder: Path) -> dict[str, dict[str, float]]:
    """The scores of a harness's run: {task: {metric: value}}."""
    found: dict[str, dict[str, float]] = {}
    for path in folder.rglob("*results*.json"):
        if path.parent.name != "submissions":
            for task, values in json.loads(path.read_text())["results"].items():
                found[task] = {key.split(",")[0]: value for key, value in values.items()}
    assert found, folder
    return found


def ours(place: Path, tasks: dict[str, Yaml]) -> dict[str, Any]:
    """mmit's reports on tasks, {name: YAML, {} for one that mmit ships}."""
    command = ["mmit", "eval", str(RUN), "--data-root", "data", "--no-baselines", "--batch-size", "32"]
    for name, content in tasks.items():
        if content:
            own = {"name": name, "max_new_tokens": TOKENS, **content}
            (place / f"{name}.yaml").write_text(yaml.safe_dump(own))
        command += ["--task", f"{name}.yaml" if content else name]
    alone = len(tasks) == 1
    call(place, *command, "--out", f"ours/{next(iter(tasks))}" if alone else "ours")
    return {name: json.loads((place / "ours" / name / "report.json").read_text()) for name in tasks}


def answered(place: Path, name: str) -> list[str]:
    lines = (place / "ours" / name / "answers-tuned.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["answer"] for line in lines]


def test_lmms_eval_agrees(place: Path) -> None:
    call(place, "mmit", "harness", "overlay", "--tasks", ",".join(LMMS), "--data-root", "data", "--out", "overlay")
    names = ",".join(f"{name}_local" for name in LMMS)
    command = ["lmms-eval", "eval", "--model", "mmit", "--model_args", f"pretrained={RUN}", "--include_path", "overlay"]
    command += ["--tasks", names, "--batch_size", "32", "--gen_kwargs", f"max_new_tokens={TOKENS}"]
    call(place, *command, "--output_path", "theirs", "--log_samples")
    theirs = results(place / "theirs")
    reports = ours(place, {name: content for _, name, content in LMMS.values()})
    for task, (metric, name, _) in LMMS.items():
        (path,) = (place / "theirs").rglob(f"*_samples_{task}_local.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        if task != "ai2d":  # its filter has been at the answers
            assert [sample["filtered_resps"] for sample in samples] == answered(place, name), task
        values = theirs[f"{task}_local"]
        if task == "mme":
            expected = reports[name]["details"]
            assert values["mme_perception_score"] == pytest.approx(expected["perception"], abs=1e-9)
            assert values["mme_cognition_score"] == pytest.approx(expected["cognition"], abs=1e-9)
        else:
            scale = 100 if task.startswith("mmbench") else 1
            assert values[metric] == pytest.approx(scale * reports[name]["accuracy"], abs=1e-9), task
        if task == "pope":
            details = reports[name]["details"]
            for theirs_name, our_name in (("f1_score", "f1"), ("precision", "precision"), ("recall", "recall")):
                assert values[f"pope_{theirs_name}"] == pytest.approx(details[our_name], abs=1e-9)
    assert theirs["pope_local"]["pope_accuracy"] > 0.9 and theirs["vqav2_val_local"]["exact_match"] > 0.9


def test_likelihood_of_choices_agrees(place: Path) -> None:
    call(place, "mmit", "harness", "overlay", "--tasks", "seedbench_ppl", "--data-root", "data", "--out", "overlay")
    command = ["lmms-eval", "eval", "--model", "mmit", "--model_args", f"pretrained={RUN},loss=sum", "--force_simple"]
    command += ["--include_path", "overlay", "--tasks", "seedbench_ppl_local", "--batch_size", "32"]
    call(place, *command, "--output_path", "simple")
    records = []
    for number, (one, options, right) in enumerate(choices(4)):
        asked = Turn("user", (Image(str(one.picture)), Text(f"{one.question} Answer :")))
        meta = {"choices": options}
        records.append(Record((asked, Turn("assistant", (Text(options[right]),))), str(number), meta=meta))
    write_jsonl(records, place / "ppl.jsonl")
    own = {"records": str(place / "ppl.jsonl"), "metric": "exact:strict", "answer_by": "likelihood"}
    expected = ours(place, {"ppl": own})["ppl"]["accuracy"]
    assert results(place / "simple")["seedbench_ppl_local"]["acc"] == pytest.approx(expected, abs=1e-9)
    assert expected > 0.5  # the model knows shapes and colours


def test_lm_eval_agrees(place: Path) -> None:
    given = ["--for", "lm-eval", "--tasks", "hellaswag,mmlu", "--data-root", "data", "--out", "overlay-text"]
    call(place, "mmit", "harness", "overlay", *given)
    command = ["mmit", "harness", "lm-eval", "run", "--model", "mmit", "--model_args", f"pretrained={RUN}"]
    command += ["--include_path", "overlay-text", "--tasks", "hellaswag_local", "--apply_chat_template"]
    call(place, *command, "--batch_size", "16", "--output_path", "text")
    values = results(place / "text")["hellaswag_local"]
    reports = ours(place, {"hellaswag": {}, "hellaswag_acc": {}})
    assert values["acc_norm"] == pytest.approx(reports["hellaswag"]["accuracy"], abs=1e-9)
    assert values["acc"] == pytest.approx(reports["hellaswag_acc"]["accuracy"], abs=1e-9)


def test_texts_as_they_are_score_as_in_lm_evals_own_model(place: Path) -> None:
    """Without a chat template: likelihoods, rolling likelihoods and answers of lm-eval's `hf` on the same weights."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from mmit.eval.harness.lm import TextModel

    mine = TextModel(str(RUN), batch_size=4, dtype="fp32")
    theirs = HFLM(pretrained=mine.model.vlm.llm, tokenizer=mine.model.tokenizer, batch_size=4, device="cpu")

    def asked(kind: Any, *arguments: Any) -> list[Instance]:
        return [Instance(kind, {}, given, n) for n, given in enumerate(arguments)]

    texts = ["The capital of France is", "Two and two are", "The sky is blue because", "\n Leading and trailing "]
    pairs = [(text, end) for text in [*texts, ""] for end in (" Paris", " four.", " light scatters, they say")]
    requests = asked("loglikelihood", *pairs)
    for got, expected in zip(mine.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert got[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-3) and got[1] == expected[1]
    rolling = asked("loglikelihood_rolling", *[(text * 5,) for text in texts])
    expected_sums = theirs.loglikelihood_rolling(rolling)
    assert mine.loglikelihood_rolling(rolling) == pytest.approx(expected_sums, rel=1e-4)
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    generated = asked("generate_until", *[(text, settings) for text in texts[:3]])
    assert mine.generate_until(generated) == theirs.generate_until(generated)
