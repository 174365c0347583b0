"""Lineage: which run made the embeddings in a store, and where its folder lies.

    found, lost = trainers_of(store, ["avid-cma"])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from avstore.errors import AvstoreError
from avstore.index import embedded_runs
from trainers.run import RUNS, Run

if TYPE_CHECKING:
    from avstore.store import Store


def trainers_of(store: Store, names: Sequence[str]) -> tuple[list[Run], list[str]]:
    """(runs, names without one): of embeddings in a store the runs that made them, where their folders lie in `runs`
    here or beside the store and hold the same configuration."""
    found: list[Run] = []
    lost = []
    for name in names:
        towers = embedded_runs(store)[name]
        said = store.path / "embeddings" / name / towers[0] / "zarr.json"
        lineage = json.loads(said.read_text(encoding="utf-8"))["attributes"].get("avstore", {})
        for folder in (RUNS, store.path.resolve().parent / "runs"):
            try:
                run = Run(folder / str(lineage.get("run", name)))
                if run.config.digest == lineage.get("config") and run.checkpoints():
                    found.append(run)
                    break
            except AvstoreError:
                continue  # no run there: the next place is tried, and the page names what was not found
        else:
            lost.append(name)
    return found, lost
