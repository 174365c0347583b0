"""Ruff and mypy, with the settings in pyproject.toml, are part of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def clean(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff() -> None:
    clean("ruff", "check", ".")


def test_mypy() -> None:
    clean("mypy", "avstore", "cli", "trainers", "benchmarks")
