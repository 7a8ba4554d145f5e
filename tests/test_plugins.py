"""Parts of a user's own: `module:Name` from a file beside the config, checked at its place, never imported unasked."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from mmit import plugins
from mmit.errors import CheckpointError, ConfigError, MmitError, ModelError
from mmit.models.projectors import Projector, build_projector
from mmit.train.run import run
from tests.tiny_run import two_layers as tiny_config

PROJECTOR = """
import torch
from torch import nn
from mmit.models.projectors import Projector


class Doubled(Projector):
    # Two tokens for each patch.
    def __init__(self, *, vision_dim, llm_dim, grid, prefix=0, bias=True, norm=False):
        tokens = 2 * (prefix + grid[0] * grid[1])
        super().__init__(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, prefix=prefix, tokens=tokens, norm=norm)
        self.layer = nn.Linear(vision_dim, 2 * llm_dim, bias=bias)

    def project(self, features):
        return self.layer(features).unflatten(-1, (2, -1)).flatten(1, 2)


class Short(Doubled):
    def project(self, features):
        return super().project(features)[:, 1:]


class Raises(Doubled):
    def project(self, features):
        return features @ torch.zeros(3, 3)


class NoProject(Projector):
    def __init__(self, *, vision_dim, llm_dim, grid):
        super().__init__(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, prefix=0, tokens=4, norm=False)


class NoGrid(Doubled):
    def __init__(self, *, vision_dim, llm_dim):
        pass


class Fixed(Doubled):
    def __init__(self, **given):
        super().__init__(**given)
        self.layer = nn.Identity()


class Bare(nn.Module):
    pass


number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory for a user's modules: write(name, text); what was imported from it is forgotten."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> None:
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


SHAPE = {"vision_dim": 4, "llm_dim": 6, "grid": (2, 2)}


def test_what_is_a_spec():
    assert plugins.is_spec("a.b_c:Name") and plugins.is_spec("a:b")
    for other in ("mlp", "a:", ":b", "a/b:c", "package:some/file.bin", "a.:b", "1a:b", "{{ x:y }}", None, ["a:b"]):
        assert not plugins.is_spec(other)


def test_a_projector_of_ones_own_takes_options_and_draws_from_the_seed(own):
    import torch

    own("bridges_a", PROJECTOR)
    made = [build_projector("bridges_a:Doubled", **SHAPE, bias=False, generator=torch.Generator()) for _ in range(2)]
    assert isinstance(made[0], Projector) and made[0].tokens == 8 and made[0].layer.bias is None
    assert torch.equal(made[0].layer.weight, made[1].layer.weight) and made[0].training
    with pytest.raises(ModelError, match="unknown option 'biass'"):
        build_projector("bridges_a:Doubled", **SHAPE, biass=False)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nowhere_at_all:X", "there is no module 'nowhere_at_all'"),
        ("bridges_b.inner:X", "there is no module 'bridges_b.inner'"),
        ("bridges_b:Dubled", "has no 'Dubled'"),
        ("bridges_b:Bare", "is the class Bare"),
        ("bridges_b:number", "is a int"),
        ("bridges_b:NoProject", "defines no project"),
        ("bridges_b:NoGrid", "takes no argument grid"),
        ("bridges_b:Short", r"gives \(1, 7, 6\) for one picture, and states 8 tokens"),
        ("bridges_b:Raises", "raised RuntimeError"),
        ("bridges_b:Fixed", "has no parameters"),
        ("broken_b:X", r"importing 'broken_b' raised ZeroDivisionError: .*broken_b.py, line 2"),
        ("needs_b:X", "importing 'needs_b' raised ModuleNotFoundError"),
    ],
)
def test_each_wrong_projector_is_told_by_what_is_wrong(own, spec, told):
    own("bridges_b", PROJECTOR)
    own("broken_b", "\n1 / 0\n")
    own("needs_b", "import a_package_that_is_not_here\n")
    with pytest.raises(MmitError, match=told) as caught:
        build_projector(spec, **SHAPE)
    assert caught.value.remedy


def test_a_name_that_is_missing_is_told_with_the_nearest(own):
    own("bridges_c", PROJECTOR)
    with pytest.raises(ConfigError, match="Doubled"):
        build_projector("bridges_c:Doubeld", **SHAPE)


def test_a_file_here_hides_no_installed_module(own):
    own("colorsys", "Name = 1")
    with pytest.raises(ConfigError, match="has no 'Name'"):
        plugins.own_object("colorsys:Name", where="x", expects="y")


def test_the_hash_of_own_code_follows_its_package(own, tmp_path):
    own("kit_h/__init__", "")
    own("kit_h/part", "Name = 1")
    own("kit_h/helper", "a = 1")
    first = plugins.source_hash("kit_h.part:Name", where="x")
    assert first == plugins.source_hash("kit_h.part:Name", where="x")
    own("kit_h/helper", "a = 2")
    assert plugins.source_hash("kit_h.part:Name", where="x") != first


def config_with(tmp_path: Path, spec: str):
    return tiny_config(tmp_path, model={**tiny_config(tmp_path).model.model_dump(), "projector": {"kind": spec}})


def test_a_run_with_a_projector_of_ones_own_resumes_and_loads_only_when_allowed(own, tmp_path):
    import mmit

    own("bridges_d", PROJECTOR)
    config = config_with(tmp_path, "bridges_d:Doubled")
    run(config)
    folder = Path(config.run.dir)
    checkpoint = max((folder / "checkpoints").iterdir())
    assert yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]["projector"]["kind"] == "bridges_d:Doubled"
    del sys.modules["bridges_d"]
    with pytest.raises(CheckpointError, match=r"bridges_d:Doubled \(model.projector.kind\)") as caught:
        mmit.load(folder)
    assert "allow_code=True" in caught.value.remedy and "bridges_d" not in sys.modules
    model = mmit.load(folder, allow_code=True)
    assert model.vlm.projector.tokens == 8 and isinstance(model.chat(str(tmp_path / "data/0.png"), "What?"), str)
    more = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    run(more)  # one's own run, whose config names the code
    own("bridges_d", PROJECTOR.replace("bias=bias", "bias=bias or True"))
    with pytest.raises(CheckpointError, match="the code behind model.projector.kind has changed"):
        run(more)


def test_a_dry_run_and_the_commands_on_data_build_it_without_weights(own, tmp_path):
    from mmit.cli.sources import model_preparation
    from mmit.forecast.forecast import forecast

    own("bridges_f", PROJECTOR)
    own("methods_f", METHODS)
    config = config_with(tmp_path, "bridges_f:Doubled")
    assert model_preparation(config.model).tokens == 8
    tune = {"llm": {"mode": "methods_f:scales", "lr": 1e-2, "options": {"where": "down_proj"}}}
    raw = {**config.model_dump(), "tune": {**config.tune.model_dump(), **tune}}
    found = forecast(type(config).from_dict(raw))
    trained = {row["component"]: row["trained"] for row in found.parameters}
    assert trained == {"vision": 0, "projector": 8 * 32 + 32, "llm": 2 * 16}


@pytest.mark.slow
def test_train_chat_eval_and_export_in_processes_of_their_own(own, tmp_path):
    own("bridges_e", PROJECTOR)
    config = config_with(tmp_path, "bridges_e:Doubled")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    script = tmp_path / "bin" / "start.py"  # as the console script: the working directory is not on the path
    script.parent.mkdir()
    script.write_text("from mmit.cli import main\n\nmain()\n")

    def mmit(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = mmit("train", "--config", "run.yaml", "data.workers=1")
    assert done.returncode == 0, done.stderr
    ask = ("chat", config.run.dir, "--image", "data/0.png", "--prompt", "What?", "--max-new-tokens", "4")
    refused = mmit(*ask)
    assert refused.returncode != 0 and "bridges_e:Doubled" in refused.stderr and "--allow-code" in refused.stderr
    assert mmit(*ask, "--allow-code").returncode == 0
    write = ("export", config.run.dir, "--format", "mmit", "--out", "whole")
    assert mmit(*write).returncode != 0 and not (tmp_path / "whole").exists()
    allowed = mmit(*write, "--allow-code")
    assert allowed.returncode == 0, allowed.stderr
    foreign = mmit("export", config.run.dir, "--format", "llava-hf", "--out", "hf", "--allow-code")
    assert foreign.returncode != 0 and "projector" in foreign.stderr


FORMATS = """
from mmit import Record, Text, Turn
from mmit.data.formats import Format


def pairs(row, *, image_root="", ask="q", tell="a"):
    \"\"\"Rows of a question and an answer.\"\"\"
    return Record((Turn("user", (Text(row[ask]),)), Turn("assistant", (Text(row[tell]),))))


def entry_row(row, *, image_root=""):
    return Record.triple("say", row["a"])


entry = Format("a row of one answer", entry_row)


def as_dict(row, *, image_root=""):
    return {"turns": []}


def no_root(row):
    return None
"""


def test_a_data_format_of_ones_own(own, tmp_path):
    from mmit.data.formats import find_format, format_options, import_file
    from mmit.data.formats.common import SHARED_OPTIONS
    from mmit.errors import RecordError

    own("rows_a", FORMATS)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "one?", "a": "1", "why": "so"}\n{"q": "two?"}\n')
    bad: list[RecordError] = []
    records = list(import_file(file, "rows_a:pairs", on_bad=bad.append))
    assert [r.turns[1].parts[0].text for r in records] == ["1"]
    assert len(bad) == 1 and "rows.jsonl:2" in bad[0].where and "KeyError: 'a'" in bad[0].problem
    assert find_format("rows_a:pairs").about == "Rows of a question and an answer."
    assert set(format_options("rows_a:pairs")) - set(SHARED_OPTIONS) == {"ask", "tell"}
    assert next(import_file(file, "rows_a:pairs", tell="q")).turns[1].parts[0].text == "one?"
    assert next(import_file(file, "rows_a:entry")).turns[1].parts[0].text == "1"
    for name, told in (("pairs", "no option 'teil'"), ("no_root", "takes no argument image_root"), ("gone", "has no")):
        with pytest.raises(ConfigError, match=told):
            list(import_file(file, f"rows_a:{name}", **({"teil": "q"} if name == "pairs" else {})))
    with pytest.raises(ConfigError, match="returned a dict"):
        list(import_file(file, "rows_a:as_dict", on_bad=bad.append))
    with pytest.raises(ConfigError, match="unknown data format 'llavva'.*\n.*llava.*of your own"):
        find_format("llavva")


def test_what_is_kept_of_a_source_follows_the_code_of_its_format(own, tmp_path):
    from mmit.data.sources import SourceSpec, open_source

    own("rows_b", FORMATS)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "one?", "a": "1"}\n')
    first = open_source(SourceSpec(file, format="rows_b:pairs"), cache=tmp_path / "cache")
    again = open_source(SourceSpec(file, format="rows_b:pairs"), cache=tmp_path / "cache")
    assert first.fingerprint == again.fingerprint
    own("rows_b", FORMATS.replace("row[ask]", '"Say: " + row[ask]'))
    del sys.modules["rows_b"]
    changed = open_source(SourceSpec(file, format="rows_b:pairs"), cache=tmp_path / "cache")
    assert changed.fingerprint != first.fingerprint and changed[0].turns[0].parts[0].text == "Say: one?"


METRICS = """
def first_letter(predictions, references):
    return [float(p[:1] == r[:1]) for p, r in zip(predictions, references)]


def short(predictions, references):
    return [1.0]


def nan(predictions, references):
    return [float("nan") for _ in predictions]


def alone(predictions):
    return []
"""


def test_a_metric_of_ones_own(own, tmp_path):
    from mmit.eval.metrics import get_metric
    from mmit.eval.tasks import load_task

    own("scores_a", METRICS)
    score = get_metric("scores_a:first_letter")(["yes", "no"], ["yellow", "on"], groups=["a", "b"], seed=0)
    assert (
        score.value == 0.5 and score.n == 2 and score.by_group["a"].value == 1 and score.name == "scores_a:first_letter"
    )
    for name, told in (("short", "gives 1 numbers for 2"), ("nan", "not finite")):
        with pytest.raises(MmitError, match=told):
            get_metric(f"scores_a:{name}")(["a", "b"], ["a", "b"])
    with pytest.raises(ConfigError, match="takes too few arguments"):
        get_metric("scores_a:alone")
    with pytest.raises(MmitError, match="unknown metric 'vqa:oficial'.*\n.*vqa:official"):
        get_metric("vqa:oficial")
    task = tmp_path / "task.yaml"
    task.write_text("{name: mine, records: rows.jsonl, metric: 'scores_a:first_leter'}")
    with pytest.raises(ConfigError, match="first_letter"):
        load_task(task)
    task.write_text("{name: mine, records: rows.jsonl, metric: 'scores_a:first_letter'}")
    assert load_task(task).metric == "scores_a:first_letter"


CHATS = """
from mmit.data.chat_builtin import Piece


def _said(turn):
    for part in turn.parts:
        yield Piece("image") if part is None else Piece("content", part.text, turn.number, "text", part.spans)


def bracket(turns, end, generate):
    out = []
    for turn in turns:
        out += [Piece("template", f"[{turn.role}] "), *_said(turn)]
        out.append(Piece("template", end, turn.number, "end") if turn.role == "assistant" else Piece("template", "\\n"))
    return out + [Piece("template", "[assistant] ")] * generate


def other_prompt(turns, end, generate):
    return bracket(turns, end, False) + [Piece("template", "<answer>")] * generate


def no_end(turns, end, generate):
    return [piece for piece in bracket(turns, end, generate) if piece.part != "end"]


def no_picture(turns, end, generate):
    return [piece for piece in bracket(turns, end, generate) if piece.kind != "image"]


def texts(turns, end, generate):
    return ["a"]


def two(turns, end):
    return []
"""


def test_a_chat_format_of_ones_own(own):
    from mmit.data.chat import ChatFormat, chat_format, encode
    from mmit.records import Record
    from tests.data.small_tokenizers import byte_level

    own("talks_a", CHATS)
    tokenizer = byte_level()
    chat = chat_format("talks_a:bracket", tokenizer)
    record = Record.triple("Say one.", "one")
    encoded = encode(record, chat, tokenizer)
    assert tokenizer.decode(encoded.ids) == f"[user] Say one.\n[assistant] one{tokenizer.eos_token}"
    supervised = [i for i, on in zip(encoded.ids, encoded.supervised, strict=True) if on]
    assert tokenizer.decode(supervised).strip() == f"one{tokenizer.eos_token}"
    again = ChatFormat.from_json(chat.to_json(), tokenizer)
    assert encode(record, again, tokenizer) == encoded and again.to_json() == {"name": "talks_a:bracket"}
    wrong = {"other_prompt": "do not begin with", "no_end": "end every answer", "no_picture": "every part"}
    for name, told in {**wrong, "texts": "no list of pieces", "two": "too few arguments"}.items():
        with pytest.raises(ConfigError, match=told):
            chat_format(f"talks_a:{name}", tokenizer)


METHODS = """
from torch import nn


def last_layers(vlm, *, count=1):
    for layer in vlm.llm.model.layers[-count:]:
        layer.requires_grad_(True)


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(inner.weight.new_ones(inner.out_features))

    def forward(self, x):
        return self.inner(x) * self.scale


def scales(vlm, *, where):
    for layer in vlm.llm.model.layers:
        setattr(layer.mlp, where, Scaled(getattr(layer.mlp, where)))


def nothing(vlm):
    pass


class Neighbours(Scaled):
    def forward(self, x):
        return super().forward(x) + x.roll(1, dims=1)[..., :1] * self.scale


def mixes(vlm):
    for layer in vlm.llm.model.layers:
        layer.mlp.down_proj = Neighbours(layer.mlp.down_proj)


def replaces(vlm):
    vlm.llm.lm_head.weight = nn.Parameter(vlm.llm.lm_head.weight.clone())
"""


def test_a_tuning_method_of_ones_own_is_trained_saved_loaded_and_exported_whole(own, tmp_path):
    import torch

    import mmit
    from mmit.cli.export import export

    own("methods_a", METHODS)
    tune = {"llm": {"mode": "methods_a:scales", "lr": 1e-2, "options": {"where": "down_proj"}}}
    config = tiny_config(tmp_path, tune=tune)
    run(config)
    checkpoint = max((Path(config.run.dir) / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"methods_a:scales \(tune.llm.mode\)"):
        mmit.load(checkpoint)
    model = mmit.load(checkpoint, allow_code=True)
    scales = [w for n, w in model.vlm.llm.named_parameters() if n.endswith("scale")]
    assert len(scales) == 2 and not any(torch.equal(w, torch.ones_like(w)) for w in scales)
    export(checkpoint, out=tmp_path / "whole", format="mmit", allow_code=True)  # compares logits
    with pytest.raises(ModelError, match="cannot be merged: its method is not mmit's, and '.*' has no place"):
        export(checkpoint, out=tmp_path / "hf", format="llava-hf", allow_code=True)
    with pytest.raises(CheckpointError, match="methods_a:scales"):
        export(checkpoint, out=tmp_path / "again", format="mmit")


@pytest.mark.parametrize(
    ("mode", "options", "told"),
    [
        ("nothing", {}, "trains nothing of the LLM"),
        ("replaces", {}, "removes or replaces weights"),
        ("last_layers", {"cuont": 2}, "no option 'cuont'"),
        ("scales", {}, "needs the option 'where'"),
        ("scales", {"where": "nowhere"}, "raised AttributeError"),
        ("number", {}, "has no 'number'"),
    ],
)
def test_a_wrong_tuning_method_is_told(own, tmp_path, mode, options, told):
    from mmit.models.assemble import assemble
    from mmit.models.tuning import apply_tuning

    own("methods_b", METHODS)
    config = tiny_config(tmp_path)
    import torch

    vlm, _ = assemble(config.model.model_dump(), dtype=torch.float32)
    plan = {**config.tune.model_dump(), "llm": {"mode": f"methods_b:{mode}", "lr": 1e-2, "options": options}}
    with pytest.raises(MmitError, match=told):
        apply_tuning(vlm, plan)


def test_a_method_through_which_packed_records_meet_is_refused(own, tmp_path):
    """The base keeps records apart, which is seen before; mmit's own methods are not asked again."""
    own("methods_g", METHODS)
    with pytest.raises(ModelError, match="see each other"):
        run(tiny_config(tmp_path, tune={"llm": {"mode": "methods_g:mixes", "lr": 1e-2}}))


def test_export_of_added_tensors_is_refused_at_the_start(own, tmp_path):
    own("methods_c", METHODS)
    tune = {"llm": {"mode": "methods_c:scales", "lr": 1e-2, "options": {"where": "up_proj"}}}
    config = tiny_config(tmp_path, tune=tune)
    config = config.model_copy(update={"export": ["llava-hf"]})
    with pytest.raises(ConfigError, match="for which llava-hf has no place"):
        run(config)


TOWERS = """
from torch import nn
from mmit.models.vision_encoder import Encoder, Reader


class Patches(Reader):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)

    def forward(self, pixels):
        return self.conv(pixels).flatten(2).transpose(1, 2)


def build(name, *, weights, layer, select, image_size, normalize, dim=6):
    half = (0.5, 0.5, 0.5)
    return Encoder(reader=Patches(), name=name, weights_id="random", identity="patches", layer=1, normalize=False,
                   image_size=(16, 16), grid=(2, 2), prefix=0, dim=dim, mean=half, std=half, interpolation="bicubic")


def wrong(name, **given):
    return build(name, dim=7, **given)


def bare(name, **given):
    return Patches()


def few(name, *, weights):
    return None
"""


def test_a_vision_encoder_of_ones_own(own, tmp_path):
    import mmit
    from mmit.models.vision import build_vision

    own("eyes_a", TOWERS)
    for name, told in {
        "wrong": r"and states \(1, 4, 7\)",
        "bare": "returned a Patches",
        "few": "no argument layer",
    }.items():
        with pytest.raises(MmitError, match=told):
            build_vision(f"eyes_a:{name}", "x")
    model = tiny_config(tmp_path).model.model_dump()
    vision = {"kind": "eyes_a:build", "name": "patches", "fit": "resize", "cache": "memory"}
    config = tiny_config(tmp_path, model={**model, "vision": vision}, tune={"vision": {"mode": "full", "lr": 1e-3}})
    config = tiny_config(tmp_path, model={**model, "vision": {**vision, "cache": "off"}}, tune=config.tune.model_dump())
    run(config)
    with pytest.raises(CheckpointError, match=r"eyes_a:build \(model.vision.kind\)"):
        mmit.load(config.run.dir)
    assert mmit.load(config.run.dir, allow_code=True).vlm.vision.dim == 6
    fused = [{"kind": "eyes_a:build", "name": "a"}, {"kind": "eyes_a:build", "name": "b"}]
    tower = build_vision("fused", "", towers=fused)
    assert tower.dim == 12 and len(tower.own_code) == 2


def test_a_checkpoint_names_its_chat_format_too(own, tmp_path):
    import mmit

    own("talks_d", CHATS)
    model = tiny_config(tmp_path).model.model_dump()
    config = tiny_config(tmp_path, model={**model, "vision": None, "chat": {"format": "talks_d:bracket"}})
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": config.data.train})})
    from mmit.records import Record, write_jsonl

    write_jsonl([Record.triple(f"Say {i}.", f"It is {i}.") for i in range(8)], tmp_path / "text.jsonl")
    raw = config.model_dump()
    raw["data"]["train"] = [{"path": str(tmp_path / "text.jsonl")}]
    raw["tune"]["projector"] = {"mode": "frozen"}
    run(type(config).from_dict(raw))
    with pytest.raises(CheckpointError, match=r"talks_d:bracket \(model.chat.format\)"):
        mmit.load(config.run.dir)
    assert mmit.load(config.run.dir, allow_code=True).chat_format.own


def test_a_config_beside_other_names_does_not_hide_that_of_the_chat_format(own, tmp_path):
    """mmit.json alone says which chat format is read: a folder whose config is plain may still name code there."""
    from mmit.train.checkpoint.model import own_code

    config = tiny_config(tmp_path)
    assert own_code(config, {"chat": {"name": "evil:name"}})["model.chat.format"] == "evil:name"
    assert own_code(config, {"chat": {"name": "evil:name", "template": "{{ x }}"}})["model.chat.format"] is None


def test_mmit_eval_scores_a_task_of_an_own_format_and_an_own_metric(own, tmp_path):
    import json

    from typer.testing import CliRunner

    from mmit.cli import app

    own("bridges_g", PROJECTOR)
    own("rows_g", FORMATS)
    own("scores_g", METRICS)
    config = config_with(tmp_path, "bridges_g:Doubled")
    run(config)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"q": "what {i}?", "a": "{i}"}}\n' for i in range(4)))
    task = {"name": "mine", "records": "rows.jsonl", "format": "rows_g:pairs", "metric": "scores_g:first_letter"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**task, "max_new_tokens": 3}))
    words = ["eval", config.run.dir, "--task", "task.yaml", "--no-baselines", "--out", "scores"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "bridges_g:Doubled" in refused.stderr
    done = CliRunner().invoke(app, [*words, "--allow-code"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "scores" / "report.json").read_text())
    assert (
        report["metric"] == "scores_g:first_letter"
        and "scores_g:first_letter" in (tmp_path / "scores/report.md").read_text()
    )
