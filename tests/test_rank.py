"""Ranking metrics against numbers worked by hand, brute force and scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from avstore.errors import UsageError
from benchmarks.rank import chance, folds, rank


def test_hand_worked() -> None:
    # on the unit circle, query at 0 degrees; gallery at 10 (b), 20 (a), 30 (b), 40 (a)
    def at(*degrees: float) -> np.ndarray:
        t = np.radians(degrees)
        return np.stack([np.cos(t), np.sin(t)], 1)

    r = rank(at(0), at(10, 20, 30, 40), ["a"], ["b", "a", "b", "a"], ks=(1, 2, 4, 5))
    assert r.recall == {1: 0.0, 2: 1.0, 4: 1.0}  # k = 5 is beyond the gallery
    assert r.map == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert r.mrr == pytest.approx(1 / 2)
    two = rank(at(0, 41), at(10, 20, 30, 40), ["a", "a"], ["b", "a", "b", "a"], ks=(1,))
    assert two.recall[1] == 0.5 and two.mrr == pytest.approx((0.5 + 1) / 2)
    lost = rank(at(0, 41), at(10, 20, 30, 40), ["c", "a"], ["b", "a", "b", "a"], ks=(1,))
    assert lost.unmatched == 1 and lost.recall[1] == 0.5 and lost.mrr == 0.5  # a query without a match is a miss


def test_self_match_is_perfect_and_can_be_left_out() -> None:
    x = np.random.default_rng(0).normal(size=(40, 8))
    ids = np.arange(40)
    assert rank(x, x, ids, ids).recall[1] == 1.0 and rank(x, x, ids, ids).mrr == 1.0
    out = rank(x, x, ids, ids, without=ids)
    assert out.recall[1] == 0.0 and out.unmatched == 40 and out.gallery == 39
    labels = np.repeat(np.arange(2), 20)
    planted = np.eye(8)[labels] + 0.01 * x
    assert rank(planted, planted, labels, labels, without=ids).map == pytest.approx(1.0)


def test_average_precision_is_sklearns() -> None:
    rng = np.random.default_rng(1)
    q, g = rng.normal(size=(30, 6)), rng.normal(size=(200, 6))
    ql, gl = rng.integers(0, 5, 30), rng.integers(0, 5, 200)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    scores = (unit(q) @ unit(g).T).astype(np.float32)
    expected = np.mean([average_precision_score(gl == c, s) for c, s in zip(ql, scores, strict=True)])
    assert rank(q, g, ql, gl).map == pytest.approx(expected, abs=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    q, g = rng.normal(size=(23, 4)), rng.normal(size=(31, 4))
    ql, gl = rng.integers(0, 3, 23), rng.integers(0, 3, 31)
    whole = rank(q, g, ql, gl)
    monkeypatch.setattr("benchmarks.rank.BLOCK", 70)
    parts = rank(q, g, ql, gl)
    assert parts.recall == whole.recall
    assert (parts.map, parts.mrr) == pytest.approx((whole.map, whole.mrr))


def test_random_features_are_at_chance() -> None:
    rng = np.random.default_rng(3)
    ql, gl = np.arange(400) % 8, np.arange(300) % 8
    r = rank(rng.normal(size=(400, 32)), rng.normal(size=(300, 32)), ql, gl)
    c = chance(ql, gl)
    for k in (1, 5, 10):
        p = c.recall[k]
        assert abs(r.recall[k] - p) < 4 * np.sqrt(p * (1 - p) / 400)
    assert abs(r.map - c.map) < 0.01


def test_constant_features_are_at_chance_whatever_the_order_of_the_gallery() -> None:
    """Ties must not be broken by the gallery's order: sorted by class, that would make some classes perfect."""
    ql, gl = np.repeat(np.arange(4), 25), np.repeat(np.arange(4), 50)
    mean = np.mean([rank(np.ones((100, 3)), np.ones((200, 3)), ql, gl, seed=s).mrr for s in range(200)])
    assert mean == pytest.approx(chance(ql, gl).mrr, abs=0.06)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    x = np.ones((3, 2))
    x[1, 0] = bad
    with pytest.raises(UsageError, match="not finite"):
        rank(x, np.ones((2, 2)), [0, 1, 2], [0, 1])
    with pytest.raises(UsageError, match="zero"):
        rank(np.zeros((1, 2)), np.ones((2, 2)), [0], [0, 1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 3))
def test_chance_is_the_mean_over_all_orders(gallery: list[int], query: int) -> None:
    c = chance([query], gallery, ks=(1, 2, 3))
    recall = {k: 0.0 for k in c.recall}
    ap = rr = 0.0
    orders = list(itertools.permutations(gallery))
    for order in orders:
        places = [i + 1 for i, v in enumerate(order) if v == query]
        for k in recall:
            recall[k] += any(p <= k for p in places) / len(orders)
        if places:
            rr += 1 / places[0] / len(orders)
            ap += np.mean([(j + 1) / p for j, p in enumerate(places)]) / len(orders)
    assert c.recall == pytest.approx(recall)
    assert (c.map, c.mrr) == pytest.approx((ap, rr))


def test_chance_without_self() -> None:
    ids = np.arange(4)
    c = chance([0, 0, 1, 1], [0, 0, 1, 1], ks=(1, 3, 4), without=ids)
    assert c.recall == pytest.approx({1: 1 / 3, 3: 1.0})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(2, 5), st.integers(0, 3))
def test_folds_share_every_label_evenly(labels: list[int], n: int, seed: int) -> None:
    keys = [f"k{i}" for i in range(len(labels))]
    f = folds(keys, labels, n, seed)
    sizes = np.bincount(f, minlength=n)
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        per = np.bincount(f[np.array(labels) == label], minlength=n)
        assert per.max() - per.min() <= 1
    order = np.random.default_rng(0).permutation(len(labels))  # whatever the order in which the videos come
    assert (folds([keys[i] for i in order], [labels[i] for i in order], n, seed) == f[order]).all()


def test_folds_refuse_nonsense() -> None:
    with pytest.raises(UsageError):
        folds(["a", "b"], [0, 0], 3)
    with pytest.raises(UsageError):
        folds(["a", "b"], [0, 0], 1)
