"""What `--show-config` shows: every setting of a run, its value, the paper's, and where that comes from.

The source of a value is the comment behind its field in the dataclass: "[S4] eqs. 1-3" a paper, "[C]" its authors'
code, "[ours]" a declared choice. So there is one place where it is written.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import tokenize
from dataclasses import dataclass
from typing import Any

from trainers.config import RunConfig, TrainConfig, preset_of


@dataclass(frozen=True)
class Row:
    """A line of `--show-config`."""

    key: str
    value: Any
    paper: Any  # the paper's value; None for choices of ours in the loop that the method leaves alone
    source: str  # where it comes from: the comment behind the field
    of: str  # 'method' or 'loop': whose key it is


def show_config(config: RunConfig) -> list[Row]:
    """Every key of a run with its value, the paper's value, and where that comes from; the method's own first."""
    paper = preset_of(config.name, "paper").values()
    own, loop = comments(type(config.method)), comments(TrainConfig)
    return [
        Row(key, value, paper[key], own[key] or loop.get(key, ""), "method")
        if key in own
        else Row(key, value, None if loop[key].startswith("[ours]") else paper[key], loop[key], "loop")
        for key, value in config.values().items()
    ]


def comments(of: type[Any]) -> dict[str, str]:
    """Field name -> the comment behind it in the source of a dataclass ('' where there is none). What a subclass does
    not write itself comes from the class above it."""
    out: dict[str, str] = {f.name: "" for f in dataclasses.fields(of)}
    for base in reversed(of.__mro__):
        if dataclasses.is_dataclass(base):
            out |= {name: text for name, text in _comments(base, set(out)).items() if text}
    return out


def _comments(of: type[Any], names: set[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    word, depth = None, 0
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(of)).readline):
        if token.type == tokenize.OP:
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token.string, 0)
        starts_line = not token.line[: token.start[1]].strip()
        if token.type == tokenize.NAME and token.string in names and depth == 0 and starts_line:
            word = token.string
        elif token.type == tokenize.COMMENT and word and word not in out:
            out[word] = token.string.lstrip("# ").strip()
        elif token.type == tokenize.NEWLINE and depth == 0:
            word = None
    return out
