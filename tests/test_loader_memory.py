"""The hot path makes no arrays of its own, and what it holds is bounded by its slots."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from avstore.loader import Loader
from avstore.sampler import Order
from avstore.views import RandomView
from tests.tiny_store import Tiny, default_spec, make_store

VIDEOS, SLOTS, BATCH = 24, 3, 8


def store(folder: Path, codec: str) -> Path:
    spec = default_spec(codec=codec, height=128, width=176)
    return make_store(folder / f"{codec}.zarr", [Tiny(2.0) for _ in range(VIDEOS)], spec)


def clips(path: Path, **more) -> Loader:
    given = {"frames": 16, "fps": 16, "samples": 8000, "slots": SLOTS, "threads": 1, **more}
    return Loader(path, None, RandomView(), order=Order(VIDEOS, 50, seed=0, batch_size=BATCH), **given)


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_no_array_is_allocated_for_a_clip(tmp_path: Path, codec: str) -> None:
    with clips(store(tmp_path, codec), in_process=True) as loader:
        batches = loader.steps()
        for _ in range(20):  # scratch, plans and open shards are there
            next(batches)
        tracemalloc.start()
        try:
            next(batches)
            start = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            for _ in range(30):
                next(batches)
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    frame = 128 * 176 * 3  # a clip has 16 of these
    assert peak - start < 8 * frame and now - start < 4 * frame, (peak - start, now - start)


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_memory_is_bounded_by_the_slots(tmp_path: Path, codec: str) -> None:
    def held(pid: int) -> int:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(("Pss_Anon:", "Pss_Shmem:")))

    before = held(os.getpid())
    with clips(store(tmp_path, codec)) as loader:
        batches = loader.steps()
        for _ in range(40):
            next(batches)
        early = held(os.getpid()) - before + held(loader.reader_pid)
        for _ in range(110):
            next(batches)
        late = held(os.getpid()) - before + held(loader.reader_pid)
        assert late < loader.nbytes + 200 * 2**20 and late - early < 8 * 2**20, (early, late, loader.nbytes)
