"""Ranking metrics: R@k, mAP and MRR of queries against a gallery, what chance gives, and stratified folds.

R@k is the share of queries with at least one relevant item among the k nearest (the literature's retrieval R@k, not
the recall of all relevant items). By cosine, or by Euclidean distance of features as they are (SeLaVi). Pure functions
on arrays; `benchmarks.retrieval` says which videos and features.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from avstore.errors import UsageError
from avstore.index import normalised

KS = (1, 5, 10, 20, 50)
BLOCK = 1 << 25  # scores held at once


@dataclass(frozen=True)
class Ranking:
    """Shares in [0, 1]. `unmatched`: queries with no relevant gallery item; they count as misses everywhere. `first`:
    int64 (Q,), the rank of each query's first relevant item, 0: there is none; empty for an expectation."""

    recall: dict[int, float]
    map: float
    mrr: float
    queries: int
    gallery: int
    unmatched: int
    first: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False)

    def values(self) -> dict[str, float]:
        """{"R@1": ..., "R@5": ..., "mAP": ..., "MRR": ...}."""
        return {**{f"R@{k}": v for k, v in self.recall.items()}, "mAP": self.map, "MRR": self.mrr}


def codes(queries: Sequence[Hashable], gallery: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Labels as int64 codes that both sides share."""
    table = {v: i for i, v in enumerate(dict.fromkeys([*gallery, *queries]))}
    return np.array([table[v] for v in queries], np.int64), np.array([table[v] for v in gallery], np.int64)


def rank(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_labels: Sequence[Any] | np.ndarray,
    gallery_labels: Sequence[Any] | np.ndarray,
    *,
    ks: Sequence[int] = KS,
    without: np.ndarray | None = None,
    seed: int = 0,
    by: Literal["cosine", "euclidean"] = "cosine",
) -> Ranking:
    """Ranks the gallery (G, D) for each query (Q, D) by cosine, or by Euclidean distance of the features as they are;
    an item is relevant when the labels are equal.

    `without`: int64 (Q,), the gallery row that a query must not find (itself), -1: none. Equal scores are ordered by
    a seeded permutation of the gallery, so that a constant feature scores as chance and not by the gallery's order.
    A k beyond the gallery is left out. UsageError for features that are not finite (see `avstore.index.normalised`).
    """
    if by not in ("cosine", "euclidean"):
        raise UsageError(f"no distance {by!r}", "there is: cosine, euclidean")
    q, g = normalised(queries, "query features"), normalised(gallery, "gallery features")
    if by == "euclidean":  # checked above; |q - g|^2 orders as |g|^2 - 2 q g. float64: the squares differ late
        q, g = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    ql, gl = codes(list(query_labels), list(gallery_labels))
    if len(ql) != len(q) or len(gl) != len(g):
        raise UsageError(f"{len(q)} queries with {len(ql)} labels, gallery of {len(g)} with {len(gl)}")
    if not len(q) or not len(g):
        raise UsageError(f"{len(q)} queries and a gallery of {len(g)}", "both need at least one video")
    if q.shape[1] != g.shape[1]:
        raise UsageError(f"queries have {q.shape[1]} dimensions, the gallery {g.shape[1]}")
    perm = np.random.default_rng(seed).permutation(len(g))
    g, gl = g[perm], gl[perm]
    position = np.empty(len(g), np.int64)
    position[perm] = np.arange(len(g))
    size = len(g) - (1 if without is not None and (without >= 0).all() else 0)
    ks = [k for k in ks if k <= size]
    ranks = np.arange(1, len(g) + 1)
    hits = np.zeros(len(ks))
    ap = rr = 0.0
    unmatched = 0
    firsts = []
    squares = (g * g).sum(axis=1) / 2 if by == "euclidean" else None
    step = max(1, BLOCK // len(g))
    for i in range(0, len(q), step):
        scores = q[i : i + step] @ g.T
        if squares is not None:
            scores -= squares
        relevant = ql[i : i + step, None] == gl[None]
        if without is not None:
            own = without[i : i + step]
            rows = np.flatnonzero(own >= 0)
            columns = position[own[rows]]
            scores[rows, columns] = -np.inf  # last, and not relevant there
            relevant[rows, columns] = False
        order = np.argsort(-scores, axis=1, kind="stable")
        found = np.take_along_axis(relevant, order, axis=1)
        count = found.sum(axis=1)
        first = np.where(count > 0, found.argmax(axis=1) + 1, 0)
        firsts.append(first)
        unmatched += int((count == 0).sum())
        hits += [int(((first > 0) & (first <= k)).sum()) for k in ks]
        precision = np.cumsum(found, axis=1) / ranks
        ap += float(((precision * found).sum(axis=1) / np.maximum(count, 1)).sum())
        rr += float((1 / first[first > 0]).sum())
    n = len(q)
    recall = {k: float(h) / n for k, h in zip(ks, hits, strict=True)}
    return Ranking(recall, ap / n, rr / n, n, size, unmatched, np.concatenate(firsts))


def chance(
    query_labels: Sequence[Any] | np.ndarray,
    gallery_labels: Sequence[Any] | np.ndarray,
    *,
    ks: Sequence[int] = KS,
    without: np.ndarray | None = None,
) -> Ranking:
    """What a uniformly random order of the gallery gives, in expectation, exactly.

    With R relevant of N items: P(hit in k) = 1 - C(N-R, k) / C(N, k); E[1 / first] = sum_r P(first = r) / r;
    E[AP] = (H_N + (N - H_N) (R - 1) / (N - 1)) / N, since the item at rank i is relevant with R/N and each of the
    i - 1 before it then with (R - 1)/(N - 1).
    """
    ql, gl = list(query_labels), list(gallery_labels)
    counts = Counter(gl)
    cases: Counter[tuple[int, int]] = Counter()
    for i, label in enumerate(ql):
        own = without is not None and int(without[i]) >= 0
        same = own and without is not None and gl[int(without[i])] == label
        cases[len(gl) - int(own), counts[label] - int(bool(same))] += 1
    size = min(n for n, _ in cases)
    ks = [k for k in ks if k <= size]
    recall, ap, rr = dict.fromkeys(ks, 0.0), 0.0, 0.0
    for (n, r), share in cases.items():
        if not r:
            continue
        weight = share / len(ql)
        miss, first = 1.0, 0.0  # P(no relevant among the first i), E[1 / first]
        misses = []
        for i in range(1, n + 1):
            here = r / (n - i + 1) if n - i + 1 > r else 1.0
            first += miss * here / i
            miss *= 1 - here
            misses.append(miss)
            if not miss:
                break
        for k in ks:
            recall[k] += weight * (1 - (misses[k - 1] if k <= len(misses) else 0.0))
        harmonic = float((1 / np.arange(1, n + 1)).sum())
        ap += weight * (1.0 if n == 1 else (harmonic + (n - harmonic) * (r - 1) / (n - 1)) / n)
        rr += weight * first
    return Ranking(recall, ap, rr, len(ql), size, sum(c for (_, r), c in cases.items() if not r))


def folds(keys: Sequence[str], labels: Sequence[Hashable], n: int, seed: int = 0) -> np.ndarray:
    """The fold, 0 ... n - 1, of each video, int64: the videos of each label are shuffled by the hash of (seed, key) and
    dealt in turn, so that every fold holds its share of every label. Depends on nothing but keys, labels, n and seed;
    each label's dealing starts where the last one ended, so that the folds' sizes differ by at most one."""
    if n < 2:
        raise UsageError(f"{n} folds", "at least 2")
    if len(keys) < n:
        raise UsageError(f"{n} folds of {len(keys)} videos", "each fold needs at least one")
    by_label: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        by_label.setdefault(str(label), []).append(i)
    out = np.empty(len(keys), np.int64)
    dealt = 0
    for label in sorted(by_label):
        members = by_label[label]
        members.sort(key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode("utf-8", "surrogateescape")).digest())
        out[members] = (dealt + np.arange(len(members))) % n
        dealt += len(members)
    return out
