"""Exact search: every engine that is installed against a float64 brute force and against the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore.errors import ExtraMissingError, UsageError
from trainers import search
from trainers.search import nearest_rows

HERE = [e for e in ("faiss", "torch") if e != "faiss" or search.faiss_flavour()]


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32))
    return torch.nn.functional.normalize(x, dim=1)


def brute(queries: torch.Tensor, keys: torch.Tensor, k: int) -> torch.Tensor:
    return (queries.double() @ keys.double().T).sort(dim=1, descending=True, stable=True).indices[:, :k]


def test_by_hand() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])
    for engine in HERE:
        found = nearest_rows(torch.tensor([[0.0, 1.0]]), keys, 3, engine)
        assert found.rows.tolist() == [[1, 2, 3]] and found.scores[0].tolist() == pytest.approx([1, 0.8, 0.8])
        assert found.slack.tolist() == pytest.approx([0.8])


@pytest.mark.parametrize("engine", HERE)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12), st.integers(0, 9), st.booleans())
def test_every_engine_is_the_brute_force(engine: str, n: int, q: int, d: int, seed: int, twins: bool) -> None:
    keys, queries = unit(n, d, seed), unit(q, d, seed + 100)
    if twins and n > 1:
        keys[n // 2 :] = keys[: n - n // 2].clone()  # ties: the lower row first
    k = max(1, min(n, 7))
    found = nearest_rows(queries, keys, k, engine, budget=2**20)
    if n <= k + search.EXTRA:  # else a tie at the engine's own cut may hide a row, and `slack` is no help there
        assert torch.equal(found.rows, brute(queries, keys, k))
    exact = (queries.double() @ keys.double().T).sort(dim=1, descending=True).values
    assert torch.allclose(found.scores.double(), exact[:, :k], atol=1e-6)
    assert bool((found.scores[:, 1:] <= found.scores[:, :-1]).all())


@pytest.mark.skipif(len(HERE) < 2, reason="FAISS is not installed: there is only one engine")
def test_engines_give_the_same_rows() -> None:
    keys, queries = unit(20000, 64), unit(600, 64, 1)
    a, b = (nearest_rows(queries, keys, 50, e) for e in HERE)
    assert {a.engine, b.engine} == {"faiss-cpu", "torch"}
    decided = a.slack > 1e-9
    assert torch.equal(a.rows[decided], b.rows[decided]) and float(decided.double().mean()) > 0.99
    assert torch.equal(a.scores, b.scores)
    small = nearest_rows(queries, keys, 50, "torch", budget=2**21)  # many blocks of keys
    assert torch.equal(small.rows, b.rows)


def test_precision_and_autocast_do_not_matter() -> None:
    keys, queries = unit(3000, 32), unit(20, 32, 1)
    plain = nearest_rows(queries, keys, 9, "torch")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_rows(queries, keys, 9, "torch").rows, plain.rows)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for flavour, on_cpu, on_cuda in (
        ("cpu", "faiss-cpu", "torch"), ("gpu", "faiss-cpu", "faiss-gpu"), (None, "torch", "torch")
    ):  # fmt: skip
        monkeypatch.setattr(search, "faiss_flavour", lambda flavour=flavour: flavour)
        assert search.choose("auto", cpu) == on_cpu and search.choose("auto", cuda) == on_cuda
        assert search.choose("torch", cuda) == "torch"
        if flavour != "gpu":
            with pytest.raises(ExtraMissingError, match="FAISS"):
                search.choose("faiss", cuda)


def test_refusals() -> None:
    x = unit(10, 4)
    with pytest.raises(UsageError, match="nearest"):
        nearest_rows(x, x, 11)
    with pytest.raises(UsageError, match="width"):
        nearest_rows(x[:, :3], x, 1)
    with pytest.raises(UsageError, match="float32"):
        nearest_rows(x.double(), x, 1)
    with pytest.raises(UsageError, match="annoy"):
        nearest_rows(x, x, 1, "annoy")
    with pytest.raises(UsageError, match="finite"):
        nearest_rows(x, torch.full_like(x, torch.nan), 1)
    with pytest.raises(UsageError, match="budget"):
        nearest_rows(x, x, 1, budget=10)
    assert nearest_rows(x[:0], x, 3).rows.shape == (0, 3)
