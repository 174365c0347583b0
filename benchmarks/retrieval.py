"""Retrieval by example: R@k, mAP and MRR from sight to sight, sound to sound, and across, with controls.

Protocol (methods.md 6.3, declared): centre-cropped clips, each L2-normalised, averaged per video, normalised again,
cosine (`vectors.py`). Class level: gallery = train part, queries = test part of each official split, averaged over
splits, each split beside (`sides.py`); an item is relevant when its label is the query's. Instance level: queries and
gallery are the same videos, each looks for its own other modality (v-a and a-v only: within a modality a video would
find itself).

What is compared: heads and trunks by the embeddings in the store (one clip a second, or so many of them), blocks by
several clips of a map, and the protocols of SeLaVi and VCOP, labelled as theirs, with figures published under such
protocols on request. Controls stand in the same table: chance (exact expectation), encoders of the same shape with
random weights under every one of these, and raw pixels, motion and spectrograms (`raw.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import AvstoreError, UsageError
from benchmarks import splits
from benchmarks.compared import DEFAULT, SHOWN, Progress, declared, of_run, random_encoders, require, scope
from benchmarks.kept import Kept
from benchmarks.rank import KS
from benchmarks.rankings import LEVELS, Rankings
from benchmarks.raw import raw_features
from benchmarks.sides import Sides, choose_sides, trained_on, unseen, why_unknown
from benchmarks.table import Table
from benchmarks.vectors import ACROSS, BLOCKS, HEADS, PAIRS, TRUNKS, Features, raw_as_features, run_features

if TYPE_CHECKING:
    from avstore.store import Store


def retrieval(
    store: Store,
    runs: Sequence[str],
    *,
    label: str = "label",
    levels: Sequence[str] = LEVELS,
    gallery: Sequence[str] = (),
    queries: Sequence[str] = (),
    fold_count: int | None = None,
    fold_seed: int = 0,
    split_columns: Sequence[str] = (),
    seeds: int = 1,
    raw: bool = True,
    each: bool = False,
    ks: Sequence[int] = KS,
    run_paths: dict[str, Path] | None = None,
    shown: Sequence[str] = DEFAULT,
    clips: int | None = None,
    protocols: Sequence[str] = (),
    checkpoints: Sequence[str | int] = (),
    published: str | None = None,
    work: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    **selection: Any,
) -> Table:
    """The table of retrieval for runs that have embeddings in the store, or, with `checkpoints`, for their networks.

    Runs of one method are one row, mean and spread (standard deviation) over them, unless `each` or they differ in more
    than their seed. With `fold_count`, and with several official splits, every run is asked those that it was not
    trained on, by its snapshot. `seeds`: random-weight encoders per configuration, 0 for none. `run_paths`: where the
    runs' folders are (default: runs/<name>). shown: heads, trunks, conv2x ... conv5x. clips: of a video, evenly spaced
    (default: every second for heads and trunks, 10 for blocks). protocols: also under these published ones. published:
    the set whose published figures are printed. work: a folder in which computed vectors are kept.
    """
    levels, shown = tuple(dict.fromkeys(levels)), tuple(dict.fromkeys(shown))
    require(levels, shown, protocols, seeds, clips)
    given: list[dict[str, Any]] = []
    if published is not None:
        from benchmarks.protocols import published_rows

        given = published_rows(published)
    all_sides = choose_sides(
        store, gallery=gallery, queries=queries, fold_count=fold_count, fold_seed=fold_seed,
        split_columns=split_columns, label=label, **selection,
    )  # fmt: skip
    everyone = np.unique(np.concatenate([np.concatenate([s.queries, s.gallery]) for s in all_sides]))
    labels = _labels(store, label, everyone, "class" in levels)
    results, notes, kept = Rankings(), list[str](), Kept(work)
    if fold_count is None:
        columns = [] if gallery or queries else split_columns or splits.columns_of(store)
        notes += splits.lost(store, columns, **selection)
    used: set[int] = set()
    paths = {run: (run_paths or {}).get(run, Path("runs") / run) for run in runs}
    names = _names(store, paths, each)
    kinds: dict[str, list[str]] = {}  # rows that are compared: of one suffix, at the last checkpoint
    for run, path in paths.items():
        trained = trained_on(path, store)
        mine, leaking = unseen(all_sides, trained)
        if leaking:
            notes.append(f"{run} was trained on {leaking} of the queries")
        elif len(mine) < len(all_sides) and fold_count is None:
            notes.append(f"{run} is asked {'; '.join(s.description for s in mine)} alone: it was trained on queries of "
                         "the others")  # fmt: skip
        unknown = why_unknown(path, store)
        if unknown is not None:
            notes.append(f"{run}: {unknown}")
        used |= {i for i, s in enumerate(all_sides) if s in mine}
        for step, suffix, features in of_run(store, run, path, everyone, shown, clips, protocols, checkpoints, kept,
                                             device, progress):  # fmt: skip
            name = names[run] + suffix + ("" if step is None else f" step {step[0]}")
            if step is not None:
                results.extra[name] = {"step": step[0], "epoch": step[1], "of run": names[run] + suffix}
            mates = kinds.setdefault(suffix, [])
            if name not in mates and (step is None or checkpoints[-1] in ("latest", step[0])):
                mates.append(name)
            pairs, its = scope(suffix, levels)
            for sides in mine:
                results.score(name, features, sides, labels, its, pairs, ks)
                notes += _left_out(store, name, features, sides)
    asked = [s for i, s in enumerate(all_sides) if i in used] or all_sides
    random_encoders(
        results, store, paths, everyone, asked, labels, levels, seeds, ks, progress, notes,
        shown=shown, clips=clips, protocols=protocols, kept=kept, device=device,
    )  # fmt: skip
    if raw:
        found = raw_features(store, everyone, lambda done, total: progress("raw controls", done, total))
        for name, (features, its_pairs) in raw_as_features(found).items():
            for sides in asked:
                results.score(name, features, sides, labels, levels, its_pairs, ks)
    for sides in asked:
        results.add_chance(store, sides, labels, levels, ks)
    notes += declared(store, shown, clips, protocols, published)
    return results.table(store, levels, label, asked, notes, ks, given, list(kinds.values()))


def _labels(store: Store, label: str, everyone: np.ndarray, needed: bool) -> dict[int, str]:
    values = store.column(label, everyone) if needed or label in store.columns else [None] * len(everyone)
    empty = [int(n) for n, v in zip(everyone, values, strict=True) if v in (None, "")]
    if empty and needed:
        raise UsageError(
            f"{len(empty)} of {len(everyone)} videos have no {label}",
            f"e.g. {store.key(empty[0])}",
            f"--where {label}!= leaves them out; --label names another column; --instance needs none",
        )
    return {int(n): str(v) for n, v in zip(everyone, values, strict=True)}


def _names(store: Store, paths: dict[str, Path], each: bool) -> dict[str, str]:
    """What each run's rows are called: see `probing.names`; where folders are not there, by the embeddings' lineage."""
    from benchmarks.probing import names
    from trainers.run import Run

    if each:
        return {run: run for run in paths}
    try:
        opened = [Run(path) for path in paths.values()]
        return dict(zip(paths, names(opened), strict=True))
    except AvstoreError:
        return {run: method_of(store, run) or run for run in paths}


def _left_out(store: Store, name: str, features: Features, sides: Sides) -> list[str]:
    """A line for each modality that some queries lack: in the store (but not where all do), or in the embeddings."""
    out = []
    for m, have, word in (("v", store.has_picture, "pictures"), ("a", store.has_sound, "sound")):
        if m not in features.vectors:
            continue
        with_it = sides.queries[have[sides.queries]]
        without = len(sides.queries) - len(with_it)
        if without and len(with_it):
            out.append(f"{without} queries have no {word}: left out where they would need it")
        missing = len(with_it) - len(features.of(m, with_it)[1])
        if missing:
            out.append(f"{missing} queries have no {m} embeddings of {name}: left out")
    return out


def method_of(store: Store, run: str) -> str | None:
    """The method that made a run's embeddings, by their lineage."""
    from avstore.durable import read_json

    for file in sorted((store.path / "embeddings" / run).glob("[!.]*/zarr.json")):
        lineage = read_json(file).get("attributes", {}).get("avstore", {})
        if isinstance(lineage, dict) and lineage.get("method"):
            return str(lineage["method"])
    return None


__all__ = ["ACROSS", "BLOCKS", "DEFAULT", "HEADS", "LEVELS", "PAIRS", "SHOWN", "TRUNKS", "Features", "Sides",
           "choose_sides", "method_of", "random_encoders", "raw_as_features", "retrieval", "run_features", "trained_on",
           "unseen"]  # fmt: skip
