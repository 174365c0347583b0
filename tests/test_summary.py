"""Summaries and their agreement with people: hand-worked numbers, brute force, scipy."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn.metrics import f1_score

from avstore.errors import UsageError
from benchmarks.summary import (
    agreement,
    f_score,
    frame_scores,
    knapsack,
    rank_correlation,
    summary_of,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 12)), min_size=1, max_size=9), st.integers(0, 40))
def test_knapsack_is_as_good_as_trying_everything(items, capacity):
    values, lengths = np.array([v for v, _ in items], float), np.array([w for _, w in items])
    chosen = knapsack(values, lengths, capacity)
    assert lengths[chosen].sum() <= capacity
    best = max(
        sum(v for v, take in zip(values, takes, strict=True) if take)
        for takes in product((0, 1), repeat=len(items))
        if sum(w for w, take in zip(lengths, takes, strict=True) if take) <= capacity
    )
    assert values[chosen].sum() == best


def test_knapsack_agrees_with_an_integer_programme():
    rng = np.random.default_rng(0)
    for _ in range(5):
        values, lengths = rng.random(40), rng.integers(20, 200, 40)
        capacity = int(0.15 * lengths.sum())
        solved = milp(-values, constraints=LinearConstraint(lengths[None], 0, capacity), integrality=np.ones(40),
                      bounds=Bounds(0, 1))  # fmt: skip
        chosen = knapsack(values, lengths, capacity)
        assert values[chosen].sum() == pytest.approx(-solved.fun, rel=1e-6)
        assert lengths[chosen].sum() <= capacity


def test_scores_hold_until_the_next_pick():
    assert frame_scores(np.array([1.0, 2.0, 3.0]), np.array([1, 3, 4]), 7).tolist() == [1, 1, 1, 2, 3, 3, 3]
    with pytest.raises(UsageError, match="ascend"):
        frame_scores(np.array([1.0, 2.0]), np.array([3, 3]), 7)
    with pytest.raises(UsageError, match="2 scores for 1"):
        frame_scores(np.array([1.0, 2.0]), np.array([3]), 7)


def test_a_summary_takes_the_best_segments_that_fit():
    scores = np.repeat([0.1, 0.9, 0.5, 0.8], 10)
    segments = np.array([[0, 9], [10, 19], [20, 29], [30, 39]])
    got = summary_of(scores, segments, share=0.5)
    assert np.flatnonzero(got).tolist() == [*range(10, 20), *range(30, 40)]
    assert not summary_of(scores, segments, share=0.15).any()  # 6 frames hold no segment of 10
    assert summary_of(scores, segments, capacity=10).sum() == 10
    with pytest.raises(UsageError, match="overlap"):
        summary_of(scores, np.array([[0, 10], [10, 39]]))
    with pytest.raises(UsageError, match="inside"):
        summary_of(scores, np.array([[0, 40]]))


def test_f_of_identical_disjoint_and_half_summaries():
    a = np.array([1, 1, 0, 0, 0, 0], bool)
    assert f_score(a, a) == 1.0
    assert f_score(a, ~a) == 0.0
    assert f_score(np.zeros(6, bool), a) == 0.0
    # one of two chosen frames is right, one of three wanted is found: 2 / (2 + 3)
    assert f_score(a, np.array([0, 1, 1, 1, 0, 0], bool)) == pytest.approx(0.4)
    both = agreement(a, np.array([a, ~a]))
    assert (both.best, both.mean) == (1.0, 0.5)
    with pytest.raises(UsageError, match="0 and 1"):
        f_score(np.full(6, 0.5), a)
    with pytest.raises(UsageError, match="one video"):
        f_score(a, a[:3])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_f_is_that_of_scikit_learn(frames):
    a, b = (np.array(x, bool) for x in zip(*frames, strict=True))
    assert f_score(a, b) == pytest.approx(f1_score(b, a, zero_division=0))
    assert f_score(a, b) == f_score(b, a)
    assert agreement(a, np.array([b, ~b])).mean == pytest.approx(
        (f1_score(b, a, zero_division=0) + f1_score(~b, a, zero_division=0)) / 2
    )


def test_rank_correlations_of_orders():
    up = np.arange(6.0)
    assert rank_correlation(up, np.array([up, 2 * up])) == (pytest.approx(1.0), pytest.approx(1.0))
    assert rank_correlation(up, np.array([-up])) == (pytest.approx(-1.0), pytest.approx(-1.0))
    # one swap of neighbours of six: tau = 1 - 2 * 1 / 15, rho = 1 - 6 * 2 / (6 * 35)
    tau, rho = rank_correlation(up, np.array([[1.0, 0, 2, 3, 4, 5]]))
    assert (tau, rho) == (pytest.approx(1 - 2 / 15), pytest.approx(1 - 12 / 210))
    assert rank_correlation(up, np.ones((1, 6))) == (0.0, 0.0)
