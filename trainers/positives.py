"""CMA positives: for every video the k others that agree most with it in sight *and* sound, exactly, with a proof.

    agreement(i, j) = min(v_i . v_j, a_i . a_j)       consensus; union: max; video, audio: one of the two

over the memory bank (AVID-CMA, CVPR 2021). A first pass in float32 proposes m candidates per row, float64 rescores
them, and a certificate tells whether they can have missed anything:

    Lemma. u(j) >= s(j), computed with an error of at most e; C the m rows of largest computed u, t the smallest of
    them. If the k-th best s over C without i is > t + e, then the k best of C are the k best of all rows but i.
    (Whoever is outside C has s <= u <= t + e, hence less than k rows of C.)

Rows that fail go to a longer brute-force list; what still fails are ties within rounding: the rescored best are
kept, counted and reported, never silent. Engines: `torch` scores s itself in blocks; `faiss` (CPU, for large banks)
searches [v|a], since (v.v + a.a) / 2 >= min. Self leaves by row number; order (-s, row).
Nothing approximate is here, and nothing is written: the caller keeps the table.
"""

# legend: N rows, Q queries, M candidates, k positives, D embedding

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from avstore.errors import UsageError, did_you_mean
from trainers.negatives import choose_engine, inner_product_search

Agreement = Literal["consensus", "union", "video", "audio"]
AGREEMENTS = ("consensus", "union", "video", "audio")
_RESCORE = 128  # queries rescored at a time: 128 x 512 candidates x 256 float64 are 134 MB


@dataclass(frozen=True)
class Mined:
    """`rows` (Q, k) int64, ascending in each row, -1 throughout for a query that takes no part.

    `certified_first`, `certified`: shares of the taking-part queries proved exact by the first pass and in all;
    `ties`: number whose k-th place is undecided within rounding; `left_out`: queries without both modalities.
    `agreement` (Q, k) float64: the scores, aligned with `rows`. `engine`: who proposed first, 'torch' or 'faiss'.
    """

    rows: Tensor
    agreement: Tensor
    certified_first: float
    certified: float
    ties: int
    left_out: int
    stats: dict[str, float] = field(default_factory=dict)
    engine: str = "torch"


def combine(video_score: Tensor, audio_score: Tensor, agreement: str) -> Tensor:
    """The agreement of two similarities, element by element."""
    if agreement == "consensus":
        return torch.minimum(video_score, audio_score)
    if agreement == "union":
        return torch.maximum(video_score, audio_score)
    return video_score if agreement == "video" else audio_score


def rounding_slack(length: int) -> float:
    """Bound on the error of a float32 dot product of unit vectors with `length` terms, in any order of summation."""
    return (2.02 * length + 4) * 2.0**-24


@torch.no_grad()
def mine_positives(
    memory_N2D: Tensor,
    k: int = 32,
    *,
    agreement: Agreement = "consensus",
    engine: str = "auto",
    eligible_N: Tensor | None = None,
    query_Q: Tensor | None = None,
    first: int | None = None,
    fallback: int = 512,
    block: int = 1024,
) -> Mined:
    """The k rows of largest agreement with each query row, exact wherever certified.

    `memory_N2D`: unit vectors, float32 (or float64). `eligible_N`: rows that take part, as query and as positive (a
    never-embedded sound ties with everything); default all. `query_Q`: which rows to mine for, default all in order.
    `first`: candidates of the first pass, default 64 for torch and 256 for FAISS, at least 2 k. `fallback`: length of
    the second list. Raises UsageError for unknown names, too few eligible rows, or vectors that are not of unit length.
    """
    if agreement not in AGREEMENTS:
        raise UsageError(f"no agreement {agreement!r}", did_you_mean(agreement, AGREEMENTS))
    if memory_N2D.dim() != 3 or memory_N2D.shape[1] != 2 or memory_N2D.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"a memory of shape {tuple(memory_N2D.shape)} and {memory_N2D.dtype}", "it must be (N, 2, D) float32"
        )
    use_faiss = choose_engine(engine, memory_N2D)
    device = memory_N2D.device
    n_all = len(memory_N2D)
    eligible_N = torch.ones(n_all, dtype=torch.bool, device=device) if eligible_N is None else eligible_N
    rows = eligible_N.nonzero()[:, 0]
    n = len(rows)
    if not 1 <= k < n:
        raise UsageError(
            f"{k} positives among {n} videos",
            "each video needs that many others with sight and sound in the bank",
            "ask for fewer (--set positives=...), or train `avid` over all videos first",
        )
    bank = memory_N2D if n == n_all else memory_N2D[rows]
    norm = bank.norm(dim=-1)
    if not bool(((norm - 1).abs() < 1e-3).all()):
        raise UsageError("the memory holds vectors that are not of unit length", "the certificate's bound needs them")

    query_Q = torch.arange(n_all, device=device) if query_Q is None else query_Q
    part_Q = eligible_N[query_Q].nonzero()[:, 0]  # places in query_Q of those that take part
    place_N = torch.full((n_all,), -1, device=device)
    place_N[rows] = torch.arange(n, device=device)
    query = place_N[query_Q[part_Q]]

    out_rows = torch.full((len(query_Q), k), -1, device=device)
    out_score = torch.full((len(query_Q), k), torch.nan, dtype=torch.float64, device=device)
    first = max(2 * k, 256 if use_faiss else 64) if first is None else max(first, k + 1)
    certified = torch.zeros(len(query), dtype=torch.bool, device=device)
    found, score = query.new_zeros(len(query), k), out_score.new_zeros(len(query), k)

    def search(which: Tensor, faiss: bool, depth: int) -> None:
        for chosen in which.split(block):
            near, bound = (_by_faiss if faiss else _by_torch)(bank, query[chosen], min(depth, n), agreement)
            best, s = _rescore(bank, query[chosen], near, k, agreement)
            found[chosen], score[chosen] = best, s
            certified[chosen] = s[:, -1] > bound

    search(torch.arange(len(query), device=device), use_faiss, first)
    share_first = float(certified.double().mean()) if len(query) else 1.0
    failed = (~certified).nonzero()[:, 0]
    if len(failed):
        search(failed, False, max(fallback, 2 * k))

    out_rows[part_Q] = rows[found]
    out_score[part_Q] = score
    out_rows, order = out_rows.sort(1)
    share = float(certified.double().mean()) if len(query) else 1.0
    ties, left_out = int((~certified).sum()), len(query_Q) - len(query)
    mean = float(score.mean()) if len(query) else 0.0
    stats = {"certified_first": share_first, "certified": share, "ties": ties, "left_out": left_out, "agreement": mean,
             "faiss": float(use_faiss)}  # fmt: skip
    chosen = "faiss" if use_faiss else "torch"
    return Mined(out_rows, out_score.gather(1, order), share_first, share, ties, left_out, stats, chosen)


def _by_torch(bank: Tensor, query: Tensor, m: int, agreement: str) -> tuple[Tensor, Tensor]:
    """Brute force: the m rows of largest s, running over blocks of columns, and t + e ((Q,) float64)."""
    columns = 8192 if bank.device.type == "cpu" else 65536
    score = bank.new_full((len(query), m), -9.0)
    found = torch.full((len(query), m), -1, device=bank.device)
    v, a = bank[query, 0], bank[query, 1]
    with _full_precision(bank.device.type):
        for start in range(0, len(bank), columns):
            keys = bank[start : start + columns]
            s, j = combine(v @ keys[:, 0].T, a @ keys[:, 1].T, agreement).topk(min(m, len(keys)), 1, sorted=False)
            score, place = torch.cat([score, s], 1).topk(m, 1)
            found = torch.cat([found, j + start], 1).gather(1, place)
    everything = m >= len(bank)
    last = score[:, -1].double() + rounding_slack(bank.shape[2])
    return found, torch.full_like(last, -torch.inf) if everything else last


def _by_faiss(bank: Tensor, query: Tensor, m: int, agreement: str) -> tuple[Tensor, Tensor]:
    """FAISS lists and their bound t + e on everything outside: one list of [v|a], of one modality, or two for union."""
    dim = bank.shape[2]
    if agreement == "consensus":
        keys = bank.flatten(1)
        score, found = inner_product_search(keys[query], keys, m)
        last = score[:, -1].double() / 2 + rounding_slack(2 * dim)
    else:
        lists = [
            inner_product_search(bank[query, j], bank[:, j], m)
            for j, name in enumerate(("video", "audio"))
            if agreement in ("union", name)
        ]
        found = torch.cat([rows for _, rows in lists], 1)
        last = torch.stack([s[:, -1] for s, _ in lists]).amax(0).double() + rounding_slack(dim)
    return found, torch.full_like(last, -torch.inf) if m >= len(bank) else last


def _rescore(bank: Tensor, query: Tensor, found: Tensor, k: int, agreement: str) -> tuple[Tensor, Tensor]:
    """Candidates in float64, without self and repetitions, best k in the order (-s, row): rows and scores (Q, k)."""
    best, scores = [], []
    for q, c in zip(query.split(_RESCORE), found.split(_RESCORE), strict=True):
        c = c.sort(1).values  # ascending rows, so that a stable sort by score breaks ties by row
        own, other = bank[q].double(), bank[c].double()
        s = combine((own[:, None, 0] * other[:, :, 0]).sum(-1), (own[:, None, 1] * other[:, :, 1]).sum(-1), agreement)
        s[c == q[:, None]] = -torch.inf
        s[:, 1:][c[:, 1:] == c[:, :-1]] = -torch.inf
        s, order = s.sort(dim=1, descending=True, stable=True)
        scores.append(s[:, :k])
        best.append(c.gather(1, order)[:, :k])
    return torch.cat(best), torch.cat(scores)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """float32 products as float32: TF32 or bf16 would void the slack of the certificate."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
