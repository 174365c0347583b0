"""The memory bank: a start that depends on (seed, row) alone, an update defined for every batch, honest state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore.errors import ConflictError, UsageError
from trainers import draws
from trainers.bank import MemoryBank, estimate_partition


def both(n: int) -> torch.Tensor:
    return torch.ones(n, 2, dtype=torch.bool)


def test_start_is_unit_noise_and_a_function_of_seed_and_row():
    small, large, other = MemoryBank(50, 16, 7), MemoryBank(80, 16, 7), MemoryBank(50, 16, 8)
    assert torch.equal(small.memory, large.memory[:50]), "a row does not depend on how many there are"
    assert not torch.equal(small.memory, other.memory)
    torch.testing.assert_close(small.memory.norm(dim=-1), torch.ones(50, 2))
    blocks = torch.cat([draws.unit_vectors(7, 0, 13, 2, 16), draws.unit_vectors(7, 13, 50, 2, 16)])
    assert torch.equal(small.memory, blocks.float())
    assert not small.seen.any() and small.memory.dtype == torch.float32


def test_start_is_uniform_on_the_sphere():
    x = draws.unit_vectors(0, 0, 4000, 2, 32)
    assert x.mean((0, 1)).abs().max() < 5 / math.sqrt(8000 * 32)
    cov = torch.einsum("nmd,nme->de", x, x) / 8000 * 32
    assert (cov - torch.eye(32)).abs().max() < 0.1
    kurtosis = (x**4).mean() / (x**2).mean() ** 2
    assert abs(kurtosis - 3 * 32 / 34) < 0.05, "of a coordinate of a random unit vector: 3 d / (d + 2)"
    assert abs(float((x[:, 0] * x[:, 1]).sum(1).mean())) < 5 / math.sqrt(4000 * 32), "sight and sound are independent"


def test_memory_is_one_tensor_and_flatten_a_view():
    bank = MemoryBank(10, 4, 0)
    assert bank.memory.flatten(1).data_ptr() == bank.memory.data_ptr()
    assert bank.state()["memory"].data_ptr() == bank.memory.data_ptr()
    assert bank.state_dict() == {} and list(bank.buffers()) == [], "a buffer would be broadcast by DDP at each step"
    assert bank.double().memory.dtype == torch.float64 and bank.seen.dtype == torch.bool


def test_update_by_hand():
    bank = MemoryBank(3, 2, 0, momentum=0.5).double()
    bank.memory[1] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    before = bank.memory.clone()
    e = torch.tensor([[[0.0, 1.0], [0.6, 0.8]]], dtype=torch.float64)
    stats = bank.update(torch.tensor([0]), torch.tensor([1]), e, both(1))
    half = math.sqrt(0.5)
    length = math.hypot(0.3, 0.9)
    expected = torch.tensor([[half, half], [0.3 / length, 0.9 / length]], dtype=torch.float64)
    torch.testing.assert_close(bank.memory[1], expected)
    assert torch.equal(bank.memory[[0, 2]], before[[0, 2]])
    assert bank.seen.tolist() == [[False, False], [True, True], [False, False]]
    assert stats == {"samples": 1, "rows": 1, "duplicates": 0}


def test_duplicates_are_averaged_and_written_once():
    bank = MemoryBank(4, 3, 1).double()
    before = bank.memory[2].clone()
    e = torch.nn.functional.normalize(torch.randn(3, 2, 3, dtype=torch.float64), dim=-1)
    stats = bank.update(torch.tensor([5, 1, 3]), torch.tensor([2, 2, 2]), e, both(3))
    mean = e.mean(0)
    torch.testing.assert_close(bank.memory[2], torch.nn.functional.normalize(0.5 * before + 0.5 * mean, dim=-1))
    assert stats == {"samples": 3, "rows": 1, "duplicates": 2}


def test_a_masked_modality_keeps_its_row_and_does_not_count_as_seen():
    bank = MemoryBank(4, 3, 1)
    before = bank.memory.clone()
    e = torch.nn.functional.normalize(torch.randn(3, 2, 3), dim=-1)
    e[0, 1] = torch.nan  # what is masked is not looked at
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    bank.update(torch.arange(3), torch.tensor([0, 1, 1]), e, mask)
    assert torch.equal(bank.memory[0, 1], before[0, 1]) and not torch.equal(bank.memory[0, 0], before[0, 0])
    expected = torch.nn.functional.normalize(before[1, 0] + e[1, 0], dim=0)
    torch.testing.assert_close(bank.memory[1, 0], expected)
    assert bank.seen.tolist() == [[True, False], [True, True], [False, False], [False, False]]
    assert bank.complete().tolist() == [False, True, False, False]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 10_000))
def test_update_does_not_depend_on_the_order_of_the_batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    n = len(rows)
    row, position = torch.tensor(rows), torch.randperm(100, generator=generator)[:n]
    e = torch.nn.functional.normalize(torch.randn(n, 2, 4, generator=generator), dim=-1)
    mask = torch.rand(n, 2, generator=generator) < 0.8
    banks = []
    for order in (torch.arange(n), torch.randperm(n, generator=generator)):
        bank = MemoryBank(6, 4, 0)
        bank.update(position[order], row[order], e[order], mask[order])
        banks.append(bank)
    assert torch.equal(banks[0].memory, banks[1].memory), "to the bit"
    torch.testing.assert_close(banks[0].memory.norm(dim=-1), torch.ones(6, 2))
    slow = MemoryBank(6, 4, 0).memory  # one row after another, by the definition
    for r in set(rows):
        for m in (0, 1):
            chosen = (row == r) & mask[:, m]
            if chosen.any():
                slow[r, m] = torch.nn.functional.normalize(0.5 * slow[r, m] + 0.5 * e[chosen, m].mean(0), dim=0)
    torch.testing.assert_close(banks[0].memory, slow, atol=1e-6, rtol=0)


def test_opposite_vectors_keep_the_memory():
    bank = MemoryBank(2, 3, 0)
    before = bank.memory.clone()
    bank.update(torch.tensor([0]), torch.tensor([0]), -before[:1], both(1))
    assert torch.equal(bank.memory, before)


def test_update_refuses_what_would_poison_it():
    bank = MemoryBank(3, 2, 0)
    e = torch.nn.functional.normalize(torch.randn(2, 2, 2), dim=-1)
    before = bank.memory.clone()
    with pytest.raises(UsageError, match="another selection"):
        bank.update(torch.tensor([0, 1]), torch.tensor([0, 3]), e, both(2))
    with pytest.raises(UsageError, match="share a position"):
        bank.update(torch.tensor([4, 4]), torch.tensor([0, 1]), e, both(2))
    with pytest.raises(UsageError, match="non-finite"):
        bank.update(torch.tensor([0, 1]), torch.tensor([0, 1]), e * torch.inf, both(2))
    assert torch.equal(bank.memory, before)
    with pytest.raises(UsageError, match="at least two"):
        MemoryBank(1, 2, 0)
    with pytest.raises(UsageError, match="momentum"):
        MemoryBank(3, 2, 0, momentum=1.0)


def test_state_round_trip_and_its_conflicts():
    bank, other = MemoryBank(5, 4, 0), MemoryBank(5, 4, 1)
    bank.update(torch.tensor([0]), torch.tensor([3]), bank.memory[:1].clone(), both(1))
    other.load_state(bank.state())
    assert torch.equal(bank.memory, other.memory) and torch.equal(bank.seen, other.seen)
    assert other.checksum() == bank.checksum()
    other.memory[0, 0, 0] = torch.nextafter(other.memory[0, 0, 0], torch.tensor(2.0))
    assert other.checksum() != bank.checksum(), "one bit"
    assert not torch.equal(bank.memory, other.memory), "a loaded bank is a copy"
    swapped = MemoryBank(5, 4, 0)
    swapped.memory = bank.memory[[1, 0, 2, 3, 4]].clone()
    assert swapped.checksum() != bank.checksum(), "the order of the rows counts"
    with pytest.raises(ConflictError, match="selection"):
        MemoryBank(6, 4, 0).load_state(bank.state())


def test_partition_of_random_directions():
    """E exp(u / t), u the cosine of random directions in D dimensions, by numerical integration of its density."""
    dim, t = 128, 0.07
    u = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    log_density = (dim - 3) / 2 * torch.log1p(-u * u)
    density = torch.exp(log_density - log_density.max())
    expected = float((density * torch.exp(u / t)).sum() / density.sum())
    assert abs(expected - 2.2) < 0.05, "the figure in the reference"
    x = draws.unit_vectors(0, 0, 2000, 2, dim)
    score = x[:256, 0] @ x[:, 1].T / t
    z = estimate_partition(score, torch.ones(256, dtype=torch.bool))
    assert abs(float(z) - expected) < 0.05
    assert abs(float(z) - float(score.exp().mean())) < 1e-12


def test_partition_ignores_masked_samples():
    score = torch.tensor([[0.0, 1.0], [300.0, 800.0]])
    z = estimate_partition(score, torch.tensor([True, False]))
    assert float(z) == pytest.approx((1 + math.e) / 2)
    with pytest.raises(UsageError, match="partition"):
        estimate_partition(score, torch.tensor([False, False]))
