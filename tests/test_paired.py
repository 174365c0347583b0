"""Paired tests: worked by hand, against scipy, and what is printed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from avstore.errors import UsageError
from benchmarks import paired, probing


def test_by_hand() -> None:
    assert paired.sign_flip([1, 1, 1]) == 0.25  # +++ and --- of eight
    assert paired.sign_flip([3, 1]) == 0.5
    assert paired.sign_flip([1, -1]) == 1.0  # a sum of 0: every pattern is as large
    assert paired.sign_flip([2, 2, -1]) == 0.5  # 3 and 5 and their opposites reach 3; the other four sums are +-1
    found = paired.compare([0.5, 0.7, 0.6], [0.4, 0.5, 0.6])
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(0.1), pytest.approx(0.1))
    assert found.p_t == pytest.approx(2 * stats.t.sf(np.sqrt(3), 2))
    assert paired.compare([0.5, 0.7], [0.4, 0.6]).p_t is None  # equal differences


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9))
def test_against_scipy(differences: list[int]) -> None:
    d = np.array(differences, np.float64)
    expected = stats.permutation_test((d,), lambda x, axis: x.sum(axis), permutation_type="samples",
                                      vectorized=True, n_resamples=np.inf).pvalue  # fmt: skip
    # scipy's two-sided value doubles the smaller tail, which for a symmetric null is the same but for ties at 0
    assert paired.sign_flip(differences) == pytest.approx(min(1.0, expected), abs=1e-12)


def test_many_pairs_are_drawn_and_agree_with_the_normal_limit() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 60)
    p = paired.sign_flip(d.tolist())
    assert p == paired.sign_flip(d.tolist())
    assert p == pytest.approx(2 * stats.norm.sf(abs(d.sum()) / np.sqrt((d**2).sum())), abs=0.01)


def test_uniform_under_the_null() -> None:
    """At most a share a of sets without a difference get a p of at most a."""
    rng = np.random.default_rng(1)
    p = np.array([paired.sign_flip(rng.normal(size=8).tolist()) for _ in range(400)])
    for a in (0.05, 0.25, 0.5):
        assert (p <= a).mean() <= a + 3 * np.sqrt(a * (1 - a) / 400)


def test_lines_name_both_and_leave_out_what_does_not_pair() -> None:
    values = {"x": [0.5, 0.6, 0.7], "y": [0.4, 0.5, 0.6], "scratch": [0.1, 0.2, 0.4], "odd": [0.5]}
    out = paired.lines(values, "splits", ["scratch"])
    assert out[0] == "x - y: +0.100 (sd 0.000) over 3 splits; sign-flip p 0.25, no spread"
    assert [line.split(":")[0] for line in out] == ["x - y", "x - scratch", "y - scratch"]
    with pytest.raises(UsageError):
        paired.compare([1.0], [2.0])
    with pytest.raises(UsageError):
        paired.compare([1.0, 2.0], [2.0])
    with pytest.raises(UsageError):
        paired.sign_flip([np.nan])


def test_one_part_and_one_run_are_compared_over_the_test_videos() -> None:
    """Right on 9 and on 3 of 10 videos, 6 of which tell the two apart, all for the first: p = 2 / 2^6."""
    part = probing.Part("test split", np.arange(2), np.arange(2, 12))
    labels = np.array([0, 1] * 6)
    rows = []
    for name, wrong in (("avid", [3]), ("simclr", [2, 3, 4, 5, 6, 7, 8])):
        predicted = labels[part.test].copy()
        predicted[np.array(wrong) - 2] ^= 1
        rows.append(probing.row(name, "conv5x", [[probing.scored(part, predicted, labels)]]))
    assert [r["top-1"] for r in rows] == [0.9, 0.3]
    table = probing.table("t", rows, probing.Probed(np.arange(12), labels, ("a", "b"), (part,), "planted"),
                          compared=["avid", "simclr"])  # fmt: skip
    assert "avid - simclr: +0.600" in table.notes[-1] and "over 10 test videos; sign-flip p 0.0312" in table.notes[-1]
    assert "nothing of other seeds" in table.notes[-1] and all("right" not in r for r in table.rows)


def test_probes_compare_methods_block_by_block() -> None:
    def outcomes(*accuracy: float) -> list[list[probing.Outcome]]:
        return [[probing.Outcome(f"fold {i}", a, "") for i, a in enumerate(accuracy)]]

    probed = probing.Probed(np.arange(4), np.array([0, 1, 0, 1]), ("a", "b"),
                            (probing.Part("fold 1", np.arange(2), np.arange(2, 4)),), "planted")  # fmt: skip
    two_runs = outcomes(0.4, 0.6) + outcomes(0.6, 0.4)  # of one method: averaged before the test
    rows = [
        probing.row("avid", "conv5x", two_runs),
        probing.row("simclr", "conv5x", outcomes(0.2, 0.3)),
        probing.row("avid", "conv4x", outcomes(0.5, 0.5)),
        probing.row("random weights", "conv5x", outcomes(0.1, 0.1)),
        {"features": "published: CrissCross", "top-1": 0.9},
    ]
    notes = probing.table("t", rows, probed, compared=["avid", "simclr"]).notes
    assert notes[1:] == ("conv5x, avid - simclr: +0.250 (sd 0.071) over 2 parts; sign-flip p 0.5, t-test p 0.126",)
    assert len(probing.table("t", rows, probed).notes) == 1
