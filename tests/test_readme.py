"""The README: its tree names every file, its commands exist, and its Python runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
FOLDERS = ("avstore", "trainers", "benchmarks", "cli")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tree_names_every_file(folder: str) -> None:
    files = {p.name for p in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    part = TEXT[TEXT.index(f"    {folder}/\n") :].split("\n    ", 1)[1]
    listed = set(re.findall(r"^      (\w+\.py) ", TEXT[TEXT.index(f"    {folder}/\n") :], re.M)) if part else set()
    assert files <= listed, f"not in the README's tree: {sorted(files - listed)}"
    everywhere = {p.name for f in FOLDERS for p in (ROOT / f).glob("*.py")}
    assert listed <= everywhere, f"gone, but in the README's tree: {sorted(listed - everywhere)}"


def test_every_command_and_option_shown_exists() -> None:
    from typer.main import get_command

    from cli.main import app

    group = get_command(app)
    for line in re.findall(r"^    (?:\$ )?avstore ([a-z][^\n#]*)", TEXT, re.M):
        words = line.split()
        command = group
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not group, f"README shows `avstore {line}`"
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in options, f"README shows {word} in `avstore {line}`"


def test_the_python_of_the_readme_parses() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        ast.parse(block)
