"""`avstore bench pieces`: where the time of a raw clip goes, piece by piece, beside a copy in memory.

One warm shard of a raw store; clips of 16 frames, shuffled, into a ring of shared memory as the loader's slots are;
each piece in turn, several rounds, by one thread and by several. Ratios are of rates to memcpy in the same round,
medians. It tells why the loader's raw path is as fast as it is (docs/results.md): what the kernel's copy costs, what
checksums cost, what Python costs. Not a loader: `bench loader` measures those.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from avstore.cut import cut_frames
from avstore.errors import UsageError
from avstore.shard import LocalReader
from avstore.slots import Memory
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store

FRAMES, RING, HELD = 16, 64, 512  # of a clip; clips of the ring; clips in memory that memcpy copies from
Piece = Callable[[int, int], object]
Progress = Callable[[str, int, int], None]


def run(
    store: Store,
    *,
    threads: Sequence[int] = (1, 2),
    rounds: int = 4,
    seconds: float = 0.35,
    progress: Progress = lambda stage, done, total: None,
) -> Table:
    """One row per piece. store: a raw one with at least one clip of 16 frames. UsageError for another."""
    if rounds < 1 or not seconds > 0 or not threads or min(threads) < 1:
        raise UsageError(f"{rounds} rounds of {seconds} s by {list(threads)} threads", "nothing to measure")
    if store.spec.codec != "raw" or not store.spec.picture:
        raise UsageError(f"{store.path} has no raw frames", "pieces are of copies, not of decoding",
                         "avstore ingest SRC --codec raw, or bench loader's work/raw.zarr")  # fmt: skip
    pieces, clips = _pieces(store)
    order = np.random.default_rng(1).permutation(clips).tolist()
    found: dict[str, dict[int, list[float]]] = {name: {t: [] for t in threads} for name in pieces}
    total, done = len(threads) * rounds * len(pieces), 0
    for count in threads:
        for _ in range(rounds):
            for name, piece in pieces.items():
                found[name][count].append(_rate(piece, order, count, seconds))
                done += 1
                progress("pieces", done, total)
    rows = []
    for name, rates in found.items():
        row: dict[str, Any] = {"piece": name}
        for count in threads:
            row[f"us a clip, {count} thr."] = round(1e6 * count / statistics.median(rates[count]), 1)
            base = found["copy in memory"][count]
            row[f"of memcpy, {count} thr."] = statistics.median(a / b for a, b in zip(rates[count], base, strict=True))
        rows.append(row)
    size = FRAMES * store.spec.height * store.spec.width * 3
    return Table("Pieces of a raw clip", tuple(rows[0]), rows, (
        f"{clips} clips of {FRAMES} frames, {size / 1e6:.2f} MB each, of one warm shard, into {RING} places of shared "
        f"memory; {rounds} rounds of {seconds:g} s in turn; us a clip and thread",
    ))  # fmt: skip


def _pieces(store: Store) -> tuple[dict[str, Piece], int]:
    """What is timed, by name: (clip, place in the ring) -> anything; and how many clips there are."""
    array, spec = store.arrays["frames"], store.spec
    per, shape = spec.shard_seconds * spec.fps, (FRAMES, spec.height, spec.width, 3)
    size = int(np.prod(shape[1:]))
    inside = [n for n in store.numbers.tolist() if int(store.places[n]) < spec.shard_seconds and store.has_picture[n]]
    rows = [int(store.places[n]) * spec.fps + k for n in inside for k in range(0, int(store.frames[n]) // 16 * 16, 16)]
    rows = [r for r in rows if r + FRAMES <= per]
    if not rows:
        raise UsageError(f"{store.path} has no clip of {FRAMES} frames in its first shard", "nothing to read")
    key = array.key(0)
    mapped = LocalReader(store.path, maps=True).mapped(key)
    assert mapped is not None
    at = [int(store.reader.entries(key, r, FRAMES, per)[0]) for r in rows]
    ring = np.frombuffer(Memory(RING * FRAMES * size, shared=True).map, np.uint8, count=RING * FRAMES * size)
    ring = ring.reshape(RING, *shape)
    ring[:] = 1  # every page is there before the first round
    held = np.random.default_rng(0).integers(0, 256, (min(len(rows), HELD), *shape), np.uint8)
    sums = np.empty((FRAMES, 4), np.uint8)
    parts = [[memoryview(x) for i in range(FRAMES) for x in (ring[k, i].reshape(-1), sums[i])] for k in range(RING)]
    flat = [[memoryview(ring[k].reshape(-1))] for k in range(RING)]
    local = threading.local()

    def strided(offset: int) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(mapped[offset:], (FRAMES, size), (size + 4, 1))

    def scratch(clip: int, place: int) -> None:
        if not hasattr(local, "bytes"):
            local.bytes = np.empty(FRAMES * (size + 4), np.uint8)
        store.reader.scatter(key, at[clip], [memoryview(local.bytes)])
        np.copyto(ring[place].reshape(FRAMES, size), local.bytes.reshape(FRAMES, size + 4)[:, :size])

    def cut(clip: int, place: int, check: bool) -> None:
        cut_frames(store.reader, array, per, np.arange(rows[clip], rows[clip] + FRAMES), ring[place], check=check)

    return {
        "copy in memory": lambda clip, place: np.copyto(ring[place], held[clip % len(held)]),
        "copy out of the mapped shard": lambda clip, place: np.copyto(ring[place].reshape(FRAMES, size),
                                                                      strided(at[clip])),
        "one vectored read, frames and checksums": lambda clip, place: store.reader.scatter(key, at[clip],
                                                                                           parts[place]),
        "one plain read": lambda clip, place: store.reader.scatter(key, at[clip], flat[place]),
        "read aside, then copy": scratch,
        "cut_frames by reading": lambda clip, place: cut(clip, place, False),
        "cut_frames by reading, checked": lambda clip, place: cut(clip, place, True),
        "checksums alone": lambda clip, place: [google_crc32c.value(f.reshape(-1)) for f in ring[place]],
    }, len(rows)  # fmt: skip


def _rate(piece: Piece, order: Sequence[int], threads: int, seconds: float) -> float:
    """Clips a second of all threads together."""
    end, counts = time.perf_counter() + seconds, [0] * threads

    def work(thread: int) -> None:
        i = thread
        while time.perf_counter() < end:
            for _ in range(4):
                piece(order[i % len(order)], i % RING)
                i += threads
        counts[thread] = (i - thread) // threads

    begin = time.perf_counter()
    workers = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - begin)
