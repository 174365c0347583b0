"""The memory bank: updates, CMA mining with its certificate, and exact search by every engine that is there."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu import Bench, Row, rate, wanted
from trainers import search
from trainers.bank import MemoryBank
from trainers.positives import mine_positives

DIM = 128
POSITIVES = 32
COMPUTED = {232_000: "computed: 0.3-0.6 s on an H200", 1_780_000: "computed: 17-34 s on an H200"}


def bank_of(n: int, device: str) -> Tensor:
    """float32 (n, 2, 128), unit rows: clusters shared by sight and sound, and noise of their own (`bench step`'s
    `correlated`)."""
    torch.manual_seed(0)
    out = torch.empty(n, 2, DIM, device=device)
    centres = torch.nn.functional.normalize(torch.randn(max(2, min(400, n // 100)), DIM, device=device), dim=1)
    spread = torch.randn(DIM // 4, DIM, device=device)
    for first in range(0, n, 1 << 18):
        m = min(n, first + (1 << 18)) - first
        shared = centres[torch.randint(len(centres), (m,), device=device)]
        shared = shared + 0.6 / DIM**0.5 * (torch.randn(m, DIM // 4, device=device) @ spread) / (DIM // 4) ** 0.5
        own = 0.4 / DIM**0.5 * torch.randn(m, 2, DIM, device=device)
        out[first : first + m] = torch.nn.functional.normalize(shared[:, None] + own, dim=-1)
    return out


def bank_and_mining(bench: Bench) -> Iterator[Row]:
    """Updates a second of a batch of 512; a refresh of CMA positives over all rows, predicted from a sample of queries
    and run whole where that predicts less than a minute. The limit: the two products of the scores at the fp32 rate."""
    for n in bench.size.banks:
        try:
            yield from _one_bank(bench, n)
        except torch.cuda.OutOfMemoryError as e:
            yield {"what": f"{n} rows", "note": f"not measured: {' '.join(str(e).split())[:120]}"}
        finally:
            if bench.cuda:
                torch.cuda.empty_cache()


def _one_bank(bench: Bench, n: int) -> Iterator[Row]:
    bank = MemoryBank(2, DIM, seed=0)
    bank.memory = bank_of(n, bench.device)
    bank.seen = torch.ones(n, 2, dtype=torch.bool, device=bench.device)
    size = min(512, n)
    position = torch.arange(size, device=bench.device)
    rows = torch.randperm(n, device=bench.device)[:size]
    vectors = torch.nn.functional.normalize(torch.randn(size, 2, DIM, device=bench.device), dim=-1)
    mask = torch.ones(size, 2, dtype=torch.bool, device=bench.device)
    memory = bank.memory.clone()
    yield {"what": f"bank of {n} rows: updates of {size}", "unit": "updates/s",
           "value": rate(bench, lambda: bank.update(position, rows, vectors, mask))}  # fmt: skip
    bank.memory = memory
    some = torch.randperm(n, device=bench.device)[: min(n, bench.size.bank_queries)]
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    mine_positives(bank.memory, POSITIVES, query_Q=some[:256], engine="torch")
    began = time.perf_counter()
    mined = mine_positives(bank.memory, POSITIVES, query_Q=some, engine="torch")
    wall = _waited(bench, began)
    whole = wall * n / len(some)
    ceiling = bench.limits.get("matmul-fp32")
    flops = 4 * DIM * float(n) ** 2 / 1e12
    limit = flops / ceiling if ceiling else None
    note = f"{mined.certified_first:.1%} certified at once, {mined.certified:.1%} in all, {mined.ties} ties"
    if n in COMPUTED:
        note += f"; {COMPUTED[n]}"
    if bench.cuda:
        note += f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    by = "; the limit: the fp32 products of the scores alone"
    yield {"what": f"mining of {n} rows, predicted from {len(some)}", "value": whole, "unit": "s", "limit": limit,
           "note": note + by}  # fmt: skip
    if whole > bench.size.whole_bank:
        return
    began = time.perf_counter()
    mined = mine_positives(bank.memory, POSITIVES, engine="torch")
    wall = _waited(bench, began)
    yield {"what": f"mining of {n} rows, whole", "value": wall, "unit": "s", "limit": limit,
           "note": f"{mined.certified:.2%} certified, {mined.ties} ties"}  # fmt: skip


def _waited(bench: Bench, began: float) -> float:
    if bench.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def engines(bench: Bench) -> Iterator[Row]:
    """Queries a second for the 64 nearest of each bank's sights, by every engine that works here; the rows must be
    equal wherever the cut is no tie."""
    device = torch.device(bench.device)
    for n in bench.size.banks:
        keys = bank_of(n, bench.device)[:, 0].contiguous()
        queries = keys[torch.randperm(n, device=device)[: min(n, 2048)]]
        answers: dict[str, search.Nearest] = {}
        for engine in ("faiss", "torch"):
            row: Row = {"what": f"{engine}, 64 nearest of {n}", "unit": "queries/s"}
            try:
                chosen = search.choose(engine, device)
                answers[engine] = search.nearest_rows(queries, keys, min(64, n), engine)
                call = functools.partial(search.nearest_rows, queries, keys, min(64, n), engine)
                value = rate(bench, call, len(queries))
            except Exception as e:
                yield {**row, "note": f"not measured: {type(e).__name__}: {' '.join(str(e).split())[:160]}"}
                continue
            ceiling = bench.limits.get("matmul-fp32")
            limit = ceiling * 1e12 / (2 * DIM * n) if ceiling else None
            yield {**row, "value": value, "limit": limit, "note": f"{chosen}; the limit is the fp32 product alone"}
        if len(answers) == 2:
            decided = answers["torch"].slack > 1e-9
            same = (answers["torch"].rows == answers["faiss"].rows).all(1)
            share = float(same[decided].double().mean()) if bool(decided.any()) else None
            yield {"what": f"queries with the same rows by both engines, {n} rows", "unit": "", "value": share,
                   **wanted(share, "==", 1),
                   "note": f"{int(decided.sum())} of {len(queries)} queries, whose cut is no tie"}  # fmt: skip
