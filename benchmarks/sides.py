"""Who asks and who is found: the queries and the gallery of a retrieval, and which of them a run was trained on.

By default the gallery is the training part and the queries are the test part of each official split (`splits.py`:
split1 ... split3 are averaged), a validation part being in neither; else what conditions or stratified folds say.
Not here: features and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import AvstoreError, UsageError
from benchmarks import splits
from benchmarks.rank import folds

if TYPE_CHECKING:
    from avstore.store import Store


@dataclass(frozen=True, eq=False)
class Sides:
    """Video numbers of queries and gallery, int64, and how they were chosen."""

    queries: np.ndarray
    gallery: np.ndarray
    description: str


def choose_sides(
    store: Store,
    *,
    gallery: Sequence[str] = (),
    queries: Sequence[str] = (),
    fold_count: int | None = None,
    fold_seed: int = 0,
    split_columns: Sequence[str] = (),
    label: str = "label",
    **selection: Any,
) -> list[Sides]:
    """Queries and gallery: the conditions given; else `fold_count` stratified folds of the selection (each in turn the
    queries, the rest the gallery); else test and train part of each official split. UsageError where the store has no
    such splits, where two of these are asked for at once."""
    asked = [n for n, on in (("--folds", fold_count is not None), ("--gallery and --queries", bool(gallery or queries)),
                             ("--split", bool(split_columns))) if on]  # fmt: skip
    if len(asked) > 1:
        raise UsageError(f"{asked[0]} with {asked[1]}", "each says by itself who asks and who is found", "one of them")
    if fold_count is not None:
        numbers = store.select(**selection).numbers
        which = folds([store.key(int(n)) for n in numbers], store.column(label, numbers), fold_count, fold_seed)
        return [
            Sides(numbers[which == f], numbers[which != f], f"fold {f} of {fold_count}, seed {fold_seed}")
            for f in range(fold_count)
        ]
    where = list(selection.pop("where", ()))
    if not gallery and not queries:
        numbers = store.select(where=where, **selection).numbers
        try:
            found = splits.official(store, numbers, list(split_columns) or None)
        except UsageError as e:
            if split_columns or "no train and test split" not in e.what:
                raise
            raise UsageError(e.what, e.why, "--gallery COLUMN=VALUE --queries COLUMN=VALUE, or --folds 5") from e
        return [
            Sides(numbers[s.test], numbers[s.train], "queries test split, gallery train split"
                  if s.name == "test split" else f"{s.name}: queries test, gallery train")
            for s in found
        ]  # fmt: skip
    if not gallery or not queries:
        raise UsageError("--gallery and --queries go together", "one of them is missing", "or leave both: splits")
    g = store.select(where=[*where, *gallery], **selection).numbers
    q = store.select(where=[*where, *queries], **selection).numbers
    both = np.intersect1d(g, q)
    if len(both):
        raise UsageError(
            f"{len(both)} videos are both query and gallery",
            f"e.g. {store.key(int(both[0]))}: each would find itself",
            "make --gallery and --queries disjoint",
        )
    return [Sides(q, g, f"queries {' '.join(queries)}, gallery {' '.join(gallery)}")]


def trained_on(path: Path, store: Store) -> np.ndarray | None:
    """Numbers of the videos that a run was trained on, its stages and teachers included; None where its folder is not
    to be found, or is of another store."""
    from trainers.ancestry import seen_by
    from trainers.run import Run

    try:
        return seen_by(Run(path), store).numbers
    except AvstoreError:
        return None


def why_unknown(path: Path, store: Store) -> str | None:
    """What `trained_on` does not know, and why; None where it knows all."""
    from trainers.ancestry import seen_by
    from trainers.run import Run

    try:
        run = Run(path)
        there = run.snapshot.store
    except AvstoreError:
        return f"its folder is not at {path}, so what it was trained on is unknown"
    try:
        unknown = seen_by(run, store).unknown
    except AvstoreError:
        return f"trained on another store, {Path(there).name}; whether these videos were in it is not known"
    return f"it learned from {', '.join(unknown)}: whether that saw these videos is not known" if unknown else None


def unseen(all_sides: list[Sides], trained: np.ndarray | None) -> tuple[list[Sides], int]:
    """The sides whose queries a run has not been trained on; where there are none, all, and how many it has seen."""
    if trained is None:
        return all_sides, 0
    seen = [int(np.isin(s.queries, trained).sum()) for s in all_sides]
    fresh = [s for s, n in zip(all_sides, seen, strict=True) if not n]
    return (fresh, 0) if fresh else (all_sides, sum(seen))
