"""What a run measures of itself: one JSON object a line in metrics.jsonl, and TensorBoard where it is installed.

A line that is written stays, but for lines beyond the checkpoint that a run resumes from: those steps are done again,
and would be there twice.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avstore.durable import machine_errors, write_atomic
from avstore.errors import CorruptError


class MetricLog:
    """Appends to FOLDER/metrics.jsonl; FOLDER/tensorboard too if `tensorboard` can be imported.

    `resume_at`: lines of later steps are dropped. A NaN or infinity is written as null: JSON has no other way.
    """

    def __init__(self, folder: Path, resume_at: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_at]
        write_atomic(self.path, b"".join(_line(line) for line in kept))
        with machine_errors(self.path):
            self._file = open(self.path, "ab")  # noqa: SIM115  (closed by close)
        self._board: Any = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line, with `step` in it, on its way to the disk when this returns."""
        line: dict[str, Any] = {"step": step, **values}
        with machine_errors(self.path):
            self._file.write(_line(line))
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; [] where there is none. A last line cut short by a crash is left out;
    CorruptError for any other that is no JSON object with a step."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    out = []
    for number, line in enumerate(lines[:-1], 1):  # a whole line ends in a newline
        try:
            value = json.loads(line)
            if not isinstance(value["step"], int):
                raise TypeError("its step is no whole number")
        except (ValueError, KeyError, TypeError) as e:
            raise CorruptError(f"line {number} of {path} is damaged", str(e), "delete that line, then go on") from e
        out.append(value)
    return out


def _line(values: Mapping[str, Any]) -> bytes:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return (json.dumps(clean, allow_nan=False) + "\n").encode()
