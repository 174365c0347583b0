"""Draws of negatives: which bank rows a sample is contrasted with.

`uniform` (AVID, AVID-CMA): K rows with replacement, uniform over the bank without the excluded rows (the own row,
and in AVID-CMA the positives). `hard`: K draws from the sample's pool, the rows nearest to it in sight and in sound as
of the last refresh. `mixed`: hard and uniform by turns, so that any prefix is mixed too. A draw is a pure function of
(seed, epoch, row, draw): no generator, nothing to save, the same on any number of ranks. One set of indices serves
both modalities, as in the published code.

Rows are not filtered by modality: a method that needs both drops incomplete videos from its selection.
"""

# legend: N rows, B batch, K negatives, E excluded rows, H pool rows per modality, D embedding

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from avstore.errors import ExtraMissingError, UsageError, did_you_mean
from trainers import draws, search

Mode = Literal["uniform", "hard", "mixed"]
MODES = ("uniform", "hard", "mixed")


def draw_negatives(
    n_rows: int,
    count: int,
    excluded_BE: Tensor,
    *,
    seed: int,
    epoch: int,
    row_B: Tensor,
    draw_B: Tensor,
    mode: Mode = "uniform",
    pool_BH: Tensor | None = None,
) -> Tensor:
    """(B, count) int64 bank rows, none of which is excluded for its sample.

    `excluded_BE`: int64 in any order, distinct where not negative; a negative entry excludes nothing. `pool_BH`: the
    sample's hard rows (`nearest`), needed by `hard` and `mixed`; a sample whose pool holds a negative entry has none
    and draws uniformly. Raises UsageError for an unknown mode, a missing pool, or when everything is excluded.
    """
    if mode not in MODES:
        raise UsageError(f"no way of drawing negatives named {mode!r}", did_you_mean(mode, MODES))
    if count < 1:
        raise UsageError(f"{count} negatives", "at least one is needed")
    if mode != "uniform" and pool_BH is None:
        raise UsageError(f"{mode} negatives without a pool of near rows", "the pool is made at a refresh")
    items = [row_B, draw_B]
    bits_BK = draws.bits(draws.key(seed, draws.NEGATIVES, epoch), items, count)
    uniform_BK = uniform_outside(bits_BK, n_rows, excluded_BE)
    if mode == "uniform" or pool_BH is None:
        return uniform_BK
    bits_BK = draws.bits(draws.key(seed, draws.HARD, epoch), items, count)
    hard_BK = pool_BH.gather(1, draws.below(bits_BK, pool_BH.shape[1])).long()
    take_BK = (pool_BH >= 0).all(1)[:, None].expand(-1, count)
    if mode == "mixed":
        take_BK = take_BK & (torch.arange(count, device=row_B.device) % 2 == 0)
    return torch.where(take_BK, hard_BK, uniform_BK)


def uniform_outside(bits_BK: Tensor, n_rows: int, excluded_BE: Tensor) -> Tensor:
    """Random bits -> rows uniform over [0, n_rows) without the sample's excluded ones, by shifting past them.

    With x the sorted excluded rows and r uniform over the n - |x| that remain, the r-th allowed row is
    r + #{j : x_j - j <= r}.
    """
    width = excluded_BE.shape[1]
    padding = torch.arange(width, device=excluded_BE.device)
    absent_BE = excluded_BE < 0
    sorted_BE = torch.where(absent_BE, n_rows, excluded_BE).sort(1).values
    # what excludes nothing goes to n + j, so that x_j - j = n stays above every r
    shifted_BE = torch.where(sorted_BE == n_rows, n_rows, sorted_BE - padding)
    left_B = n_rows - width + absent_BE.sum(1)
    if len(left_B) and int(left_B.min()) < 1:
        raise UsageError(
            f"no negative is left among {n_rows} rows",
            f"up to {width} of them are excluded for a sample",
            "select more videos, or ask for fewer positives",
        )
    r_BK = draws.below(bits_BK, left_B[:, None])
    return r_BK + torch.searchsorted(shifted_BE.contiguous(), r_BK, right=True)


@torch.no_grad()
def nearest(
    memory_N2D: Tensor, depth: int, excluded_NE: Tensor, eligible_N: Tensor, engine: str = "auto", block: int = 1024
) -> Tensor:
    """(N, 2 * depth) int32: for each eligible row its nearest eligible rows by sight (first half) and by sound.

    Inner products of the unit vectors; the excluded rows (negative entries: none) are left out. An ineligible row gets
    -1 throughout. `engine`: as `search.choose`; the rows are the same with each. At D = 128 FAISS wants 1,000 queries
    in a call: below n * D = 128,000 it leaves BLAS and is several times slower. Raises UsageError when fewer than
    depth + E + 1 rows are eligible.
    """
    search.choose(engine, memory_N2D.device)
    rows = eligible_N.nonzero()[:, 0]
    wanted = depth + excluded_NE.shape[1]
    if depth < 1 or wanted + 1 > len(rows):
        raise UsageError(
            f"a pool of {depth} hard negatives per modality",
            f"{len(rows)} rows have sight and sound",
            "ask for fewer hard negatives (--set hard_pool=...)",
        )
    pool = torch.full((len(memory_N2D), 2 * depth), -1, dtype=torch.int32, device=memory_N2D.device)
    for modality in (0, 1):
        keys = memory_N2D[:, modality] if len(rows) == len(memory_N2D) else memory_N2D[rows, modality]
        keys = keys.float().contiguous()
        for part in torch.arange(len(rows), device=rows.device).split(block):
            found = rows[search.nearest_rows(keys[part], keys, wanted + 1, engine, check=False).rows]
            own = rows[part]
            bad = found == own[:, None]
            for column in excluded_NE[own].unbind(1):
                bad |= found == column[:, None]
            order = bad.to(torch.int8).argsort(dim=1, stable=True)[:, :depth]  # allowed ones first, nearest first
            pool[own, modality * depth : (modality + 1) * depth] = found.gather(1, order).int()
    return pool


# rows of a bank from which FAISS' [v|a] lists cost less on a CPU than torch's brute force: docs/decisions.md
FAISS_FROM = 300_000


def choose_engine(engine: str, memory: Tensor) -> bool:
    """Whether to mine with FAISS. auto: on a CPU, from FAISS_FROM rows on, where it is installed; positives are the
    same with both. Raises UsageError for an unknown name or FAISS on a GPU tensor."""
    if engine not in ("auto", "faiss", "torch"):
        raise UsageError(f"no search engine {engine!r}", did_you_mean(engine, ("auto", "faiss", "torch")))
    if engine == "faiss" and memory.device.type != "cpu":
        raise UsageError(f"FAISS on a bank on {memory.device}", "it searches banks in CPU memory", "use engine=torch")
    if engine == "auto":
        return memory.device.type == "cpu" and len(memory) >= FAISS_FROM and search.faiss_flavour() is not None
    return engine == "faiss"


def inner_product_search(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """FAISS' exact k-nn on CPU float32, in place: (scores, indices), best first."""
    try:
        import faiss
    except ImportError as e:
        raise ExtraMissingError("FAISS is not installed", str(e), "pip install faiss-cpu, or engine=torch") from e
    scores, found = faiss.knn(
        queries.float().contiguous().numpy(),
        keys.float().contiguous().numpy(),
        count,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    return torch.from_numpy(scores), torch.from_numpy(found)
