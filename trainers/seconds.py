"""Which clips an embedding of the whole tape is made of: one centred on each second of each video.

The order and the views that `embedder.py` gives to the loader. Both are unpickled in the reader process, so this file
imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.sampler import Indices, SequentialOrder
from avstore.windows import Extents, Windows

if TYPE_CHECKING:
    from avstore.store import Store


@dataclass(frozen=True)
class SecondView:
    """Clip of second `draw`: pictures and sound centred at draw + 1/2 s, each moved back into the video where it would
    stick out, to its start where the video is shorter. Start = clip(centre - length // 2, 0, end - length), in samples.
    """

    sample_rate: int
    views: int = 1
    numbers: int = 0

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        centre = np.asarray(draw, np.int64) * self.sample_rate + self.sample_rate // 2
        return Windows(
            np.clip(centre - picture // 2, 0, np.maximum(extents.picture - picture, 0)),
            np.clip(centre - sound // 2, 0, np.maximum(extents.sound_end - sound, 0)),
            np.zeros(len(centre), np.bool_),
        )


class ListedOrder(SequentialOrder):
    """The (row, second) pairs of two lists, in batches, in their order. rows, seconds: int64 (n,), n >= 1."""

    def __init__(self, n_videos: int, rows: Indices, seconds: Indices, batch_size: int) -> None:
        super().__init__(n_videos, 1, batch_size=batch_size)
        self.rows, self.seconds = np.asarray(rows, np.int64), np.asarray(seconds, np.int64)
        self.length = len(self.rows)
        self.batches = -(-self.length // batch_size)

    def pairs(self, epoch: int, start: int, stop: int) -> tuple[Indices, Indices]:
        return self.rows[start:stop], self.seconds[start:stop]


def seconds_of_videos(store: Store, numbers: np.ndarray, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(rows into `numbers`, seconds), int64 each: every begun second of each video, in order."""
    counts = np.array([-(-store.seconds(int(n)) // 1) for n in numbers], np.int64)
    rows = np.repeat(np.arange(len(numbers)), counts)
    seconds = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = seconds % every == 0
    return rows[keep], seconds[keep]
