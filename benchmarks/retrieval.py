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

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import AvstoreError, UsageError, did_you_mean
from benchmarks.kept import Kept
from benchmarks.rank import KS
from benchmarks.rankings import LEVELS, Rankings
from benchmarks.raw import raw_features
from benchmarks.sides import Sides, choose_sides, trained_on, unseen, why_unknown
from benchmarks.table import Table
from benchmarks.vectors import (
    ACROSS,
    BLOCKS,
    CLIPS,
    HEADS,
    PAIRS,
    TRUNKS,
    WITHIN,
    Features,
    Networks,
    raw_as_features,
    run_features,
    shape_of,
)

if TYPE_CHECKING:
    from avstore.store import Store

SHOWN = ("heads", "trunks", *BLOCKS)
DEFAULT = ("heads", "trunks")
SUFFIXES = {"heads": "", "trunks": " trunks"}

Progress = Callable[[str, int, int], None]


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
    _require(levels, shown, protocols, seeds, clips)
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
        if trained is None:
            notes.append(f"{run}: {why_unknown(path, store)}")
        used |= {i for i, s in enumerate(all_sides) if s in mine}
        for step, suffix, features in _of_run(store, run, path, everyone, shown, clips, protocols, checkpoints, kept,
                                              device, progress):  # fmt: skip
            name = names[run] + suffix + ("" if step is None else f" step {step[0]}")
            if step is not None:
                results.extra[name] = {"step": step[0], "epoch": step[1], "of run": names[run] + suffix}
            mates = kinds.setdefault(suffix, [])
            if name not in mates and (step is None or checkpoints[-1] in ("latest", step[0])):
                mates.append(name)
            for sides in mine:
                pairs = ("v-v",) if suffix.startswith(" as ") else PAIRS if not suffix else WITHIN
                its = ("class",) if suffix.startswith(" as ") else levels
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
    notes += _declared(store, shown, clips, protocols, published)
    return results.table(store, levels, label, asked, notes, ks, given, list(kinds.values()))


def _require(
    levels: Sequence[str], shown: Sequence[str], protocols: Sequence[str], seeds: int, clips: int | None
) -> None:
    for level in levels:
        if level not in LEVELS:
            raise UsageError(f"no level {level!r}", f"there is: {', '.join(LEVELS)}")
    if seeds < 0:
        raise UsageError(f"{seeds} seeds", "0 or more")
    if clips is not None and clips < 1:
        raise UsageError(f"{clips} clips", "at least one of each video")
    for block in shown:
        if block not in SHOWN:
            raise UsageError(f"no block {block!r}", did_you_mean(block, SHOWN), f"one of {', '.join(SHOWN)}")
    if not shown and not protocols:
        raise UsageError("nothing to compare", "no block and no protocol is named", f"one of {', '.join(SHOWN)}")
    if protocols:
        from benchmarks.protocols import protocol

        for name in protocols:
            protocol(name)


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


def _of_run(
    store: Store,
    run: str,
    path: Path,
    everyone: np.ndarray,
    shown: Sequence[str],
    clips: int | None,
    protocols: Sequence[str],
    checkpoints: Sequence[str | int],
    kept: Kept,
    device: str,
    progress: Progress,
) -> Iterator[tuple[tuple[int, float] | None, str, Features]]:
    """((step, epoch) of a checkpoint or None, suffix of the row's name, features)."""
    towers = [s for s in SUFFIXES if s in shown]
    if not checkpoints and towers:
        found = run_features(store, run, clips)
        yield from ((None, SUFFIXES[s], found[SUFFIXES[s]]) for s in towers if SUFFIXES[s] in found)
    if not checkpoints and len(towers) == len(shown) and not protocols:
        return
    from benchmarks.curve import place_of
    from trainers.run import Run

    opened = Run(path)
    for i, which in enumerate(checkpoints or ("latest",)):
        step = place_of(opened, which) if checkpoints else None
        networks = Networks(opened, store, everyone, which, device=device, kept=kept)
        progress(f"{run}{'' if step is None else f' step {step[0]}'}", i, len(checkpoints) or 1)
        for suffix, features in _computed(networks, shown if checkpoints else [s for s in shown if s in BLOCKS], clips,
                                          protocols, progress):  # fmt: skip
            yield step, suffix, features


def _computed(
    networks: Networks, shown: Sequence[str], clips: int | None, protocols: Sequence[str], progress: Progress
) -> Iterator[tuple[str, Features]]:
    def say(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total)

    towers = [s for s in SUFFIXES if s in shown]
    if towers:
        found = networks.towers(clips)
        yield from ((SUFFIXES[s], found[SUFFIXES[s]]) for s in towers if SUFFIXES[s] in found)
    for block in (b for b in BLOCKS if b in shown):
        yield f" {block}", networks.block(block, clips or CLIPS, say(block))
    for name in protocols:
        yield f" as {name}", networks.protocol(name, say(f"as {name}"))


def _declared(
    store: Store, shown: Sequence[str], clips: int | None, protocols: Sequence[str], published: str | None
) -> list[str]:
    """How what is compared was made, a line for each kind."""
    out = []
    if clips is not None and set(shown) & set(SUFFIXES):
        out.append(f"heads and trunks: {clips} evenly spaced seconds of a video's embeddings, all where it has fewer")
    if set(shown) & set(BLOCKS):
        out.append(f"blocks: maps averaged over time and space, {clips or CLIPS} evenly spaced clips of a video, each "
                   "to unit length, mean, unit length; sound tiled over its end")  # fmt: skip
    if protocols:
        from benchmarks.protocols import protocol, what_differs

        out += [what_differs(protocol(name), store) for name in protocols]
    if published is not None:
        out.append(f"published: theirs, {published} split 1 in full, their pre-training; not measured here. unchecked: "
                   "as remembered in the notes that this project began with")  # fmt: skip
    return out


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


def random_encoders(
    results: Rankings,
    store: Store,
    paths: dict[str, Path],
    everyone: np.ndarray,
    asked: list[Sides],
    labels: dict[int, str],
    levels: Sequence[str],
    seeds: int,
    ks: Sequence[int],
    progress: Progress,
    notes: list[str],
    *,
    shown: Sequence[str] = DEFAULT,
    clips: int | None = None,
    protocols: Sequence[str] = (),
    kept: Kept | None = None,
    device: str = "auto",
) -> None:
    """Encoders of the runs' shape with random weights, `seeds` of them for each different kind of network and clip:
    equal ones twice would look like a spread of 0."""
    if not seeds:
        return
    from trainers.run import Run

    done: set[str] = set()
    for run, path in paths.items():
        try:
            opened = Run(path)
            shape = shape_of(opened)
        except AvstoreError:
            notes.append(f"no random-weight control for {run}: its folder is not there")
            continue
        if shape in done:
            continue
        done.add(shape)
        for seed in range(seeds):
            progress(f"random weights, seed {seed}", seed, seeds)
            networks = Networks(opened, store, everyone, "random", seed=seed, device=device, kept=kept)
            for suffix, features in _computed(networks, shown, clips, protocols, progress):
                theirs = suffix.startswith(" as ")
                for sides in asked:
                    pairs = ("v-v",) if theirs else PAIRS if not suffix else WITHIN
                    its = ("class",) if theirs else levels
                    results.score(f"random weights{suffix}", features, sides, labels, its, pairs, ks)


__all__ = ["ACROSS", "BLOCKS", "DEFAULT", "HEADS", "LEVELS", "PAIRS", "SHOWN", "TRUNKS", "Features", "Sides",
           "choose_sides", "method_of", "random_encoders", "raw_as_features", "retrieval", "run_features", "trained_on",
           "unseen"]  # fmt: skip
