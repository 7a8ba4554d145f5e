"""Static gate: no call that can run foreign code or fill a disk, and no machine path in the repository.

Reads syntax trees, so that a comment may speak of pickle and `model.eval()` is not `eval()`.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.trees import dotted, nodes_of

ROOT = Path(__file__).parents[1]
# (file, rule): the reason why it is safe there.
ALLOWED: dict[tuple[str, str], str] = {
    ("mmit/plugins.py", "import by name"): "a user's own parts; checkpoints are asked about by refuse_own_code first",
    ("mmit/__init__.py", "import by name"): "a table of mmit's own modules",
    ("mmit/templates/sandbox.py", "a template without bounds"): "a budget of steps, characters and seconds",
    ("mmit/data/template_child.py", "a template without bounds"): "a process with bounds of time and memory",
    ("mmit/interop/export.py", "a template without bounds"): "one that chat_render has rendered on the same messages",
    ("mmit/analysis/report.py", "a template without bounds"): "mmit's own page",
    ("mmit/pages/__init__.py", "a template without bounds"): "mmit's own pages",
    ("mmit/cli/launch.py", "a process of its own"): "a rank; the kernel ends it with its parent",
    ("mmit/analysis/forks.py", "a process of its own"): "a command of a study; the kernel ends it with its parent",
    ("mmit/processes.py", "a process of its own"): "what all workers are started by: they end with their parent",
    (
        "mmit/data/template_process.py",
        "a process of its own",
    ): "ends when its stdin does, which goes with its parent",
}

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
# Methods of transformers that run the code of a model's folder after a `y` on stdin, unless told not to.
LOADERS = {"from_pretrained", "from_config"}
# They load no code, and hand unknown arguments on.
HARMLESS = {"peft.PeftModel.from_pretrained", "transformers.GenerationConfig.from_pretrained"}
OF_THE_PACKAGE = ("a process of its own", "a template without bounds")  # a script that measures may
# What makes processes, which then may outlive the one that made them.
STARTERS = {"os.fork", "os.forkpty", "subprocess.Popen", "concurrent.futures.ProcessPoolExecutor"}
# What renders Jinja: text of a model's folder or of a bank can loop for ever, or fill the memory.
RENDERERS = {"Environment", "SandboxedEnvironment", "ImmutableSandboxedEnvironment", "NativeEnvironment"}
YAML = {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"}


def rules_broken(source: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line, rule) for every forbidden call or import in Python source, given as text or by its file."""
    nodes = nodes_of(source)
    names = _imported_names(nodes)
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and _unpickles(node, nodes):
            yield node.lineno, "pickle"
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and _starts(node):
            yield node.lineno, "a process of its own"
        elif isinstance(node, (ast.Name, ast.Attribute)) and _renders(node, names):
            yield node.lineno, "a template without bounds"
        elif isinstance(node, ast.Attribute) and node.attr in LOADERS and not _refuses_code(node, nodes, names):
            yield node.lineno, "no trust_remote_code=False"
        elif isinstance(node, ast.Constant) and node.value in LOADERS:  # getattr(x, "from_pretrained")
            yield node.lineno, "no trust_remote_code=False"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, rule) for rule in _call_rules(node, names))


def _unpickles(node: ast.Import | ast.ImportFrom, nodes: list[ast.AST]) -> bool:
    """Say whether an import brings in more of an unpickler than its exception types."""
    if isinstance(node, ast.ImportFrom):
        foreign = (node.module or "").split(".")[0] in UNPICKLERS
        return foreign and not all(alias.name.endswith("Error") for alias in node.names)
    bound = {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in UNPICKLERS}
    if not bound:
        return False
    uses = [n for n in nodes if isinstance(n, ast.Name) and n.id in bound]
    errors = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr.endswith("Error")]
    return not uses or any(use not in errors for use in uses)


def _starts(node: ast.Import | ast.ImportFrom) -> bool:
    """Say whether an import brings in a module of processes, or a pool of them."""
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    pool = any(alias.name == "ProcessPoolExecutor" for alias in node.names)
    return pool or any({"multiprocessing", "joblib"} & set(module.split(".")) for module in modules)


def _renders(node: ast.Name | ast.Attribute, names: dict[str, str]) -> bool:
    """Say whether Jinja is reached, or a method of transformers that renders a folder's template."""
    if isinstance(node, ast.Attribute) and node.attr in ("apply_chat_template", "render_jinja_template"):
        return True
    full = names.get(node.id, node.id) if isinstance(node, ast.Name) else dotted(node)
    return full.startswith("jinja2.") and full.rpartition(".")[2] in {*RENDERERS, "Template"}


def _refuses_code(loader: ast.Attribute, nodes: list[ast.AST], names: dict[str, str]) -> bool:
    """Say whether a loader is called here and now with trust_remote_code=False; handed on, nobody knows."""
    first, _, rest = dotted(loader).partition(".")
    if f"{names.get(first, first)}.{rest}" in HARMLESS:
        return True
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.func is loader]
    return any(
        k.arg == "trust_remote_code" and isinstance(k.value, ast.Constant) and k.value.value is False
        for call in calls
        for k in call.keywords
    )


def _names_a_package(call: ast.Call) -> bool:
    """Say whether the module that is imported is written there, its package at least."""
    first = call.args[0] if call.args else None
    if isinstance(first, ast.JoinedStr):
        first = first.values[0]
    return isinstance(first, ast.Constant) and (isinstance(call.args[0], ast.Constant) or "." in str(first.value))


def _imported_names(nodes: list[ast.AST]) -> dict[str, str]:
    """Return {name in this file: full name}, for `from torch import load` and `import yaml as y`."""
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update({a.asname: a.name for a in node.names if a.asname})
        elif isinstance(node, ast.ImportFrom):
            names.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return names


def _call_rules(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    first, _, rest = dotted(call.func).partition(".")
    called = names.get(first, first) + (f".{rest}" if rest else "")
    constants = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    given = [a.value for a in call.args if isinstance(a, ast.Constant)]
    if called == "torch.load" and constants.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if called in {"eval", "exec", "builtins.eval", "builtins.exec"}:
        yield "eval"
    if called in YAML:
        yield "yaml.load"
    if called in SHELLS or constants.get("shell") is True:
        yield "shell=True"
    if called in STARTERS:
        yield "a process of its own"
    if called.endswith(".extractall") or called == "shutil.unpack_archive":
        yield "extractall"
    if called in {"importlib.import_module", "__import__"} and UNPICKLERS & {*map(str, given)}:
        yield "pickle"
    if called in {"importlib.import_module", "__import__"} and not _names_a_package(call):
        yield "import by name"
    if constants.get("allow_pickle") is True:
        yield "pickle"
    if constants.get("trust_remote_code") is True:
        yield "trust_remote_code=True"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def python_files() -> list[Path]:
    return [path for folder in ("mmit", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_dangerous_call() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {rule}"
        for path in python_files()
        for line, rule in rules_broken(path)
        if (str(path.relative_to(ROOT)), rule) not in ALLOWED
        and (path.is_relative_to(ROOT / "mmit") or rule not in OF_THE_PACKAGE)
    ]
    assert len(python_files()) > 5 and not found, "\n".join(found)


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest leaves folders out by their names, and `build` is one of those that it leaves out by default."""
    tests = ROOT / "tests"
    folders = {parent for path in tests.rglob("test_*.py") for parent in path.relative_to(tests).parents if parent.name}
    patterns = pytestconfig.getini("norecursedirs")
    assert len(folders) > 5 and patterns
    assert [str(f) for f in sorted(folders) if any(fnmatch.fnmatch(f.name, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=flag)", "torch.load without weights_only=True"),
        ("from torch import load\nload(f)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(f)", "torch.load without weights_only=True"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import pickle\ntry:\n    pickle.load(f)\nexcept pickle.UnpicklingError:\n    raise", "pickle"),
        ("import pickle as p\nfrom torch import Tensor\ng(pickle_module=p)", "pickle"),
        ("def f():\n    import joblib.numpy_pickle", "pickle"),
        ("import importlib\nimportlib.import_module('pickle')", "pickle"),
        ("import importlib\nimportlib.import_module(name)", "import by name"),
        ("from importlib import import_module as load\nload(config['kind'])", "import by name"),
        ("import importlib\nimportlib.import_module(f'{name}.part')", "import by name"),
        ("__import__(name)", "import by name"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "pickle"),
        ("eval(text)", "eval"),
        ("exec(text)", "eval"),
        ("import subprocess\nsubprocess.run(c, shell=True)", "shell=True"),
        ("import os\nos.system(c)", "shell=True"),
        ("from os import system\nsystem(c)", "shell=True"),
        ("tar.extractall(d)", "extractall"),
        ("import yaml\nyaml.load(t, Loader=yaml.Loader)", "yaml.load"),
        ("from yaml import unsafe_load\nunsafe_load(t)", "yaml.load"),
        ("f(n, trust_remote_code=True)", "trust_remote_code=True"),
        ("AutoModel.from_pretrained(n)", "no trust_remote_code=False"),
        ("AutoModel.from_pretrained(n, trust_remote_code=flag)", "no trust_remote_code=False"),
        ("AutoModel.from_pretrained(n, **options)", "no trust_remote_code=False"),
        ("transformers.AutoModel.from_config(c, trust_remote_code=None)", "no trust_remote_code=False"),
        ("load = AutoConfig.from_pretrained", "no trust_remote_code=False"),
        ("partial(AutoConfig.from_pretrained, trust_remote_code=False)", "no trust_remote_code=False"),
        ("getattr(AutoConfig, 'from_pretrained')(n)", "no trust_remote_code=False"),
        ("from other import PeftModel\nPeftModel.from_pretrained(m, n)", "no trust_remote_code=False"),
        ("import multiprocessing", "a process of its own"),
        ("from torch.multiprocessing import spawn\nspawn(f)", "a process of its own"),
        ("from concurrent.futures import ProcessPoolExecutor", "a process of its own"),
        ("import subprocess as s\ns.Popen(c)", "a process of its own"),
        ("import os\nos.fork()", "a process of its own"),
        ("import jinja2\njinja2.Template(text)", "a template without bounds"),
        ("from jinja2 import Environment as E\nE()", "a template without bounds"),
        ("import jinja2.sandbox\njinja2.sandbox.SandboxedEnvironment()", "a template without bounds"),
        ("tokenizer.apply_chat_template(m)", "a template without bounds"),
    ],
)
def test_the_gate_closes(source: str, rule: str) -> None:
    assert [found for _, found in rules_broken(source)] == [rule]


def test_the_gate_sees_the_calls_there_are() -> None:
    loads = sum(path.read_text().count("trust_remote_code=False") for path in python_files())
    assert loads > 12


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "model.eval()",
        "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    raise",
        "from pickle import UnpicklingError",
        "# pickle, eval( and shell=True are words here\nx = 'pickle'",
        "import yaml\nyaml.safe_load(t)",
        "import json\njson.load(f)",
        "import subprocess\nsubprocess.run([c], shell=False)",
        "from importlib import import_module\nimport_module(f'package.{part}')",
        "f(trust_remote_code=False)",
        "AutoModel.from_pretrained(n, **options, trust_remote_code=False)",
        "from peft import PeftModel\nPeftModel.from_pretrained(m, n)",
    ],
)
def test_the_gate_lets_pass(source: str) -> None:
    assert not list(rules_broken(source))


def test_shell_scripts_and_configs_trust_no_remote_code() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix in {".sh", ".yaml", ".yml", ".json", ".toml"}
        and re.search(r"trust_remote_code\W{1,4}true|(curl|wget)[^\n|]*\|\s*(ba)?sh", path.read_text("utf-8"), re.I)
    ]
    assert not found


# A folder of some machine: the path starts there, unlike the one inside https://host/work/.
MACHINE_PATH = re.compile(rb"(?<![\w.}~/-])/(?:work|tmp|root|home|Users|mnt|scratch)/[\w.]")


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("cd {}work/main", True),
        ("'{}tmp/w/v'", True),
        ("see https://host{}work/main", False),
        ("a{}tmp/b", False),
    ],
)
def test_what_counts_as_a_machine_path(text: str, hit: bool) -> None:
    assert bool(MACHINE_PATH.search(text.format("/").encode())) == hit


def test_no_machine_path_in_tracked_files() -> None:
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content:  # a picture or another binary file
            continue
        for number, line in enumerate(content.splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line[:120]!r}")
    assert not found, "\n".join(found)


def test_files_that_come_first_exist() -> None:
    """A file that moved would lose its place, and one that forks its single thread."""
    named = [name for name in (*conftest.FORKING, *conftest.FIRST) if not (ROOT / "tests" / name).is_file()]
    assert not named, f"tests/conftest.py names {', '.join(named)}"


def test_the_files_that_tests_begin_with_exist() -> None:
    from tests.conftest import FIRST, FIRST_SLOW, FORKING

    tests = Path(__file__).parent
    assert [name for name in (*FORKING, *FIRST, *FIRST_SLOW) if not (tests / name).is_file()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="names a folder of Linux")
def test_files_of_tests_lie_in_memory_where_there_is_room_and_code_may_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not conftest.in_memory(tmp_path / "missing")
    room, found = conftest.ROOM, []
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_frsize=2, **found[-1]))
    for free, flag, expected in ((room, 0, True), (room // 2, 0, False), (room, os.ST_NOEXEC, False)):
        found.append({"f_bavail": free, "f_flag": flag})
        assert conftest.in_memory(tmp_path) is expected
