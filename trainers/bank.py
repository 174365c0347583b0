"""The memory bank: for every video of the selection a slowly moving embedding of its sight and one of its sound.

ONE tensor (N, 2, D): `memory[:, 0]` sight, `memory[:, 1]` sound, and `memory.flatten(1)` is a *view* of the rows
[v|a] that FAISS searches in place. Row = place of the video in the selection. It is no buffer of the model on
purpose: DistributedDataParallel would broadcast it at each step (0.9 GB for AudioSet), and it belongs to the run's
method state, not to the encoders' weights. It is updated by an explicit call, never inside a forward.
"""

# legend: N rows, B batch, U distinct rows of a batch, K negatives, D embedding

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError
from trainers import distributed, draws

_BLOCK = 16384  # rows initialised at a time: 16384 x 256 float64 words are 34 MB


class MemoryBank(nn.Module):
    """`memory` (N, 2, D) float32 of unit vectors and `seen` (N, 2) bool: which of them ever took an embedding.

    Starts as normalised Gaussian noise, a pure function of (seed, row). Moves with the module that owns it
    (`.to(device)`, `.double()`), but is in no state_dict: see `state` and `load_state`.
    """

    memory: Tensor
    seen: Tensor

    def __init__(self, rows: int, dim: int, seed: int, momentum: float = 0.5) -> None:
        super().__init__()
        if rows < 2 or dim < 1:
            raise UsageError(
                f"a memory bank of {rows} rows x {dim}", "a contrast needs at least two videos", "select more videos"
            )
        if not 0 <= momentum < 1:
            raise UsageError(f"bank momentum {momentum}", "it must lie in [0, 1); AVID uses 0.5")
        self.momentum = momentum
        self.memory = torch.empty(rows, 2, dim)
        for first in range(0, rows, _BLOCK):
            last = min(rows, first + _BLOCK)
            self.memory[first:last] = draws.unit_vectors(seed, first, last, 2, dim)
        self.seen = torch.zeros(rows, 2, dtype=torch.bool)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        self.memory, self.seen = fn(self.memory), fn(self.seen)
        return self

    def __len__(self) -> int:
        return len(self.memory)

    @torch.no_grad()
    def update(self, position_B: Tensor, row_B: Tensor, embedding_B2D: Tensor, mask_B2: Tensor) -> dict[str, float]:
        """m <- normalise(momentum * m + (1 - momentum) * e), once per row and modality, over the global batch.

        All ranks' samples are gathered and put in the order of their positions; where a video occurs more than once,
        e is the mean of its embeddings. So every rank writes the same bits, whatever the number of ranks. A masked
        modality leaves its row as it was. Returns how many samples, rows and duplicates there were.

        Raises UsageError for rows outside the bank, positions that occur twice, and non-finite embeddings.
        """
        position, row = distributed.all_gather_rows(position_B), distributed.all_gather_rows(row_B)
        embedding = distributed.all_gather_rows(embedding_B2D.to(self.memory.dtype))
        mask = distributed.all_gather_rows(mask_B2)
        if len(row) == 0:
            return {"samples": 0, "rows": 0, "duplicates": 0}
        order = position.argsort()
        position, row, embedding, mask = position[order], row[order], embedding[order], mask[order]
        if bool((position[1:] == position[:-1]).any()):
            raise UsageError("two samples of a batch share a position", "the order of duplicates would be undefined")
        if int(row.min()) < 0 or int(row.max()) >= len(self):
            raise UsageError(
                f"bank rows {int(row.min())} to {int(row.max())} in a bank of {len(self)} rows",
                "the batch is of another selection than the bank",
            )
        if not bool(torch.isfinite(embedding[mask]).all()):
            raise UsageError("non-finite embeddings for the memory bank", "they would poison every later step")

        rows_U, group_B = row.unique(return_inverse=True)
        total_U2D = self.memory.new_zeros(len(rows_U), 2, embedding.shape[2])
        count_U2 = self.memory.new_zeros(len(rows_U), 2)
        for chosen in _rounds(group_B):
            # within a round every row occurs once: the sums have one order, also on a GPU
            part = group_B[chosen]
            total_U2D[part] += torch.where(mask[chosen][..., None], embedding[chosen], 0)
            count_U2[part] += mask[chosen].to(count_U2.dtype)
        mean_U2D = total_U2D / count_U2.clamp(min=1)[..., None]
        old_U2D = self.memory[rows_U]
        moved_U2D = self.momentum * old_U2D + (1 - self.momentum) * mean_U2D
        # exactly opposite vectors have no mean direction: such a row stays
        keep_U2 = (count_U2 == 0) | (moved_U2D.norm(dim=-1) < 1e-6)
        self.memory[rows_U] = torch.where(keep_U2[..., None], old_U2D, F.normalize(moved_U2D, dim=-1))
        self.seen[rows_U] |= count_U2 > 0
        return {"samples": len(row), "rows": len(rows_U), "duplicates": len(row) - len(rows_U)}

    def complete(self) -> Tensor:
        """(N,) bool: rows whose sight and sound were both ever embedded; the others hold noise."""
        return self.seen.all(1)

    def checksum(self) -> int:
        """An integer of all bits of the memory, equal on ranks that hold the same bank."""
        words = self.memory.contiguous().view(torch.int32).flatten(1).long()
        weights = draws.mix(torch.arange(words.shape[1], device=words.device))
        place = draws.mix(torch.arange(len(words), device=words.device))
        return int((draws.mix((words * weights).sum(1)) * (place | 1)).sum())

    def state(self) -> dict[str, Tensor]:
        return {"memory": self.memory, "seen": self.seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a saved bank. Raises ConflictError where it has other rows or another width."""
        for name, mine in self.state().items():
            if name not in state or state[name].shape != mine.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ConflictError(
                    f"the saved bank's {name} is {found}, this run's {tuple(mine.shape)}",
                    "bank rows are the videos of the selection and columns the embedding's width",
                    "use the selection and the embedding width of that run, or start a new run with --run",
                )
        self.memory = state["memory"].to(self.memory).clone()
        self.seen = state["seen"].to(self.seen).clone()


def _rounds(group_B: Tensor) -> list[Tensor]:
    """Indices split so that each group occurs at most once per round, in order: first occurrences, second, ..."""
    order = group_B.argsort(stable=True)
    ordered = group_B[order]
    index = torch.arange(len(ordered), device=ordered.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    occurrence = index - torch.where(starts, index, 0).cummax(0).values
    return [order[occurrence == n] for n in range(int(occurrence.max()) + 1)]


@torch.no_grad()
def estimate_partition(score_BK: Tensor, mask_B: Tensor) -> Tensor:
    """Z = mean exp(score) over the noise of the first global batch; a 0-dim float64 tensor, to be frozen and saved.

    Sum and count are all-reduced, so that ranks with fewer valid samples weigh less. About 2.2 at random init with
    D = 128 and temperature 0.07: E exp(u / t) with u the cosine of random directions. Raises UsageError without any
    valid sample.
    """
    total = torch.where(mask_B[:, None], score_BK.double().exp(), 0).sum()
    count = (mask_B.sum() * score_BK.shape[1]).double()
    total, count = distributed.all_reduce_sum(torch.stack([total, count]))
    if int(count) == 0:
        raise UsageError(
            "no partition constant from the first batch",
            "none of its clips has both picture and sound",
            "drop such videos from the selection",
        )
    return total / count
