"""Change points: planted ones are found, and the programme is as good as trying everything."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore.errors import UsageError
from benchmarks.kts import best_cuts, change_points, scatters, segments_of


def test_the_scatter_of_a_segment_is_its_squared_distance_to_its_mean():
    x = np.random.default_rng(0).normal(size=(9, 3))
    got = scatters(x)
    for i in range(9):
        for j in range(i + 1, 10):
            part = x[i:j]
            assert got[i, j] == pytest.approx(((part - part.mean(0)) ** 2).sum(), abs=1e-10)
    assert (got[np.tril_indices(10)] == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_it_is_as_good_as_trying_every_set_of_cuts(n, seed):
    cost = scatters(np.random.default_rng(seed).normal(size=(n, 2)))
    totals, cuts = best_cuts(cost, n - 1)
    for m in range(n):
        tried = []
        for chosen in combinations(range(1, n), m):
            ends = [0, *chosen, n]
            tried.append(sum(cost[a, b] for a, b in pairwise(ends)))
        assert totals[m] == pytest.approx(min(tried), abs=1e-9)
        ends = [0, *cuts[m].tolist(), n]
        assert sorted(set(ends)) == ends
        assert sum(cost[a, b] for a, b in pairwise(ends)) == pytest.approx(totals[m], abs=1e-9)


@pytest.mark.parametrize("planted", [[], [20], [7, 30, 31, 55], [10, 20, 30, 40, 50]])
def test_planted_change_points_are_found(planted):
    rng = np.random.default_rng(1)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    which = np.searchsorted(planted, np.arange(60), side="right")
    x = centres[which] + 0.02 * rng.normal(size=(60, 16))
    assert change_points(x).tolist() == planted
    assert change_points(x, most=3).size <= 3


def test_noise_has_no_change_point_and_neither_has_one_frame():
    x = np.ones((40, 8)) + 0.05 * np.random.default_rng(2).normal(size=(40, 8))
    assert change_points(x).size == 0
    assert change_points(np.ones((1, 4))).size == 0
    assert change_points(np.zeros((5, 4))).size == 0


def test_segments_cover_every_frame_once():
    got = segments_of(np.array([2, 5]), n_frames=100, stride=15)
    assert got.tolist() == [[0, 29], [30, 74], [75, 99]]
    assert segments_of(np.array([], np.int64), 7).tolist() == [[0, 6]]
    assert segments_of(np.array([1, 2]), n_frames=20, stride=15).tolist() == [[0, 14], [15, 19]]


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(UsageError, match="not finite"):
        change_points(np.array([[np.nan, 0.0], [1.0, 0.0]]))
    with pytest.raises(UsageError, match="shape"):
        change_points(np.zeros(4))
    with pytest.raises(UsageError, match="vmax"):
        change_points(np.zeros((4, 2)), vmax=-1)
