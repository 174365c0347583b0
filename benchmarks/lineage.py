"""Lineage: which run made the embeddings in a store, and where its folder lies.

    found, lost = trainers_of(store, ["avid-cma"])
    run = maker(store, "short", asked="runs/avid-cma"); step = step_of(store, "short", run)

Embeddings may have another name than their run (`embed --name`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avstore.errors import AvstoreError, ConflictError
from avstore.index import embedded_runs
from trainers.run import RUNS, Run

if TYPE_CHECKING:
    from avstore.store import Store


def trainers_of(store: Store, names: Sequence[str]) -> tuple[list[Run], list[str]]:
    """(runs, names without one): of embeddings in a store the runs that made them, where their folders lie in `runs`
    here or beside the store and hold the same configuration."""
    made = {name: maker(store, name) for name in names}
    return [run for run in made.values() if run is not None], [name for name, run in made.items() if run is None]


def maker(store: Store, name: str, asked: str | None = None) -> Run | None:
    """The run that made the embeddings `name`: in the folder `asked`, else in `runs` here or beside the store, as
    their lineage calls it; of the noted configuration, with a checkpoint. None where no folder holds it."""
    noted = lineage_of(store, name)
    for path in (
        *([Path(asked)] if asked else []),
        *(folder / str(noted.get("run", name)) for folder in (RUNS, store.path.resolve().parent / "runs")),
    ):
        try:
            run = Run(path)
            if run.config.digest == noted.get("config") and run.checkpoints():
                return run
        except AvstoreError:
            continue  # no run there: the next place is tried, and the caller says what was not found
    return None


def step_of(store: Store, name: str, run: Run) -> int:
    """The step of the checkpoint that made the embeddings `name`, which their run still has. ConflictError where it
    keeps it no more: vectors of another checkpoint do not compare."""
    noted = lineage_of(store, name)
    for checkpoint in run.checkpoints():
        if checkpoint.digest == noted.get("checkpoint"):
            return checkpoint.step
    raise ConflictError(
        f"the embeddings {name} are of step {noted.get('step')} of {run.path}, which keeps that checkpoint no more",
        "vectors of another checkpoint do not compare with them",
        f"avstore embed {run.path} {store.path} --name {name} --replace",
    )


def lineage_of(store: Store, name: str) -> dict[str, Any]:
    """What is noted of the embeddings `name`; {} where nothing is. KeyError where the store has none."""
    said = store.path / "embeddings" / name / embedded_runs(store)[name][0] / "zarr.json"
    noted = json.loads(said.read_text(encoding="utf-8"))["attributes"].get("avstore", {})
    return noted if isinstance(noted, dict) else {}
