"""The memory of videos that no training has moved yet: what networks, as they are, say of each of them.

A bank has the rows of its own selection. A run that goes on from another one with other videos (the temporal model
from an AVID-CMA of all of AudioSet, on its balanced set), or from published weights, fills its bank with this, in one
pass over the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from trainers import distributed
from trainers.embed import embed_videos
from trainers.run import Run

if TYPE_CHECKING:
    from avstore.store import Store

CHUNK = 512  # videos at a time: what is held of them is bounded, and batches are the same for any number of processes


def _nothing(done: int) -> None:
    """Hears nothing."""


@torch.no_grad()
def fill_memory(
    method: nn.Module,
    run: Run,
    store: Store,
    memory_N2D: Tensor,
    *,
    device: str = "auto",
    on_chunk: Callable[[int], None] = _nothing,
) -> tuple[Tensor, Tensor]:
    """(memory (N, 2, D), seen bool (N, 2)) of the videos of `run`, by the towers 'video' and 'audio' of `method`.

    Each row is the mean of the unit embeddings of its video's seconds, of unit length again; `memory_N2D` is what rows
    without that modality keep. Clips and statistics are those of `run`. Processes share the videos; all get the same
    bits. `on_chunk` hears the number of videos done, on every rank equally often. Moves `method` to the device.
    """
    numbers = run.snapshot.numbers
    memory, seen = torch.zeros_like(memory_N2D), torch.zeros(memory_N2D.shape[:2], dtype=torch.bool)
    memory, seen = memory.to(memory_N2D.device), seen.to(memory_N2D.device)
    starts = range(0, len(numbers), CHUNK)
    for done in range(0, len(starts), distributed.world()):
        if done + distributed.rank() < len(starts):
            first = starts[done + distributed.rank()]
            _fill(method, run, store, numbers[first : first + CHUNK], memory, seen, first, device)
        on_chunk(min((done + distributed.world()) * CHUNK, len(numbers)))
    memory = distributed.all_reduce_sum(memory)  # each row is one process' own, zero in the others
    seen = distributed.all_reduce_sum(seen.to(memory.dtype)) > 0
    return torch.where(seen[..., None], memory, memory_N2D), seen


def _fill(
    method: nn.Module,
    run: Run,
    store: Store,
    numbers: np.ndarray,
    memory: Tensor,
    seen: Tensor,
    first: int,
    device: str,
) -> None:
    row = {int(n): first + i for i, n in enumerate(numbers)}
    found = embed_videos(method, run, store, numbers, device=device)
    for column, tower in enumerate(("video", "audio")):
        if tower not in found:
            continue
        vectors, video, _ = found[tower]
        who, place = np.unique(video, return_inverse=True)
        total = np.zeros((len(who), vectors.shape[1]))
        np.add.at(total, place, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        length = np.linalg.norm(total, axis=1, keepdims=True)
        kept = length[:, 0] > 1e-6  # exactly opposite seconds have no mean direction
        rows = torch.tensor([row[int(n)] for n in who[kept]], device=memory.device)
        memory[rows, column] = torch.from_numpy(total[kept] / length[kept]).to(memory)
        seen[rows, column] = True
