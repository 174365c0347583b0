"""Retrieval by example: R@k, mAP and MRR from sight to sight, sound to sound, and across, with controls.

Protocol (methods.md 6.3, declared): embeddings of one centre-cropped clip per second, each L2-normalised, averaged per
video, normalised again, cosine. Class level: gallery = train split, queries = test split, an item is relevant when its
label is the query's. Instance level: queries and gallery are the same videos, each looks for its own other modality
(v-a and a-v only: within a modality a video would find itself).

Controls stand in the same table: chance (exact expectation), encoders of the same shape with random weights, and raw
pixels, motion and spectrograms (benchmarks.raw). Not here: how ranks are counted (benchmarks.rank).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import AvstoreError, NotFoundError, UsageError
from avstore.index import embedded_runs, read_rows, video_means
from benchmarks.rank import KS, Ranking, chance, folds, rank
from benchmarks.raw import BOTH, SIGHT, SOUND, Raw, raw_features
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store

PAIRS = ("v-v", "a-a", "v-a", "a-v")
ACROSS = ("v-a", "a-v")
LEVELS = ("class", "instance")
HEADS = {"v": "video", "a": "audio"}
TRUNKS = {"v": "video-trunk", "a": "audio-trunk"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Sides:
    """Video numbers of queries and gallery, int64, and how they were chosen."""

    queries: np.ndarray
    gallery: np.ndarray
    description: str


@dataclass(frozen=True)
class Features:
    """Vectors by modality ('v', 'a') for the videos `numbers` by modality; `centre`: take the gallery's mean off."""

    vectors: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    centre: bool = False

    def of(self, modality: str, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(vectors, numbers) of those of `wanted` that have the modality."""
        have = self.numbers[modality]
        order = np.argsort(have, kind="stable")
        at = np.searchsorted(have[order], wanted)
        found = (at < len(have)) & (
            have[order][np.minimum(at, max(0, len(have) - 1))] == wanted if len(have) else False
        )
        rows = order[at[found]]
        return self.vectors[modality][rows], wanted[found]


@dataclass
class _Results:
    """Rankings by (features, level, pair), one for each run, seed and fold."""

    rankings: dict[tuple[str, str, str], list[Ranking]] = field(default_factory=dict)
    cases: dict[str, set[str]] = field(default_factory=dict)

    def add(self, name: str, level: str, pair: str, ranking: Ranking, case: str) -> None:
        self.rankings.setdefault((name, level, pair), []).append(ranking)
        self.cases.setdefault(name, set()).add(case)


def choose_sides(
    store: Store,
    *,
    gallery: Sequence[str] = (),
    queries: Sequence[str] = (),
    fold_count: int | None = None,
    fold_seed: int = 0,
    label: str = "label",
    **selection: Any,
) -> list[Sides]:
    """Queries and gallery: the conditions given; else `fold_count` stratified folds of the selection (each in turn the
    queries, the rest the gallery); else test and train split. UsageError where the store has no such splits."""
    if fold_count is not None:
        if gallery or queries:
            raise UsageError("--folds with --gallery or --queries", "folds are made of one selection", "use --where")
        numbers = store.select(**selection).numbers
        which = folds([store.key(int(n)) for n in numbers], store.column(label, numbers), fold_count, fold_seed)
        return [
            Sides(numbers[which == f], numbers[which != f], f"fold {f} of {fold_count}, seed {fold_seed}")
            for f in range(fold_count)
        ]
    where = list(selection.pop("where", ()))
    if not gallery and not queries:
        splits = {str(s) for s in store.column("split") if s is not None} if "split" in store.columns else set()
        train, test = splits & {"train", "training"}, splits & {"test", "testing"}
        if not train or not test:
            raise UsageError(
                f"{store.path} has no train and test split",
                f"its splits: {', '.join(sorted(splits)) or 'none'}",
                "--gallery COLUMN=VALUE --queries COLUMN=VALUE, or --folds 5",
            )
        gallery, queries = [f"split={','.join(sorted(train))}"], [f"split={','.join(sorted(test))}"]
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


def run_features(store: Store, run: str) -> dict[str, Features]:
    """`run` (heads) and `run trunks` from the embeddings in the store."""
    towers = embedded_runs(store)[run]
    out = {}
    for suffix, names in (("", HEADS), (" trunks", TRUNKS)):
        there = {m: t for m, t in names.items() if t in towers}
        if there:
            means = {m: video_means(store, read_rows(store, run, t)) for m, t in there.items()}
            out[suffix] = Features({m: v for m, (v, _) in means.items()}, {m: n for m, (_, n) in means.items()})
    if not out:
        raise NotFoundError(
            f"run {run} has no video or audio embeddings in {store.path}",
            f"it has {', '.join(towers)}",
            f"avstore embed RUN {store.path}",
        )
    return out


def score(
    results: _Results,
    name: str,
    features: Features,
    sides: Sides,
    labels: dict[int, str],
    levels: Sequence[str],
    pairs: Sequence[str],
    case: str,
    ks: Sequence[int],
) -> None:
    """Ranks one kind of features and adds what comes out."""
    for pair in pairs:
        q, g = pair.split("-")
        if q not in features.vectors or g not in features.vectors:
            continue
        for level in levels:
            if level == "instance" and pair not in ACROSS:
                continue
            against = sides.gallery if level == "class" else sides.queries
            qv, qn = features.of(q, sides.queries)
            gv, gn = features.of(g, against)
            if not len(qn) or not len(gn):
                continue
            if features.centre:
                reference = {m: features.of(m, sides.gallery)[0] for m in {q, g}}
                if any(len(r) < 2 for r in reference.values()):
                    continue
                qv, gv = qv - reference[q].mean(axis=0), gv - reference[g].mean(axis=0)
                qv, gv = _never_zero(qv), _never_zero(gv)
            ql = [labels[int(n)] for n in qn] if level == "class" else qn.tolist()
            gl = [labels[int(n)] for n in gn] if level == "class" else gn.tolist()
            results.add(name, level, pair, rank(qv, gv, ql, gl, ks=ks), case)


def _never_zero(x: np.ndarray) -> np.ndarray:
    """Raw features of a black or silent clip may be all equal: such rows get a direction of their own, the same for
    all, instead of failing the bench."""
    x = np.concatenate([x, np.zeros((len(x), 1), x.dtype)], axis=1)
    x[np.abs(x).max(axis=1) < 1e-12, -1] = 1.0
    return x


def raw_as_features(raw: Raw) -> dict[str, tuple[Features, tuple[str, ...]]]:
    """Name -> (features, pairs) of the raw controls."""
    out: dict[str, tuple[Features, tuple[str, ...]]] = {}
    for names, modality in ((SIGHT, "v"), (SOUND, "a")):
        for name in names:
            if name in raw.features:
                f = Features({modality: raw.features[name]}, {modality: raw.numbers[name]}, centre=True)
                out[name] = (f, (f"{modality}-{modality}",))
    if f"{BOTH}:v" in raw.features:
        parts = {m: f"{BOTH}:{m}" for m in ("v", "a")}
        out[BOTH] = (
            Features(
                {m: raw.features[p] for m, p in parts.items()}, {m: raw.numbers[p] for m, p in parts.items()}, True
            ),
            ACROSS,
        )
    return out


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
    seeds: int = 1,
    raw: bool = True,
    each: bool = False,
    ks: Sequence[int] = KS,
    run_paths: dict[str, Path] | None = None,
    progress: Progress = lambda stage, done, total: None,
    **selection: Any,
) -> Table:
    """The table of retrieval for runs that have embeddings in the store.

    Runs of one method are one row, mean and spread (standard deviation) over them, unless `each`. With `fold_count`
    every run is asked those folds that it was not trained on, by its snapshot. `seeds`: random-weight encoders per
    configuration, 0 for none. `run_paths`: where the runs' folders are (default: runs/<name>).
    """
    levels = tuple(dict.fromkeys(levels))
    for level in levels:
        if level not in LEVELS:
            raise UsageError(f"no level {level!r}", f"there is: {', '.join(LEVELS)}")
    if seeds < 0:
        raise UsageError(f"{seeds} seeds", "0 or more")
    all_sides = choose_sides(
        store, gallery=gallery, queries=queries, fold_count=fold_count, fold_seed=fold_seed, label=label, **selection
    )
    everyone = np.unique(np.concatenate([np.concatenate([s.queries, s.gallery]) for s in all_sides]))
    values = store.column(label, everyone)
    empty = [int(n) for n, v in zip(everyone, values, strict=True) if v in (None, "")]
    if empty and "class" in levels:
        raise UsageError(
            f"{len(empty)} of {len(everyone)} videos have no {label}",
            f"e.g. {store.key(empty[0])}",
            f"--where {label}!= leaves them out; --label names another column; --instance needs none",
        )
    labels = {int(n): str(v) for n, v in zip(everyone, values, strict=True)}
    results, notes = _Results(), list[str]()
    used: set[int] = set()
    for run in runs:
        path = (run_paths or {}).get(run, Path("runs") / run)
        trained = trained_on(path, store)
        method = method_of(store, run)
        mine, leaking = unseen(all_sides, trained)
        if leaking:
            notes.append(f"{run} was trained on {leaking} of the queries")
        if trained is None:
            notes.append(f"{run}: {_why_unknown(path, store)}")
        used |= {i for i, s in enumerate(all_sides) if s in mine}
        for suffix, features in run_features(store, run).items():
            for i, sides in enumerate(mine):
                progress(run, i + 1, len(mine))
                name = (run if each or method is None else method) + suffix
                pairs: tuple[str, ...] = PAIRS if not suffix else ("v-v", "a-a")
                score(results, name, features, sides, labels, levels, pairs, f"{run}/{sides.description}", ks)
                notes += _left_out(store, name, features, sides)
    asked = [s for i, s in enumerate(all_sides) if i in used] or all_sides
    random_encoders(results, store, runs, run_paths or {}, everyone, asked, labels, levels, seeds, ks, progress, notes)
    if raw:
        found = raw_features(store, everyone, lambda done, total: progress("raw controls", done, total))
        for name, (features, its_pairs) in raw_as_features(found).items():
            for sides in asked:
                score(results, name, features, sides, labels, levels, its_pairs, sides.description, ks)
    for sides in asked:
        add_chance(results, store, sides, labels, levels, ks)
    return as_table(store, results, levels, label, asked, notes, ks)


def add_chance(
    results: _Results, store: Store, sides: Sides, labels: dict[int, str], levels: Sequence[str], ks: Sequence[int]
) -> None:
    """What a random order would give, for the videos that have what a pair needs."""
    have = {"v": store.has_picture, "a": store.has_sound}
    for level in levels:
        for pair in PAIRS if level == "class" else ACROSS:
            q, g = pair.split("-")
            qn = sides.queries[have[q][sides.queries]]
            against = sides.gallery if level == "class" else sides.queries
            gn = against[have[g][against]]
            if len(qn) and len(gn):
                ql = [labels[int(n)] for n in qn] if level == "class" else qn.tolist()
                gl = [labels[int(n)] for n in gn] if level == "class" else gn.tolist()
                results.add("chance", level, pair, chance(ql, gl, ks=ks), sides.description)


def trained_on(path: Path, store: Store) -> np.ndarray | None:
    """Numbers of the videos that a run was trained on; None where its folder is not to be found, or is of another
    store."""
    from trainers.run import Run

    try:
        snapshot = Run(path).snapshot
    except AvstoreError:
        return None
    return snapshot.numbers if snapshot.fingerprint == store.fingerprint else None


def _why_unknown(path: Path, store: Store) -> str:
    """Why `trained_on` does not know."""
    from trainers.run import Run

    try:
        there = Run(path).snapshot.store
    except AvstoreError:
        return f"its folder is not at {path}, so what it was trained on is unknown"
    return f"trained on another store, {Path(there).name}; whether these videos were in it is not known"


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


def unseen(all_sides: list[Sides], trained: np.ndarray | None) -> tuple[list[Sides], int]:
    """The sides whose queries a run has not been trained on; where there are none, all, and how many it has seen."""
    if trained is None:
        return all_sides, 0
    seen = [int(np.isin(s.queries, trained).sum()) for s in all_sides]
    fresh = [s for s, n in zip(all_sides, seen, strict=True) if not n]
    return (fresh, 0) if fresh else (all_sides, sum(seen))


def random_encoders(
    results: _Results,
    store: Store,
    runs: Sequence[str],
    run_paths: dict[str, Path],
    everyone: np.ndarray,
    asked: list[Sides],
    labels: dict[int, str],
    levels: Sequence[str],
    seeds: int,
    ks: Sequence[int],
    progress: Progress,
    notes: list[str],
) -> None:
    """Encoders of the runs' shape with random weights, `seeds` of them for each different kind of network and clip:
    equal ones twice would look like a spread of 0."""
    if not seeds:
        return
    from benchmarks.blocks import with_weights
    from benchmarks.finetune import weights_digest
    from trainers.embed import embed_random
    from trainers.fit import needs_of
    from trainers.run import Run

    done: set[str] = set()
    for run in runs:
        try:
            opened = Run(run_paths.get(run, Path("runs") / run))
            needs = dataclasses.replace(needs_of(opened.config), labels=False, max_offset=0.0, copies=1)
            shape = f"{weights_digest(with_weights(opened, 'random', 0))} {needs}"
        except AvstoreError:
            notes.append(f"no random-weight control for {run}: its folder is not there")
            continue
        if shape in done:
            continue
        done.add(shape)
        for seed in range(seeds):
            progress(f"random weights, seed {seed}", seed, seeds)
            found = embed_random(opened, store, everyone, seed=seed)
            for suffix, names in (("", HEADS), (" trunks", TRUNKS)):
                there = {m: found[t] for m, t in names.items() if t in found}
                features = Features({m: v for m, (v, _) in there.items()}, {m: n for m, (_, n) in there.items()})
                for sides in asked:
                    pairs: tuple[str, ...] = PAIRS if not suffix else ("v-v", "a-a")
                    name = f"random weights{suffix}"
                    score(
                        results, name, features, sides, labels, levels, pairs, f"{run}/{seed}/{sides.description}", ks
                    )


def as_table(
    store: Store,
    results: _Results,
    levels: Sequence[str],
    label: str,
    asked: list[Sides],
    notes: list[str],
    ks: Sequence[int],
) -> Table:
    """Rows in the order: level, pair, features as they were added, chance last."""
    rows = []
    smallest = {}
    for level in levels:
        for pair in PAIRS:
            for (name, of_level, of_pair), found in results.rankings.items():
                if (of_level, of_pair) != (level, pair):
                    continue
                each = [r.values() for r in found]
                shared = [k for k in each[0] if all(k in e for e in each)]
                mean = {k: float(np.mean([e[k] for e in each])) for k in shared}
                spread = {k: float(np.std([e[k] for e in each], ddof=1)) for k in shared} if len(each) > 1 else None
                unmatched = sum(r.unmatched for r in found)
                if unmatched:
                    smallest[f"{level} {pair}"] = unmatched
                rows.append(
                    {
                        "level": level,
                        "pair": pair,
                        "features": name,
                        **mean,
                        "sd R@1": spread["R@1"] if spread and "R@1" in spread else None,
                        "sd": spread,
                        "queries": found[0].queries if len({r.queries for r in found}) == 1 else
                        f"{min(r.queries for r in found)}-{max(r.queries for r in found)}",
                        "gallery": found[0].gallery if len({r.gallery for r in found}) == 1 else
                        f"{min(r.gallery for r in found)}-{max(r.gallery for r in found)}",
                        "of": len(found),
                    }
                )  # fmt: skip
    names = [f"R@{k}" for k in ks if any(f"R@{k}" in r for r in rows)]
    columns = ("level", "pair", "features", *names, "mAP", "MRR", "sd R@1", "queries", "gallery", "of")
    counts = ", ".join(f"{s.description}: {len(s.queries)} queries, gallery {len(s.gallery)}" for s in asked[:3])
    told = [
        f"class = {label}; {counts}{', ...' if len(asked) > 3 else ''}",
        "R@k: share of queries with a relevant item among the k nearest. instance: the query's own other modality among"
        " all queries' videos. sd: over `of` runs, seeds or folds. chance: exact expectation of a random order",
        *(f"{n} queries have no relevant item in the gallery ({w}): they count as misses" for w, n in smallest.items()),
        *dict.fromkeys(notes),
    ]
    return Table(f"retrieval in {store.path}", columns, rows, tuple(told))
