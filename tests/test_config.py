"""mmit.config: defaults, overrides, round trips, and one clear error for each way to be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.config import Config, describe, load_config
from mmit.errors import ConfigError
from mmit.sections import Section
from mmit.yamlio import dump_yaml, inline_yaml, parse_yaml

MINIMAL = """\
run:
  dir: out
model:
  llm: {name: some/llm}
data:
  train:
    - {path: rows.jsonl}
train:
  steps: 10
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def fails(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.model.vision is None and config.model.projector.kind == "mlp"
    assert (config.tune.vision.mode, config.tune.vision.lr) == ("frozen", None)
    assert (config.tune.projector.mode, config.tune.projector.lr) == ("full", 1e-3)
    assert (config.tune.llm.mode, config.tune.llm.lr) == ("lora", 2e-4)
    assert config.tune.llm.options == {"r": 16, "alpha": 32}
    assert config.train.betas == (0.9, 0.999) and config.train.epochs is None
    assert config.engine.kind == "auto" and config.device == "auto"


def test_overrides_of_every_shape(file: Path) -> None:
    config = load_config(
        file,
        [
            "train.steps=null",
            "train.epochs=1",
            "train.eps=1e-6",
            "train.betas=[0.9, 0.95]",
            "model.vision.kind=timm",
            "model.vision.name=tiny",
            "model.vision.image_size=[64, 32]",
            "model.vision.cache=off",
            "model.projector.options={depth: 2, gain: 1e-3}",
            "data.train.0.weight=2",
            "data.train.1.path=more=rows.jsonl",
            "data.eval=[{path: held.jsonl, format: llava}]",
        ],
    )
    assert config.train.epochs == 1.0 and config.train.steps is None
    assert config.train.eps == 1e-6 and config.train.betas == (0.9, 0.95)
    assert config.model.vision is not None and config.model.vision.image_size == (64, 32)
    assert config.model.vision.cache == "off", "YAML 1.1 would read off as false"
    assert config.model.projector.options == {"depth": 2, "gain": 1e-3}
    assert [(s.path, s.weight) for s in config.data.train] == [("rows.jsonl", 2.0), ("more=rows.jsonl", 1.0)]
    assert config.data.eval[0].format == "llava"


def test_the_last_override_wins(file: Path) -> None:
    assert load_config(file, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tune.llm.lr=1e-5", ("lora", 1e-5, {"r": 16, "alpha": 32})),
        ("tune.llm.options.r=4", ("lora", 2e-4, {"r": 4, "alpha": 32})),
        ("tune.llm.mode=bitfit", ("bitfit", 2e-4, {})),
        ("tune.llm.mode=frozen", ("frozen", None, {})),
        ("tune.llm={mode: frozen, lr: 1e-4}", ("frozen", 1e-4, {})),
    ],
)
def test_tune_keys_left_out_take_the_components_defaults(file: Path, override: str, expected: tuple) -> None:
    llm = load_config(file, [override]).tune.llm
    assert (llm.mode, llm.lr, llm.options) == expected


def test_a_mode_is_switched_in_one_line_and_says_which_options_went(tmp_path: Path) -> None:
    plan = "tune: {llm: {mode: lora, options: {r: 8, dora: true}}}"
    base = "run: {dir: x}\nmodel: {llm: {name: y}}\ndata: {train: [{path: z}]}\ntrain: {steps: 1}\n"
    (tmp_path / "base.yaml").write_text(base + plan)
    (tmp_path / "over.yaml").write_text("base: base.yaml\ntune: {llm: {mode: prefix, options: {tokens: 4}}}")
    switched = load_config(tmp_path / "base.yaml", ["tune.llm.options.size=3", "tune.llm.mode=houlsby"])
    assert (switched.tune.llm.mode, switched.tune.llm.options) == ("houlsby", {"size": 3})
    assert switched.notes == ["tune.llm.mode is houlsby in place of lora, so the options r, dora are left out"]
    over = load_config(tmp_path / "over.yaml")
    assert over.tune.llm.options == {"tokens": 4} and "r, dora" in over.notes[0]
    again = load_config(tmp_path / "over.yaml", ["tune.llm={mode: lora, options: {r: 2}}"])
    assert again.tune.llm.options == {"r": 2, "alpha": 32} and len(again.notes) == 1
    assert load_config(tmp_path / "base.yaml", ["tune.llm.mode=lora"]).tune.llm.options["dora"] is True


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.stepz=5"], ["override 'train.stepz=5'", "train.stepz", "value 5", "did you mean 'steps'?"]),
        (["trian.steps=5"], ["trian", "did you mean 'train'?", "engine"]),
        (["model.llm.nme=x"], ["model.llm.nme", "did you mean 'name'?", "revision"]),
        (["data.train.0.pth=x"], ["data.train.0.pth", "did you mean 'path'?", "image_root"]),
        (["model.vision={kind: hf, name: x, siz: 3}"], ["model.vision.siz", "value 3", "image_size"]),
        (["run.seed=abc"], ["run.seed", "whole number >= 0", "abc"]),
        (["run.seed=-1"], ["run.seed", "whole number >= 0", "-1"]),
        (["run.seed=1.5"], ["run.seed", "whole number", "1.5"]),
        (["run.seed='7'"], ["run.seed", "whole number", "'7'"]),
        (["run.seed=true"], ["run.seed", "whole number", "true"]),
        (["run.seed=010"], ["run.seed", "010"]),
        (["run.dir=2024"], ["run.dir", "expected text", "2024", "quotes"]),
        (["run.dir="], ["run.dir", "expected text", "null"]),
        (["run.on_bad_record=skp"], ["run.on_bad_record", "'skp'", "did you mean 'skip'?"]),
        (["run.max_bad_fraction=2"], ["run.max_bad_fraction", "number >= 0, <= 1", "2"]),
        (["train.clip=.nan"], ["train.clip", "number > 0 or null"]),
        (["train.betas=[0.9]"], ["train.betas", "[number >= 0, < 1, number >= 0, < 1]", "0.9"]),
        (["train.betas=[0.9, '1']"], ["train.betas", "'1'"]),
        (["train.packing=true"], ["train.packing", "unknown key"]),
        (["data.packing=yes"], ["data.packing", "true or false", "yes"]),
        (["data.train=[]"], ["data.train", "non-empty list"]),
        (["data.train.0=rows.jsonl"], ["data.train.0", "expected section", "rows.jsonl"]),
        (["model.projector=null"], ["model.projector", "got null; leave the key out for its defaults"]),
        (["data.train.2.path=x"], ["override 'data.train.2.path=x'", "'2'", "list of 1", "up to 1"]),
        (["train.betas.1=0.9"], ["list of 0", "set the whole list"]),
        (["train.steps.x=1"], ["'x'", "10", "no keys"]),
        (["model.projector.options={1: 2}"], ["model.projector.options", "text keys"]),
        (
            ["model.vision.image_size=big"],
            ["model.vision.image_size", "whole number > 0 or [", "or null", "big"],
        ),
        (["train.epochs=1"], ["train", "exactly one of epochs and steps", "epochs is 1", "steps is 10"]),
        (["train.steps=null"], ["exactly one of epochs and steps"]),
        (["tune.llm.lr=null"], ["tune.llm", "mode 'lora'", "learning rate"]),
        (["tune.vision.mode=full"], ["tune.vision", "learning rate"]),
        (["tune.vision.lr=1e-5"], ["tune.vision", "frozen", "mode"]),
        (["tune.vison.lr=1"], ["tune.vison", "did you mean 'vision'?"]),
        (["device=gpu"], ["device", "'gpu'", "auto, cpu, cuda"]),
        (["steps"], ["override 'steps'", "key=value", "train.steps=50"]),
        (["train..steps=1"], ["key=value"]),
        (["run.dir=[a"], ["override 'run.dir=[a'", "not valid YAML"]),
        (["run.dir=!!python/name:os.system"], ["not valid YAML", "python/name"]),
        (["base=other.yaml"], ["base", "unknown key"]),
    ],
)
def test_errors_name_place_key_value_and_remedy(file: Path, overrides: list[str], parts: list[str]) -> None:
    message = fails(file, *overrides)
    for part in parts:
        assert part in message, message


def test_errors_name_the_line_of_the_file(file: Path) -> None:
    file.write_text(MINIMAL.replace("steps: 10", "steps: ten"), encoding="utf-8")
    assert fails(file) == f"{file}:9: train.steps: expected whole number > 0 or null, got ten"


def test_every_problem_is_listed_at_once(file: Path) -> None:
    message = fails(file, "run.sed=1", "train.steps=x", "model.llm=null")
    assert message.startswith(f"{file}: 3 problems\n")
    for part in (
        "run.sed: unknown key",
        "train.steps: expected",
        f"{'model.llm'}: expected section, got null",
    ):
        assert part in message


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {llm: {}}\ntrain: {steps: 1}\n", encoding="utf-8")
    message = fails(path)
    for part in ("run: required", f"{path}:1: model.llm.name: required (text) but missing", "data: required"):
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["expected the sections run, model", "null"]),
        ("- a\n", ["expected the sections"]),
        ("run: {dir: a}\nrun: {dir: b}\n", [":2", "key 'run'", "line 1"]),
        ("run: &r {dir: a}\ndata: *r\n", [":2", "alias *r"]),
        ("run: {dir: a\n", ["not valid YAML"]),
        ("run:\n\tdir: a\n", [":2", "not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
        ("? [1, 2]\n: x\n", ["not valid YAML"]),
        ("1: x\n", ["unknown key", "train"]),
        ("[" * 5000, ["not valid YAML"]),
        ("a: \x00\n", ["not valid YAML"]),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    message = fails(path)
    for part in [str(path), *parts]:
        assert part in message, message


def test_files_that_cannot_be_read(file: Path) -> None:
    assert "did you mean 'c.yaml'?" in fails(file.with_name("cc.yaml"))
    assert "holds no .yaml file" in fails(file.parent / "nowhere" / "c.yaml")
    assert "cannot be read" in fails(file.parent)
    file.write_bytes(b"run: \xff\n")
    assert "cannot be read" in fails(file)


def test_base_is_merged_below_and_found_beside_the_file(file: Path) -> None:
    child = file.parent / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("base: ../c.yaml\nrun: {seed: 3}\ndata: {train: [{path: b}]}\n", encoding="utf-8")
    config = load_config(child)
    assert (config.run.dir, config.run.seed, config.train.steps) == ("out", 3, 10)
    assert [source.path for source in config.data.train] == ["b"], "lists are replaced, not joined"
    grandchild = child.with_name("grandchild.yaml")
    grandchild.write_text("base: child.yaml\n", encoding="utf-8")
    assert f"{child}:1: base: a base file cannot have a base" in fails(grandchild)
    grandchild.write_text("base: [a]\n", encoding="utf-8")
    assert "expected the path" in fails(grandchild)


def test_errors_in_a_base_file_name_that_file(file: Path) -> None:
    child = file.with_name("child.yaml")
    child.write_text("base: c.yaml\nrun: {seed: 3}\n", encoding="utf-8")
    file.write_text(MINIMAL.replace("steps: 10", "steps: ten"), encoding="utf-8")
    assert fails(child).startswith(f"{file}:9: train.steps")


FULL = [
    "model.vision={kind: timm, name: tiny, weights: true, image_size: 32, layer: -2}",
    "model.llm.random_init={hidden_size: 8, rope: {theta: 1e4}}",
    "train.betas=[0.8, 0.9]",
    "run.dir='1e-3'",
    "data.train.0.name='off'",
]


def test_yaml_and_flat_lead_back_to_the_same_config(file: Path, tmp_path: Path) -> None:
    config = load_config(file, FULL)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(resolved) == config
    flat = config.flat()
    assert flat["train.betas.0"] == 0.8 and flat["data.train.0.path"] == "rows.jsonl"
    overrides = [f"{key}={inline_yaml(value)}" for key, value in flat.items()]
    resolved.write_text("{}", encoding="utf-8")
    assert load_config(resolved, overrides) == config
    assert Config.from_dict(config.model_dump()) == config


def test_config_cannot_be_changed_in_place(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]
    config.tune.llm.options["r"] = 99
    assert load_config(file).tune.llm.options["r"] == 16, "defaults are not shared between configs"


def test_from_dict_reports_python_objects(file: Path) -> None:
    with pytest.raises(ConfigError, match="run.dir: expected text"):
        Config.from_dict({**load_config(file).model_dump(), "run": {"dir": Path("x")}})


def test_every_key_is_described(file: Path) -> None:
    entries = describe()
    keys = [entry.key for entry in entries]
    assert len(set(keys)) == len(keys)
    assert all(entry.help and entry.type and entry.default for entry in entries)
    assert not any("\n" in text for entry in entries for text in entry)
    by_key = {entry.key: entry for entry in entries}
    assert by_key["run.dir"].default == "required"
    assert by_key["tune.llm.options"].default == "{r: 16, alpha: 32}"
    assert by_key["train.warmup"][1:3] == ("number >= 0", "0.03")
    assert by_key["model.vision"].default == "null"
    assert by_key["data.train.0.path"].type == "text"
    # Every leaf of a real config is one of the described keys (or lies below a described mapping or list).
    described = tuple(keys)
    for key in load_config(file, FULL).flat():
        assert any(key == known or key.startswith(f"{known}.") for known in described), key


def test_every_section_says_what_it_is() -> None:
    def below(cls: type[Section]) -> set[type[Section]]:
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__()))

    assert all(section.__doc__ for section in below(Section))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TRICKY = st.sampled_from(["off", "yes", "no", "null", "~", "", "1e-3", "010", "1_000", "0x1f", "1:30", "=", "<<"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | TRICKY
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS | TRICKY, v, max_size=3))


@given(VALUES)
def test_yaml_reads_back_what_it_wrote(value: object) -> None:
    for text in (dump_yaml(value), inline_yaml(value)):
        assert parse_yaml(text, where="")[0] == value
    assert "\n" not in inline_yaml(value)


@pytest.mark.parametrize("text", ["a:\n  b: {}", "a: [1,\n  -{}]"])
def test_a_number_that_python_does_not_read_names_its_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^c\.yaml:2: not valid YAML: a whole number of (9,999|10,000) digits"):
        parse_yaml(text.format("9" * 9999), where="c.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("off", "off"), ("yes", "yes"), ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("-.inf", float("-inf"))]
    + [("010", "010"), ("1_000", "1_000"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("-7", -7)]
    + [
        ("true", True),
        ("~", None),
        ("", None),
        ("+1", 1),
        ("1.5e3", 1500.0),
        ("0x10", "0x10"),
        ("a=b", "a=b"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, where="")[0]
    assert found == value and type(found) is type(value)
