"""Which videos of a store a run has seen, with all that it learned from: the runs it began from, its teachers, theirs.

    seen = seen_by(run, store)          # seen.numbers; seen.unknown: sources of which nobody can tell
    before = seen_before(store, [init_run], ["runs/avid"])          # kept in a snapshot when training begins

A run is tested on videos that none of them saw. Runs whose snapshot does not tell it (of older versions) have their
stage and teachers looked up: folders that are still there and hold what the snapshot says. Not here: who is asked what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore.durable import read_json
from avstore.errors import AvstoreError, ConflictError

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run


@dataclass(frozen=True, eq=False)
class Seen:
    """Videos of one store, int64, sorted; unknown: what else was learned from, each in words."""

    numbers: np.ndarray
    unknown: tuple[str, ...] = ()


def seen_by(run: Run, store: Store) -> Seen:
    """What of `store` a run and all that it learned from were trained on. ConflictError where the run itself is of
    another store."""
    snapshot = run.snapshot
    snapshot.require_fits(store)
    steps = [c.step for c in run.checkpoints()]
    # a run of converted weights has been trained by nobody here: its selection gave statistics, no gradient
    own = np.zeros(0, np.int64) if steps and not any(steps) else snapshot.numbers
    if snapshot.also_saw is not None:
        return Seen(np.union1d(own, snapshot.also_saw), snapshot.unknown)
    before = _looked_up(run, store)
    return Seen(np.union1d(own, before.numbers), before.unknown)


def seen_before(store: Store, runs: Iterable[Run], teachers: Iterable[str] = ()) -> Seen:
    """What of `store` these runs and teachers (sources, see `teacher.py`) were trained on."""
    return _union([*(_of_run(run, store) for run in runs), *(_of_teacher(t, store) for t in teachers if t)])


def _union(each: Iterable[Seen]) -> Seen:
    each = list(each)
    numbers = np.unique(np.concatenate([np.zeros(0, np.int64), *(s.numbers for s in each)]))
    return Seen(numbers, tuple(dict.fromkeys(text for s in each for text in s.unknown)))


def _nothing_known(text: str) -> Seen:
    return Seen(np.zeros(0, np.int64), (text,))


def _of_run(run: Run, store: Store) -> Seen:
    try:
        return seen_by(run, store)
    except ConflictError:
        return _nothing_known(f"{run.name}, trained on another store, {Path(run.snapshot.store).name}")


def _of_teacher(source: str, store: Store) -> Seen:
    from trainers.run import RUNS
    from trainers.teacher import checkpoint_of, kind_of

    kind, path = kind_of(source), source.partition("#")[0]
    if kind == "run":
        return _of_run(checkpoint_of(path)[0], store)
    if kind == "weights":
        return _nothing_known(f"the weights {Path(path).name}")
    of, _, _ = path.partition("/embeddings/")
    lineage = read_json(Path(path) / "zarr.json").get("attributes", {}).get("avstore") or {}
    for folder in (RUNS, Path(of).resolve().parent / "runs"):
        found = _there(folder / str(lineage.get("run")), lineage.get("config"), lineage.get("checkpoint"))
        if found is not None:
            return _of_run(found, store)
    text = f"{source}, made by {lineage.get('run', 'nobody knows what')}: no such run in runs here or beside that store"
    return _nothing_known(text)


def _there(path: Path, config: object, checkpoint: object) -> Run | None:
    """The run in a folder, where it is the one that is meant: of this configuration, with this checkpoint."""
    from trainers.run import Run

    try:
        run = Run(path)
        right = run.config.digest == config and checkpoint in {c.digest for c in run.checkpoints()}
    except AvstoreError:
        return None  # nothing there that can be read: the caller says so
    return run if right else None


def _looked_up(run: Run, store: Store) -> Seen:
    """What came before a run whose snapshot does not tell."""
    from trainers.run import RUNS
    from trainers.teacher import digest_of

    each, init = [], run.snapshot.init
    if init is not None:
        places = (run.path.resolve().parent / str(init["run"]), RUNS / str(init["run"]))
        found = next((r for p in places if (r := _there(p, init["config"], init["checkpoint"])) is not None), None)
        each.append(_nothing_known(f"{init['run']}, whose folder is not to be found") if found is None
                    else _of_run(found, store))  # fmt: skip
    for source, digest in run.snapshot.teachers.items():
        try:
            same = digest_of(source) == digest
        except AvstoreError:
            same = False
        each.append(_of_teacher(source, store) if same else _nothing_known(f"{source}, which is no more what it was"))
    return _union(each)
