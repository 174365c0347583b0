"""A queue of keys: embeddings of the last clips of one modality, each with the video it came from (MoCo, CM-ACC).

Starts as random directions that belong to no video. It is no buffer of the model on purpose (DDP would broadcast it at
each step); its owner hands it to the checkpoint by `state`. Written by an explicit call, never inside a forward.
"""

# legend: Q length, B batch, D embedding

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from avstore.errors import ConflictError, UsageError
from trainers import distributed, draws


class KeyQueue(nn.Module):
    """`keys` (Q, D) float32 of unit vectors, `rows` (Q,) int64: whose they are (-1: nobody's), `place` () int64: where
    the next one goes. `modality` (0 sight, 1 sound) and `seed` choose the random directions of the start."""

    keys: Tensor
    rows: Tensor
    place: Tensor

    def __init__(self, length: int, dim: int, seed: int, modality: int) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise UsageError(f"a queue of {length} keys x {dim}", "each must be at least 1", "select more videos")
        self.keys = draws.unit_vectors(seed, 0, length, 2, dim)[:, modality].float().contiguous()
        self.rows = torch.full((length,), -1)
        self.place = torch.zeros((), dtype=torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeyQueue:
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        self.keys, self.rows, self.place = fn(self.keys), fn(self.rows), fn(self.place)
        return self

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def push(self, row_B: Tensor, key_BD: Tensor) -> int:
        """Writes these keys over the oldest ones, in their order; of more than Q the last Q. How many were written.

        Every rank must hold the same ones (`in_order`). UsageError for keys that are not finite.
        """
        if not bool(torch.isfinite(key_BD).all()):
            raise UsageError("non-finite keys for the queue", "they would poison every later step")
        row_B, key_BD = row_B[-len(self) :], key_BD[-len(self) :]
        where = (self.place + torch.arange(len(row_B), device=self.place.device)) % len(self)
        # new tensors: a backward pass may still want the old ones
        self.keys = self.keys.index_copy(0, where, key_BD.to(self.keys.dtype))
        self.rows = self.rows.index_copy(0, where, row_B)
        self.place = (self.place + len(row_B)) % len(self)
        return len(row_B)

    def filled(self) -> Tensor:
        """Share of keys that are a video's."""
        return (self.rows >= 0).double().mean()

    def state(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "rows": self.rows, "place": self.place}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a saved queue. ConflictError where it has another length or width."""
        for name, mine in self.state().items():
            if name not in state or state[name].shape != mine.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ConflictError(
                    f"the saved queue's {name} is {found}, this run's {tuple(mine.shape)}",
                    "its length follows the number of videos, its width the embedding",
                    "use the selection and settings of that run, or start a new run with --run",
                )
        self.keys, self.rows, self.place = (state[k].to(x).clone() for k, x in self.state().items())


def in_order(position_B: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The ranks' rows of these tensors, gathered and put in the order of their positions: the same on every rank."""
    order = distributed.all_gather_rows(position_B).argsort()
    return tuple(distributed.all_gather_rows(x)[order] for x in tensors)
