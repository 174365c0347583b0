"""The clips that all contenders of `bench loader` deliver: where they lie, in what order, packed into records.

A clip is FRAMES consecutive rows of a video on a fixed grid, none overlapping. Every contender's list has all of them,
shuffles them, and has a batch ready when it lies in memory as one uint8 array (or tensor) of decoded frames.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avstore.windows import Extents, Windows

FRAMES = 16


@dataclass(frozen=True)
class ClipSet:
    """Where everything lies, and how it is asked for."""

    work: str
    media: str
    threads: int = 1
    batch: int = 16
    seed: int = 0

    @property
    def jpeg(self) -> Path:
        return Path(self.work) / "jpeg.zarr"

    @property
    def raw(self) -> Path:
        return Path(self.work) / "raw.zarr"

    @property
    def seconds(self) -> Path:
        """The raw frames once more, with an inner chunk of one second."""
        return Path(self.work) / "raw-seconds.zarr"

    def folder(self, name: str) -> Path:
        return Path(self.work) / name


@dataclass(frozen=True)
class Grid:
    """Views for avstore's loader: one clip of the grid, drawn uniformly from those of its video.

    sample_rate, fps: of the store. Over a selection that lists each video once per clip, each clip comes once an epoch
    on average: the same pictures in the same shares as everybody else's exact epochs.
    """

    sample_rate: int
    fps: int
    views: int = 1
    numbers: int = 1

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        count = np.maximum(extents.picture * self.fps // (FRAMES * self.sample_rate), 1)
        k = np.minimum((u[:, 0] * count).astype(np.int64), count - 1)
        start = -(-k * FRAMES * self.sample_rate // self.fps)
        return Windows(start, start, np.zeros(len(start), np.bool_))


def clip_list(path: Path) -> tuple[Any, np.ndarray]:
    """The store and int64 (n, 2): video number and absolute first tape row of each clip."""
    import avstore

    store = avstore.open(path)
    found = [
        (n, int(store.places[n]) * store.spec.fps + k * FRAMES)
        for n in store.numbers.tolist()
        for k in range(int(store.frames[n]) // FRAMES)
    ]
    return store, np.array(found, np.int64).reshape(-1, 2)


def shuffled(clips: ClipSet, n: int) -> Iterator[int]:
    """Clip numbers for ever, each epoch in another order."""
    chance = random.Random(clips.seed)
    while True:
        order = list(range(n))
        chance.shuffle(order)
        yield from order


def payloads(store: Any, row: int) -> list[bytes]:
    """The stored JPEGs of a clip."""
    from avstore.cut import fetch, spans

    array, per = store.arrays["frames"], store.spec.shard_seconds * store.spec.fps
    out: list[bytes] = []
    rows = list(range(row, row + FRAMES))
    for shard, start, stop in spans(rows, per):
        out += [c[:-4].tobytes() for c in fetch(store.reader, array, per, shard, rows[start:stop]) if c is not None]
    return out


def pack(frames: list[bytes]) -> bytes:
    """One record: the lengths, then the JPEGs."""
    return np.array([len(f) for f in frames], "<u4").tobytes() + b"".join(frames)


def unpack(record: bytes) -> np.ndarray:
    """uint8 (16, 128, 176, 3) of a record: libjpeg-turbo, as in all contenders that hold JPEGs."""
    from simplejpeg import decode_jpeg

    lengths = np.frombuffer(record, "<u4", FRAMES).tolist()
    at, view = 4 * FRAMES, memoryview(record)
    first = decode_jpeg(view[at : at + lengths[0]], fastdct=False, fastupsample=False)
    out = np.empty((FRAMES, *first.shape), np.uint8)
    out[0] = first
    for i, length in enumerate(lengths[1:], 1):
        at += lengths[i - 1]
        decode_jpeg(view[at : at + length], "RGB", False, False, 0, 0, 1, out[i])  # in place, as ours
    return out


def in_threads(clips: ClipSet, n: int, do: Callable[[int, np.ndarray], None], shape: tuple[int, ...]) -> Iterator[int]:
    """Batches whose clips are made by `do(clip, row of the batch)` in threads; four batches' memory, used in turn."""
    order = shuffled(clips, n)
    ring = np.zeros((4, clips.batch, *shape), np.uint8)
    with ThreadPoolExecutor(clips.threads) as pool:
        turn = 0
        while True:
            rows = ring[turn % 4]
            picks = [next(order) for _ in range(clips.batch)]
            parts = [list(range(k, clips.batch, clips.threads)) for k in range(clips.threads)]

            def part(mine: list[int], picks: list[int] = picks, rows: np.ndarray = rows) -> None:
                for i in mine:
                    do(picks[i], rows[i])

            list(pool.map(part, parts))
            turn += 1
            yield clips.batch
