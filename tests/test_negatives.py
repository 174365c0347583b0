"""Random bits and draws of negatives: exact, uniform, never what is excluded, hard ones really near."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from avstore.errors import UsageError
from trainers import draws
from trainers.negatives import draw_negatives, nearest, uniform_outside


def test_splitmix64_is_the_published_sequence():
    """First outputs of splitmix64 seeded with 1234567, as listed with the public reference implementation."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = [(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(5)]
    assert [draws.mix_integer(s) for s in states] == known
    tensor = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [x % 2**64 for x in draws.mix(tensor).tolist()] == known


@given(st.integers(-(2**63), 2**63 - 1))
def test_mix_agrees_with_python_integers(x):
    assert int(draws.mix(torch.tensor(x))) % 2**64 == draws.mix_integer(x % 2**64)


def test_keys_depend_on_order_and_bits_on_every_counter():
    assert draws.key(1, 2) != draws.key(2, 1)
    items = [torch.tensor([3, 4, 3]), torch.tensor([0, 0, 1])]
    bits = draws.bits(draws.key(0, 1), items, 4)
    assert len(set(bits.flatten().tolist())) == 12
    assert torch.equal(bits[1:2], draws.bits(draws.key(0, 1), [torch.tensor([4]), torch.tensor([0])], 4))
    assert torch.equal(bits[:, :2], draws.bits(draws.key(0, 1), items, 2)), "fewer draws are a prefix"


def chi_square(counts: torch.Tensor) -> float:
    """p-value against equal frequencies."""
    return float(stats.chisquare(counts.numpy()).pvalue)


def make(n_rows, count, excluded, rows, **more):
    rows = torch.as_tensor(rows)
    arguments = {"seed": 5, "epoch": 2, "row_B": rows, "draw_B": torch.zeros_like(rows)} | more
    return draw_negatives(n_rows, count, excluded, **arguments)


def test_uniform_over_all_rows_but_the_own():
    rows = torch.arange(50)
    drawn = make(50, 20_000, rows[:, None], rows)
    assert drawn.min() == 0 and drawn.max() == 49
    for row in range(50):
        counts = torch.bincount(drawn[row], minlength=50)
        assert counts[row] == 0
        assert chi_square(counts[rows != row]) > 1e-5
    total = torch.bincount(drawn.flatten(), minlength=50)
    assert chi_square(total) > 1e-4


def test_uniform_outside_of_exclusions_of_different_length():
    excluded = torch.tensor([[7, 0, 3, 9], [2, -1, -1, -1], [-1, 5, 4, -1], [-1, -1, -1, -1]])
    drawn = make(10, 40_000, excluded, [0, 1, 2, 3])
    for sample, out in enumerate(excluded.tolist()):
        counts = torch.bincount(drawn[sample], minlength=10)
        left = [r for r in range(10) if r not in out]
        assert counts[[r for r in out if r >= 0]].sum() == 0
        assert chi_square(counts[left]) > 1e-5


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shift_is_a_bijection_onto_the_allowed_rows(data):
    n = data.draw(st.integers(2, 12))
    out = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n - 1))
    padded = out + [-1] * data.draw(st.integers(0, 3))
    left = n - len(out)
    if not padded:
        padded = [-1]
    # bits whose upper 32 hit the middle of each of the `left` cells
    words = [((2 * r + 1) * 2**31 // left) << 32 for r in range(left)]
    bits = torch.tensor([[w - 2**64 if w >= 2**63 else w for w in words]])
    drawn = uniform_outside(bits, n, torch.tensor([padded]))
    assert drawn[0].tolist() == [r for r in range(n) if r not in out]


def test_draws_are_a_pure_function_of_their_counters():
    rows, other = torch.tensor([3, 8, 3]), torch.tensor([0, 0, 1])
    drawn = make(100, 30, rows[:, None], rows, draw_B=other)
    alone = make(100, 30, rows[2:, None], rows[2:], draw_B=other[2:])
    assert torch.equal(drawn[2:], alone), "whatever else is in the batch"
    assert not torch.equal(drawn[0], drawn[2]), "a video twice in a batch has other negatives"
    assert not torch.equal(drawn, make(100, 30, rows[:, None], rows, draw_B=other, epoch=3))
    assert not torch.equal(drawn, make(100, 30, rows[:, None], rows, draw_B=other, seed=6))


def test_wrong_requests_are_refused():
    rows = torch.tensor([0])
    with pytest.raises(UsageError, match="no negative is left"):
        make(3, 5, torch.tensor([[0, 1, 2]]), rows)
    with pytest.raises(UsageError, match="hrad"):
        make(9, 5, rows[:, None], rows, mode="hrad")
    with pytest.raises(UsageError, match="without a pool"):
        make(9, 5, rows[:, None], rows, mode="hard")
    with pytest.raises(UsageError, match="at least one"):
        make(9, 0, rows[:, None], rows)


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_pool_is_the_brute_force_neighbours(engine):
    memory = draws.unit_vectors(1, 0, 300, 2, 8).float()
    eligible = torch.ones(300, dtype=torch.bool)
    eligible[::7] = False
    positives = torch.stack([torch.randperm(300)[:4] for _ in range(300)])
    positives[5] = -1
    pool = nearest(memory, 10, positives, eligible, engine, block=64)
    assert pool.shape == (300, 20) and (pool[~eligible] == -1).all()
    for row in eligible.nonzero()[:, 0].tolist():
        for modality in (0, 1):
            scores = memory[:, modality].double() @ memory[row, modality].double()
            scores[~eligible] = -9
            scores[row] = -9
            scores[[p for p in positives[row].tolist() if p >= 0]] = -9
            expected = scores.topk(10).indices
            assert set(pool[row, 10 * modality : 10 * modality + 10].tolist()) == set(expected.tolist())
    with pytest.raises(UsageError, match="hard_pool"):
        nearest(memory, 300, positives, eligible, engine)


def test_hard_and_mixed_draws_come_from_the_pool():
    rows = torch.arange(40)
    pool = torch.stack([(r + torch.arange(1, 9)) % 40 for r in rows]).int()
    pool[3] = -1  # no memory: uniform
    hard = make(40, 4000, rows[:, None], rows, mode="hard", pool_BH=pool)
    for row in range(40):
        counts = torch.bincount(hard[row], minlength=40)
        assert counts[row] == 0
        inside = pool[row].long() if row != 3 else rows[rows != 3]
        assert counts[inside].sum() == 4000
        assert chi_square(counts[inside]) > 1e-5
    mixed = make(40, 4000, rows[:, None], rows, mode="mixed", pool_BH=pool)
    uniform = make(40, 4000, rows[:, None], rows)
    assert torch.equal(mixed[:, 1::2], uniform[:, 1::2])
    inside = (mixed[0, ::2, None] == pool[0]).any(1)
    assert inside.all(), "every second one is from the pool, so that a prefix is mixed too"
