"""The index: exact answers against brute force, best seconds, measured recall, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore.errors import UsageError
from avstore.index import Index, normalised


def brute(rows: np.ndarray, video: np.ndarray, second: np.ndarray, query: np.ndarray, k: int) -> list[tuple[int, int]]:
    scores = normalised(rows).astype(np.float64) @ (query / np.linalg.norm(query))
    best: dict[int, tuple[float, int]] = {}
    for s, v, t in zip(scores, video.tolist(), second.tolist(), strict=True):
        if v not in best or s > best[v][0]:
            best[v] = (s, t)
    return [(v, t) for v, (_, t) in sorted(best.items(), key=lambda item: -item[1][0])[:k]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40))
def test_search_is_brute_force(seed: int, k: int, videos: int) -> None:
    rng = np.random.default_rng(seed)
    video = np.sort(rng.integers(0, videos, 120))
    second = np.arange(120) - np.searchsorted(video, video)
    rows = rng.normal(size=(120, 7))
    queries = rng.normal(size=(3, 7))
    index = Index(rows, video, second)
    for query, hits in zip(queries, index.search(queries, k), strict=True):
        assert [(h.video, h.second) for h in hits] == brute(rows, video, second, query, k)
        assert all(a.score >= b.score for a, b in itertools.pairwise(hits))


def test_one_long_video_does_not_crowd_out_the_others() -> None:
    """The 500 best rows all belong to video 0: the search must go on until k videos are found."""
    rng = np.random.default_rng(0)
    near = np.tile([1.0, 0, 0], (500, 1)) + 0.001 * rng.normal(size=(500, 3))
    far = np.array([[0.5, 0.8, 0.1], [0.1, 1, 0]])
    index = Index(np.concatenate([near, far]), np.array([0] * 500 + [7, 9]), np.array([*range(500), 3, 4]))
    hits = index.search(np.array([1.0, 0, 0]), 3)[0]
    assert [(h.video, h.second) for h in hits][1:] == [(7, 3), (9, 4)]
    assert index.search(np.array([1.0, 0, 0]), 3, without=0)[0][0].video == 7


def test_scores_are_cosines_whatever_the_length() -> None:
    index = Index(np.array([[3.0, 4.0], [-5.0, 0.0]], np.float16), np.array([4, 2]))
    hits = index.search(np.array([[0.6, 0.8]]) * 100, 5)[0]
    assert [(h.video, h.second) for h in hits] == [(4, 0), (2, 0)]
    assert [h.score for h in hits] == pytest.approx([1.0, -0.6], abs=1e-6)


def test_the_approximate_kind_measures_its_recall() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(3000, 16)).astype(np.float32)
    video = np.arange(3000)
    poor = Index(rows, video, kind="ivf", cells=64, probes=1)
    rich = Index(rows, video, kind="ivf", cells=64, probes=64)
    exact = Index(rows, video)
    assert exact.recall is None and poor.recall is not None
    assert rich.recall == 1.0 and 0.1 < poor.recall < 0.95
    # the number that it states is what one measures from outside on all rows
    true, found = exact.nearest_rows(rows[:500], 10)[1], poor.nearest_rows(rows[:500], 10)[1]
    outside = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)])
    assert poor.recall == pytest.approx(outside, abs=0.06)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    rows = np.ones((4, 3), np.float32)
    rows[2, 1] = bad
    with pytest.raises(UsageError, match=r"1 of 4 .* not finite"):
        Index(rows, np.arange(4))
    index = Index(np.ones((4, 3)), np.arange(4))
    with pytest.raises(UsageError, match="not finite"):
        index.search(rows[2], 1)


def test_refuses_nonsense() -> None:
    index = Index(np.ones((4, 3)), np.arange(4))
    for call in (
        lambda: Index(np.zeros((0, 3)), np.zeros(0)),
        lambda: Index(np.zeros((2, 3)), np.arange(2)),
        lambda: Index(np.ones((4, 3)), np.arange(3)),
        lambda: Index(np.ones((4, 3)), np.arange(4), kind="hnsw"),
        lambda: Index(np.ones((4, 3)), np.arange(4), kind="ivf", cells=9),
        lambda: index.search(np.ones(2), 1),
        lambda: index.search(np.ones(3), 0),
    ):
        with pytest.raises(UsageError):
            call()
