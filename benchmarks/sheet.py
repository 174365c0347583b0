"""Sheets of retrieval: queries and what is nearest to them, by sight and by sound, with pictures and players.

    page(...)  of  sheet(store, "avid-cma")                 # v-v and a-a examples (CrissCross Fig. 5)
    answers(store, hits, query)                             # `avstore query --html`

The protocol of the sheet is the bench's (`retrieval.py`): means of a video's seconds, cosine, queries = test split,
gallery = train split; without splits each video asks all others. Queries are drawn class by class, by a seed, so that
nobody picks the good ones.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import NotFoundError, UsageError
from avstore.split_words import part_of
from benchmarks.card import Told, card
from benchmarks.page import escaped, section
from benchmarks.retrieval import Features, Sides, choose_sides, run_features

if TYPE_CHECKING:
    from avstore.store import Store

PAIRS = ("v-v", "a-a", "v-a", "a-v")
WORDS = {"v": "sight", "a": "sound"}
SECONDS = 3.0


def sides_of(store: Store, **options: Any) -> tuple[Sides, bool]:
    """(queries and gallery, whether they are the same videos): the bench's, or all videos where the store has no train
    and test split."""
    parts = {part_of(s) for s in store.column("split")} if "split" in store.columns else set()
    asked = {k: v for k, v in options.items() if k in ("gallery", "queries") and v}
    if asked or ("train" in parts and parts & {"test", "evaluation"}):
        return choose_sides(store, **options)[0], False
    chosen = {k: v for k, v in options.items() if k not in ("gallery", "queries", "label")}
    numbers = store.select(**chosen).numbers
    return Sides(numbers, numbers, "each video asks all others"), True


def draw(labels: Sequence[str | None], count: int, seed: int) -> np.ndarray:
    """int64: `count` places in `labels`, one of each class in turn, classes and members in a seeded order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    classes: dict[str, list[int]] = {}
    for i in order.tolist():
        classes.setdefault(str(labels[i]), []).append(i)
    out: list[int] = []
    depth = 0
    while len(out) < min(count, len(labels)):
        out += [members[depth] for members in classes.values() if depth < len(members)]
        depth += 1
    return np.array(out[:count], np.int64)


def nearest(features: Features, pair: str, query: int, gallery: np.ndarray, k: int) -> list[tuple[int, float]]:
    """(video, cosine) of the k nearest in the gallery, the query itself left out; [] where it lacks the modality.
    Ties go to the lower number."""
    q, g = pair.split("-")
    if q not in features.vectors or g not in features.vectors:
        return []
    mine, have = features.of(q, np.array([query], np.int64))
    if not len(have):
        return []
    theirs, numbers = features.of(g, gallery[gallery != query])
    if not len(numbers):
        return []
    a = mine[0] / np.linalg.norm(mine[0])
    b = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    score = b @ a
    order = np.lexsort((numbers, -score))[:k]
    return [(int(numbers[i]), float(score[i])) for i in order]


def sheet(
    store: Store,
    run: str,
    *,
    pairs: Sequence[str] = ("v-v", "a-a"),
    count: int = 6,
    k: int = 5,
    seed: int = 0,
    label: str = "label",
    seconds: float = SECONDS,
    **options: Any,
) -> list[str]:
    """A section of HTML for each pair: `count` queries, each with its `k` nearest. `options`: gallery, queries, where,
    list, as of the bench. UsageError for an unknown pair or no numbers, NotFoundError where no query can be asked."""
    if count < 1 or k < 1:
        raise UsageError(f"{count} queries with {k} answers", "at least one of each")
    for pair in pairs:
        if pair not in PAIRS:
            raise UsageError(f"no pair {pair!r}", f"there is: {', '.join(PAIRS)}")
    sides, same = sides_of(store, label=label, **options)
    features = run_features(store, run).get("")
    if features is None:
        raise NotFoundError(f"run {run} has trunks only in {store.path}", "", f"avstore embed RUN {store.path}")
    labels: dict[int, str | None] = {}
    if label in store.columns:
        every = np.union1d(sides.queries, sides.gallery)
        values = store.column(label, every)
        labels = {int(n): None if v is None else str(v) for n, v in zip(every, values, strict=True)}
    out = []
    for pair in pairs:
        q, g = pair.split("-")
        if q not in features.vectors or g not in features.vectors:
            continue
        able = features.of(q, sides.queries)[1]
        rows, hits, asked = [], 0, 0
        for i in draw([labels.get(int(n)) for n in able], count, seed).tolist():
            query = int(able[i])
            found = nearest(features, pair, query, sides.gallery, k)
            if not found:
                continue
            mine = labels.get(query)
            matches = [None if mine is None else labels.get(n) == mine for n, _ in found]
            hits, asked = hits + sum(m is True for m in matches), asked + len(matches)
            show = {m: {"sight": m == "v", "sound": m == "a"} for m in ("v", "a")}
            cards = [card(store, query, Told(label=mine, asked=True), seconds=seconds, **show[q])]
            cards += [
                card(store, n, Told(r, s, labels.get(n), m), seconds=seconds, **show[g])
                for r, ((n, s), m) in enumerate(zip(found, matches, strict=True), 1)
            ]
            rows.append(f'<div class="row"><div class="cards">{"".join(cards)}</div></div>')
        if not rows:
            continue
        right = f" {hits} of {asked} answers shown are of the query's {label}." if labels else ""
        note = (
            f"{len(rows)} queries drawn class by class (seed {seed}), framed, each with its {k} nearest by cosine; "
            f"{sides.description}.{right}"
        )
        title = f"{WORDS[q].capitalize()} to {WORDS[g]} ({pair}), {run}"
        out.append(section(title, "".join(rows), note))
    if not out:
        raise NotFoundError(
            f"no query can be asked of {run} in {store.path}",
            f"none of its videos has what {', '.join(pairs)} need" + ("" if same else " in both splits"),
            f"avstore embed {run} {store.path}",
        )
    return out


@contextmanager
def as_store(path: Path, like: Store) -> Iterator[Store]:
    """A media file as a store of one video with the spec of `like`, in a temporary folder: what a page needs to show a
    query that was never ingested. UsageError where it cannot be decoded."""
    from avstore.ingest import SPEC_FIELDS, ingest
    from avstore.store import open as open_store

    spec = like.spec
    options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name in SPEC_FIELDS}
    options |= {"front_ends": (), "shard_seconds": 0}
    with tempfile.TemporaryDirectory(prefix="avstore-") as folder:
        summary = ingest(path, Path(folder) / "one", size=(spec.height, spec.width), workers=1, **options)
        if not summary.ok:
            raise UsageError(f"{path} cannot be decoded", str(summary.failures[:1]), "ask with another file")
        with open_store(Path(folder) / "one") as one:
            yield one


def answers(
    store: Store,
    rows: Sequence[dict[str, Any]],
    *,
    query: str,
    query_store: Store,
    query_video: int,
    seconds: float = SECONDS,
) -> list[str]:
    """Sections of a query's page. rows: what `avstore query --json` says (rank, number, second, label, score,
    query_second); query_store, query_video: where the query's own pictures and sound are."""
    best = rows[0]["query_second"] if rows else None
    asked = card(query_store, query_video, Told(asked=True, name=query), second=best, seconds=seconds)
    cards = [
        card(store, r["number"], Told(r["rank"], r["score"], r["label"]), second=r["second"], seconds=seconds)
        for r in rows
    ]
    note = "The second of the query that matches best." if rows else ""
    return [
        section("Query", f'<div class="cards">{asked}</div>', note),
        section(
            "Nearest",
            f'<div class="cards">{"".join(cards)}</div>' if cards else f'<p class="sub">{escaped("nothing found")}</p>',
            "By the largest cosine between any second of the query and any of theirs; each shows the second that "
            "matches. A click on the spectrogram plays the sound.",
        ),
    ]
