"""Exact nearest rows by inner product, one call for three engines: FAISS on the GPU, torch anywhere, FAISS on the CPU.

`nearest_rows` answers the same whichever engine ran: the engine proposes a few more rows than asked, their scores are
computed again in float64, and ties go to the lower row. What lies closer together at the cut than float32 rounds may
still be cut differently; `slack` of the result says how far from undecided the cut was.

FAISS' GPU indices can neither remove nor replace rows, so nothing is indexed: the bank is searched where it lies.
Nothing approximate is here (`avstore.index` has IVF, labelled), and no certificate for CMA (`trainers.positives`).
"""

# legend: N keys, Q queries, k asked for, m proposed, D dimensions

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avstore.errors import ExtraMissingError, UsageError, did_you_mean

ENGINES = ("auto", "faiss", "torch")
EXTRA = 16  # rows proposed beyond those asked for, so that rounding in float32 decides nothing
GPU_MOST = 2048  # rows that FAISS' GPU kernels can return
BUDGET = 512 * 2**20  # bytes of scores at a time
_resources: dict[int, Any] = {}


@dataclass(frozen=True)
class Nearest:
    """scores float32 and rows int64 (Q, k), best first; `engine`: who proposed; `slack` float64 (Q,): by how much the
    k-th score exceeds the next one (infinite where there is none): near 0, the cut is a tie."""

    scores: Tensor
    rows: Tensor
    engine: str
    slack: Tensor


def faiss_flavour() -> str | None:
    """'gpu' or 'cpu', as the FAISS that is installed can compute; None without one."""
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    return "gpu" if hasattr(faiss, "StandardGpuResources") and hasattr(faiss, "knn_gpu") else "cpu"


def choose(engine: str, device: torch.device) -> str:
    """'faiss-cpu', 'faiss-gpu' or 'torch' for rows on `device`.

    auto: FAISS on a CPU (its selection is fused: twice as fast there) and where its GPU build is installed, else torch.
    UsageError for an unknown name, ExtraMissingError where the FAISS that is asked for is not installed."""
    if engine not in ENGINES:
        raise UsageError(f"no search engine {engine!r}", did_you_mean(engine, ENGINES))
    if engine == "torch" or device.type not in ("cpu", "cuda"):
        return "torch"
    flavour = faiss_flavour()
    if device.type == "cuda":
        if flavour == "gpu":
            return "faiss-gpu"
        if engine == "auto":
            return "torch"
        raise ExtraMissingError(
            f"FAISS on {device}", "the FAISS installed here has no GPU part" if flavour else "FAISS is not installed",
            "pip uninstall faiss-cpu && pip install faiss-gpu; or engine=torch, which gives the same rows",
        )  # fmt: skip
    if flavour is None:
        if engine == "auto":
            return "torch"
        raise ExtraMissingError("FAISS is not installed", "", "pip install faiss-cpu, or engine=torch")
    return "faiss-cpu"


@torch.no_grad()
def nearest_rows(
    queries: Tensor, keys: Tensor, k: int, engine: str = "auto", budget: int = BUDGET, check: bool = True
) -> Nearest:
    """The k rows of `keys` (N, D) of largest inner product with each row of `queries` (Q, D), best first, by falling
    score (float64), then rising row. Both float32 on one device, which need not hold more than `budget` bytes of scores
    at a time. `check`: look through all numbers first; blocks of queries on one bank need not pay for it each time.

    UsageError for shapes or dtypes that do not fit, k outside 1 ... N, or numbers that are not finite.
    """
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise UsageError(
            f"queries {tuple(queries.shape)} for keys {tuple(keys.shape)}", "both are matrices of one width"
        )
    if queries.dtype != torch.float32 or keys.dtype != torch.float32 or queries.device != keys.device:
        raise UsageError(
            f"{queries.dtype} queries on {queries.device}, {keys.dtype} keys on {keys.device}",
            "both are float32 on one device",
        )
    if not 1 <= k <= len(keys):
        raise UsageError(f"the {k} nearest of {len(keys)} rows", "between 1 and all of them")
    if budget < 2**20:
        raise UsageError(f"a budget of {budget} bytes", "a mebibyte at least")
    if check and not (bool(torch.isfinite(queries).all()) and bool(torch.isfinite(keys).all())):
        raise UsageError("queries or keys that are not finite", "every comparison with NaN is false")
    chosen = choose(engine, keys.device)
    proposed = min(len(keys), k + EXTRA)
    if chosen == "faiss-gpu" and proposed > GPU_MOST:
        chosen = "torch"
    if not len(queries):
        empty = torch.empty(0, k, device=keys.device)
        return Nearest(empty, empty.long(), chosen, empty.new_empty(0, dtype=torch.float64))
    propose = {"faiss-cpu": _by_faiss, "faiss-gpu": _by_faiss_gpu, "torch": _by_torch}[chosen]
    parts = []
    for some in queries.split(max(1, min(4096, budget // (8 * proposed * keys.shape[1] + 4 * proposed)))):
        parts.append(_rescored(some, keys, propose(some, keys, proposed, budget), k))
    scores, rows, slack = (torch.cat(each) for each in zip(*parts, strict=True))
    return Nearest(scores, rows, chosen, slack)


def _by_faiss(queries: Tensor, keys: Tensor, m: int, budget: int) -> Tensor:
    import faiss

    found = faiss.knn(
        queries.contiguous().numpy(), keys.contiguous().numpy(), m, metric=faiss.METRIC_INNER_PRODUCT
    )[1]  # fmt: skip
    return torch.from_numpy(found)


def _by_faiss_gpu(queries: Tensor, keys: Tensor, m: int, budget: int) -> Tensor:
    import faiss
    import faiss.contrib.torch_utils  # it teaches faiss to take tensors where they lie

    index = keys.device.index or 0
    if index not in _resources:
        made = faiss.StandardGpuResources()
        made.setTempMemory(min(budget, 1 << 30))
        _resources[index] = made
    # for tensors knn_gpu sets FAISS' stream to torch's current one, of the current device
    with torch.cuda.device(index):
        found = faiss.knn_gpu(
            _resources[index], queries.contiguous(), keys.contiguous(), m, metric=faiss.METRIC_INNER_PRODUCT,
            device=index,
        )[1]  # fmt: skip
    return found.long()


def _by_torch(queries: Tensor, keys: Tensor, m: int, budget: int) -> Tensor:
    """Running top-m over blocks of keys; scores, their selection and its indices take about 16 bytes each."""
    columns = max(m, min(len(keys), budget // (16 * len(queries))))
    score = queries.new_full((len(queries), m), -torch.inf)
    found = torch.zeros((len(queries), m), dtype=torch.int64, device=keys.device)
    with full_precision(keys.device.type):
        for start in range(0, len(keys), columns):
            block = keys[start : start + columns]
            s, j = (queries @ block.T).topk(min(m, len(block)), dim=1, sorted=False)
            score, place = torch.cat([score, s], 1).topk(m, dim=1)
            found = torch.cat([found, j + start], 1).gather(1, place)
    return found


def _rescored(queries: Tensor, keys: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of the proposed rows by float64 scores, ties to the lower row, and the gap behind the k-th."""
    found = found.sort(1).values  # so that a stable sort by score leaves equal ones in the order of their rows
    exact = torch.einsum("qd,qmd->qm", queries.double(), keys[found].double())
    score, order = exact.sort(dim=1, descending=True, stable=True)
    gap = score[:, k - 1] - score[:, k] if found.shape[1] > k else torch.full_like(score[:, 0], torch.inf)
    return score[:, :k].float(), found.gather(1, order[:, :k]), gap


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """float32 products as float32, whatever TF32 or autocast the caller has on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
