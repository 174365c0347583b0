"""The rankings of a retrieval, and the table that they become: means and spread over runs, seeds and splits, each split
by itself, and a paired test for each two runs.

A ranking is of one kind of features, level, pair of modalities, and one asking: (the sides asked, 0 for the first run
or seed that asked them, 1 for the next). Two kinds are compared over the askings that they share; where that is one,
over its queries.
Not here: who asks (`sides.py`), with what (`vectors.py`), and how ranks are counted (`rank.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import paired
from benchmarks.rank import Ranking, chance, rank
from benchmarks.sides import Sides
from benchmarks.table import Table
from benchmarks.vectors import ACROSS, PAIRS, Features

if TYPE_CHECKING:
    from avstore.store import Store

LEVELS = ("class", "instance")
Asking = tuple[str, int]


@dataclass
class Rankings:
    """Rankings by (features, level, pair), each by its asking. `extra`: columns of all rows of some features, such as
    the step of a checkpoint."""

    found: dict[tuple[str, str, str], dict[Asking, Ranking]] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, level: str, pair: str, ranking: Ranking, sides: str) -> None:
        mine = self.found.setdefault((name, level, pair), {})
        mine[sides, sum(s == sides for s, _ in mine)] = ranking

    def score(
        self,
        name: str,
        features: Features,
        sides: Sides,
        labels: dict[int, str],
        levels: Sequence[str],
        pairs: Sequence[str],
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
                ql, gl = _relevance(level, qn, gn, labels)
                made = rank(qv, gv, ql, gl, ks=ks, by=features.by)
                self.add(name, level, pair, made, sides.description)

    def add_chance(
        self, store: Store, sides: Sides, labels: dict[int, str], levels: Sequence[str], ks: Sequence[int]
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
                    ql, gl = _relevance(level, qn, gn, labels)
                    self.add("chance", level, pair, chance(ql, gl, ks=ks), sides.description)

    def rows(self, levels: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """(rows in the order: level, pair, features as they were added; queries without a relevant item by level and
        pair)."""
        rows, lacking = [], {}
        for level in levels:
            for pair in PAIRS:
                for (name, of_level, of_pair), found in self.found.items():
                    if (of_level, of_pair) != (level, pair):
                        continue
                    row, unmatched = _row(level, pair, name, found)
                    rows.append(row | self.extra.get(name, {}))
                    if unmatched:
                        lacking[f"{level} {pair}"] = unmatched
        return rows, lacking

    def differences(self, kinds: Sequence[Sequence[str]], levels: Sequence[str]) -> list[str]:
        """A line with a paired test of R@k at the smallest k for each two features of one kind (names), level and
        pair."""
        out = []
        for level in levels:
            for pair in PAIRS:
                for names in kinds:
                    there = [n for n in names if (n, level, pair) in self.found]
                    for i, one in enumerate(there):
                        for other in there[i + 1 :]:
                            a, b = self.found[one, level, pair], self.found[other, level, pair]
                            line = _compared(one, other, a, b)
                            out += [f"{level} {pair}, {line}"] if line else []
        return out

    def table(
        self,
        store: Store,
        levels: Sequence[str],
        label: str,
        asked: Sequence[Sides],
        notes: Sequence[str],
        ks: Sequence[int],
        published: Sequence[dict[str, Any]] = (),
        kinds: Sequence[Sequence[str]] = (),
    ) -> Table:
        """The table: rows, published figures after them, what was asked, paired tests of `kinds`."""
        rows, lacking = self.rows(levels)
        names = [f"R@{k}" for k in ks if any(f"R@{k}" in r for r in rows)]
        parts = ("R@1 of parts",) if any(r.get("R@1 of parts") for r in rows) else ()
        columns = ("level", "pair", "features", *names, "mAP", "MRR", "sd R@1", *parts, "queries", "gallery", "of")
        counts = ", ".join(f"{s.description}: {len(s.queries)} queries, gallery {len(s.gallery)}" for s in asked[:3])
        told = [
            f"class = {label}; {counts}{', ...' if len(asked) > 3 else ''}",
            "R@k: share of queries with a relevant item among the k nearest. instance: the query's own other modality"
            " among all queries' videos. sd: over `of` runs, seeds, splits or folds. chance: exact expectation of a"
            " random order",
            *(f"{n} queries have no relevant item in the gallery ({w}): they count as misses"
              for w, n in lacking.items()),
            *dict.fromkeys(notes),
            *self.differences(kinds, levels),
        ]  # fmt: skip
        return Table(f"retrieval in {store.path}", columns, [*rows, *published], tuple(told))


def _relevance(level: str, qn: np.ndarray, gn: np.ndarray, labels: dict[int, str]) -> tuple[list[Any], list[Any]]:
    if level == "class":
        return [labels[int(n)] for n in qn], [labels[int(n)] for n in gn]
    return qn.tolist(), gn.tolist()


def _never_zero(x: np.ndarray) -> np.ndarray:
    """Raw features of a black or silent clip may be all equal: such rows get a direction of their own, the same for
    all, instead of failing the bench."""
    x = np.concatenate([x, np.zeros((len(x), 1), x.dtype)], axis=1)
    x[np.abs(x).max(axis=1) < 1e-12, -1] = 1.0
    return x


def _row(level: str, pair: str, name: str, found: dict[Asking, Ranking]) -> tuple[dict[str, Any], int]:
    each = [r.values() for r in found.values()]
    shared = [k for k in each[0] if all(k in e for e in each)]
    spread = {k: float(np.std([e[k] for e in each], ddof=1)) for k in shared} if len(each) > 1 else None
    by_sides: dict[str, list[float]] = {}
    for (sides, _), e in zip(found, each, strict=True):
        by_sides.setdefault(sides, []).append(e.get("R@1", float("nan")))
    of_parts = tuple(round(float(np.mean(v)), 3) for v in by_sides.values())

    def span(values: list[int]) -> int | str:
        return values[0] if len(set(values)) == 1 else f"{min(values)}-{max(values)}"

    row = {
        "level": level,
        "pair": pair,
        "features": name,
        **{k: float(np.mean([e[k] for e in each])) for k in shared},
        "sd R@1": spread["R@1"] if spread and "R@1" in spread else None,
        "sd": spread,
        "R@1 of parts": of_parts if len(of_parts) > 1 and "R@1" in shared else None,
        "queries": span([r.queries for r in found.values()]),
        "gallery": span([r.gallery for r in found.values()]),
        "of": len(found),
    }
    return row, sum(r.unmatched for r in found.values())


def _compared(one: str, other: str, a: dict[Asking, Ranking], b: dict[Asking, Ranking]) -> str:
    """Over the askings that both share, else over the queries of the only one; "" where there is nothing to pair."""
    common = [asking for asking in a if asking in b]
    ks = [set(r.recall) for found in (a, b) for r in (found[c] for c in common)]
    k = min(set.intersection(*ks), default=None) if ks else None
    if k is None:
        return ""
    if len(common) > 1:
        values = {n: [found[c].recall[k] for c in common] for n, found in ((one, a), (other, b))}
        what = "splits" if len({s for s, _ in common}) == len(common) else "splits and runs"
        return f"R@{k}: {paired.lines(values, what)[0]}"
    x, y = a[common[0]].first, b[common[0]].first
    if len(x) != len(y) or len(x) < 2:
        return ""
    hits = {n: ((f > 0) & (f <= k)).astype(float).tolist() for n, f in ((one, x), (other, y))}
    line = paired.lines(hits, "queries")[0]
    return f"R@{k}: {line} (of these queries; it says nothing of other seeds)"
