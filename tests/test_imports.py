"""Imports go one way, cli -> benchmarks -> trainers -> avstore; no method imports another; help loads nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("avstore", "trainers", "benchmarks", "cli")  # each may import those before it
HEAVY = ("torch", "av", "faiss", "scipy", "sklearn", "h5py", "pandas", "zarr", "matplotlib", "nvidia", "tensorboard")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST, package: str = "") -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports anywhere in it, functions included, and their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module) if part)
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def faults(tree: ast.AST, package: str) -> list[str]:
    """Imports of a file of `package` that go against the order."""
    later = ORDER[ORDER.index(package) + 1 :]
    return [f"line {line}: {name}" for name, line in imported(tree, package) if name.split(".")[0] in (*later, "tests")]


def method_files() -> set[str]:
    """The files that trainers/methods.py loads: what each `_name()` there imports from trainers."""
    tree = ast.parse((ROOT / "trainers" / "methods.py").read_text())
    inside = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("_")]
    return {
        alias.name
        for function in inside
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and node.module == "trainers"
        for alias in node.names
    }


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package: str) -> None:
    files = sources(package)
    assert files, f"{package}/ is empty"
    wrong = {str(f.relative_to(ROOT)): found for f in files if (found := faults(ast.parse(f.read_text()), package))}
    assert not wrong


def test_the_rule_itself_sees_what_it_should() -> None:
    hidden = ast.parse("def f():\n    from trainers import loop\n    import cli.main\n")
    assert faults(hidden, "avstore") == ["line 2: trainers", "line 2: trainers.loop", "line 3: cli.main"]
    assert faults(hidden, "trainers") == ["line 3: cli.main"]
    assert faults(hidden, "cli") == []
    assert list(imported(ast.parse("from . import bank"), "trainers")) == [("trainers", 1), ("trainers.bank", 1)]


def test_no_method_imports_another() -> None:
    trees = {f.stem: ast.parse(f.read_text()) for f in sources("trainers")}
    methods = method_files() & set(trees)
    assert {"avid", "avid_cma", "crisscross", "simclr"} <= methods
    for name in sorted(methods):
        names = [dotted.split(".") for dotted, _ in imported(trees[name], "trainers")]
        used = {parts[1] for parts in names if parts[0] == "trainers" and len(parts) > 1}
        assert not used & (methods - {name}), f"trainers/{name}.py imports another method"


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [f for package in ORDER for f in sources(package) if f.stem in drawers]


def loaded(code: str) -> set[str]:
    """Top-level modules in memory after a piece of code ran in a fresh interpreter."""
    tail = "\nimport json, sys\nprint('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_avstore_is_light() -> None:
    assert not loaded("import avstore") & {"torch", "av"}


@pytest.mark.parametrize("words", [["--help"], ["ingest", "--help"], ["train", "--help"], ["query", "--help"]])
def test_help_is_light(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["avstore", *{words!r}]
from cli.main import run
try:
    run()
except SystemExit as end:
    assert not end.code, end.code
"""
    names = loaded(code)
    assert "typer" in names
    assert not names & set(HEAVY)


@pytest.mark.parametrize("package", ORDER)
def test_packages_have_a_docstring_in_every_file(package: str) -> None:
    bare = [str(f.relative_to(ROOT)) for f in sources(package) if not ast.get_docstring(ast.parse(f.read_text()))]
    assert not bare
