"""A run's folder: what was asked, what of the store it saw, its checkpoints; and the lock against a second training.

    runs/avid-cma/  config.json    the resolved configuration, canonical JSON
                    snapshot.json  see `snapshot.py`: the store's fingerprint, the selection, statistics
                    checkpoints/   see `checkpoint.py`
                    metrics.jsonl  see `metrics.py`
                    machine.json   see `machine.py`: parameters, devices
                    lock           flock, host and pid of the training

Bank rows and orders of epochs come from the snapshot, never from the store of the day. Repeating a command goes on
where the run stopped; another configuration in the same folder is refused, naming the keys.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avstore.durable import canonical_json, machine_errors, read_json, write_atomic
from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError, did_you_mean
from trainers.config import FREE, RunConfig
from trainers.methods import method as find_method
from trainers.snapshot import Snapshot
from trainers.typed import as_text

if TYPE_CHECKING:
    from torch import nn

    from trainers.checkpoint import Checkpoint

RUNS = Path("runs")


class Run:
    """A run that is there. NotFoundError where the folder holds none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            there = (
                sorted(p.parent.name for p in self.path.parent.glob("*/config.json"))
                if self.path.parent.is_dir()
                else []
            )
            raise NotFoundError(
                f"there is no run in {self.path}", did_you_mean(self.path.name, there), "avstore train METHOD makes one"
            )

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config(self) -> RunConfig:
        return RunConfig.from_json(_object(self.path / "config.json"))

    @cached_property
    def snapshot(self) -> Snapshot:
        if not (self.path / "snapshot.json").is_file():
            raise NotFoundError(
                f"the run {self.path} never started", "it has no snapshot of a store", "repeat its command"
            )
        return Snapshot.from_json(_object(self.path / "snapshot.json"))

    @property
    def folder(self) -> Path:
        return self.path / "checkpoints"

    def checkpoints(self) -> list[Checkpoint]:
        """Oldest first."""
        from trainers.checkpoint import list_checkpoints

        return list_checkpoints(self.folder)

    def checkpoint(self, which: str | int = "latest") -> Checkpoint:
        """'latest', a step, or a name like step-000400. NotFoundError lists what there is."""
        found = self.checkpoints()
        if not found:
            raise NotFoundError(
                f"the run {self.path} has no checkpoint yet", "it never came as far", "repeat its avstore train command"
            )
        if which == "latest":
            return found[-1]
        for checkpoint in found:
            if str(which) in (str(checkpoint.step), checkpoint.path.name):
                return checkpoint
        raise NotFoundError(
            f"the run {self.path} has no checkpoint {which!r}",
            f"there is: {', '.join(str(c.step) for c in found)}",
            "--checkpoint latest, or one of these steps",
        )

    @property
    def finished(self) -> bool:
        """Whether its last checkpoint is the end of its schedule."""
        found = self.checkpoints()
        return bool(found) and found[-1].step >= int(found[-1].state["total_steps"])

    def build(self, rows: int | None) -> nn.Module:
        """The method's module, freshly initialised (on the CPU), with a bank of `rows` videos.

        None: of the smallest bank that the configuration allows, for whoever wants the networks only.
        """
        return build(self.config, self.snapshot, rows)

    def load(self, which: str | int = "latest") -> nn.Module:
        """The method with the weights of a checkpoint, in eval mode on the CPU; its bank is left empty."""
        from trainers.checkpoint import _require_same_tensors, read_tensors

        checkpoint = self.checkpoint(which)
        method = self.build(None)
        weights = read_tensors(checkpoint, "model.safetensors")
        _require_same_tensors(checkpoint, method.state_dict(), weights)
        method.load_state_dict(weights)
        return method.eval()


def build(config: RunConfig, snapshot: Snapshot | None, rows: int | None) -> nn.Module:
    """See `Run.build`."""
    if rows is None:
        rows = min(len(snapshot.numbers), 4096) if snapshot is not None else 4096
    line = find_method(config.name)
    if not line.labels:
        return line.load().make(config.method, rows)
    if snapshot is None or snapshot.labels is None:
        raise UsageError(f"{config.name} needs the names of its classes", "they are in the snapshot of its run")
    return line.load().make(config.method, rows, snapshot.labels)


def find_run(text: str | os.PathLike[str]) -> Run:
    """A run by its folder, or by its name under `runs/`."""
    path = Path(text)
    if (path / "config.json").is_file() or path.parent != Path():
        return Run(path)
    return Run(RUNS / path)


class OpenRun:
    """A run's folder held for training: `start` compares or writes its configuration, under the folder's lock."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with machine_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.pread(self._fd, 4096, 0).decode(errors="replace").strip()
            self.close()
            raise ConflictError(
                f"the run {self.path} is being trained",
                f"by {holder or 'another process'}",
                "wait until it ends, or train into another folder with --run",
            ) from e
        with machine_errors(self.path / "lock"):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0)
        from trainers.checkpoint import sweep

        sweep(self.path / "checkpoints")

    def start(self, config: RunConfig) -> bool:
        """Writes config.json, or compares with the one that is there: True where the run goes on.

        ConflictError naming every key that differs, but for those in FREE.
        """
        file = self.path / "config.json"
        if not file.is_file():
            write_atomic(file, canonical_json(config.to_json()))
            return False
        require_same(self.path, RunConfig.from_json(_object(file)), config)
        return (self.path / "snapshot.json").is_file()

    def write_snapshot(self, snapshot: Snapshot) -> None:
        write_atomic(self.path / "snapshot.json", canonical_json(snapshot.to_json()))

    @property
    def run(self) -> Run:
        return Run(self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_same(path: Path, there: RunConfig, asked: RunConfig) -> None:
    """ConflictError naming each key in which a run differs from what is asked; keys of FREE may."""
    if there.name != asked.name:
        raise ConflictError(
            f"{path} is a run of {there.name}", f"{asked.name} was asked", "name another folder with --run"
        )
    mine, theirs = there.values(), asked.values()
    differing = [
        f"{k} is {as_text(mine[k])} there, {as_text(theirs[k])} was asked"
        for k in mine
        if k not in FREE and mine[k] != theirs[k]
    ]
    if differing:
        raise ConflictError(
            f"the run {path} has another configuration",
            "; ".join(differing),
            "give the same options again, or name another folder with --run",
        )


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise CorruptError(f"{path} is damaged", "it holds no JSON object")
    return value
