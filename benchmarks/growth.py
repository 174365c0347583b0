"""`bench growth`: what a store costs as it grows: opening, a selection, the first batch, then each clip.

Simulated stores (`benchmarks.scale`: real records and slots over few real shards), each measured in a process of its
own. Every shard of such a store has a name of its own, so that descriptors and mappings come and go as in a real store
of that size; the page cache, which holds the few real shards, does not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avstore import open as open_store
from avstore.errors import AvstoreError, UsageError
from benchmarks.scale import simulate
from benchmarks.table import Table

BATCH, FRAMES = 16, 16
COLUMNS = ("videos", "open s", "open CPU s", "open MB", "select s", "first batch s", "CPU ms/clip", "clips/s",
           "note")  # fmt: skip


def run(
    store: str | os.PathLike[str],
    work: str | os.PathLike[str],
    *,
    videos: Sequence[int] = (100, 1_000, 10_000, 100_000, 240_000, 1_000_000),
    seconds: float = 4.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Table:
    """One row for each number of `videos`. store: the base, see `benchmarks.scale.simulate`. work: a folder for the
    simulated stores, removed one after another. seconds: how long clips are read."""
    if not videos or min(videos) < BATCH:
        raise UsageError(f"stores of {list(videos)} videos", f"a batch has {BATCH}")
    told = progress or (lambda stage, done, total: None)
    rows: list[dict[str, Any]] = []
    folder = Path(work) / "growth.zarr"
    with open_store(store) as base:
        for i, n in enumerate(videos):
            told("growth", i, len(videos))
            shutil.rmtree(folder, ignore_errors=True)
            try:
                simulate(base, folder, n)
                rows.append({"videos": n, **_ask({"store": str(folder), "seconds": seconds})})
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return Table("As the store grows", COLUMNS, rows, (
        f"simulated stores over {base.path.name}: records and slots of so many videos over few real shards, in the "
        f"page cache; clips of {FRAMES} frames, two decode threads, batches of {BATCH}, {seconds:g} s; CPU of the "
        "reader process; open MB: anonymous memory that an open store adds.",
    ))  # fmt: skip


def _ask(given: dict[str, Any]) -> dict[str, Any]:
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", json.dumps(given)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    if done.returncode:
        words = done.stderr.strip().splitlines()
        return {"note": f"failed: {words[-1] if words else done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """One store: opening, a selection without held-out splits, the first batch, then clips for a while."""
    from avstore.loader import Loader
    from avstore.sampler import Order
    from avstore.views import RandomView
    from benchmarks.loader_process import cpu_seconds, memory_bytes

    before, begin, used = memory_bytes([os.getpid()]), time.perf_counter(), time.process_time()
    with open_store(given["store"]) as store:
        out: dict[str, Any] = {
            "open s": round(time.perf_counter() - begin, 2),
            "open CPU s": round(time.process_time() - used, 2),
        }
        out["open MB"] = round((memory_bytes([os.getpid()]) - before) / 2**20)
        begin = time.perf_counter()
        chosen = store.select(held_out=False, need_picture=True)
        out["select s"] = round(time.perf_counter() - begin, 2)
        begin = time.perf_counter()
        order = Order(len(chosen), 4, seed=0, batch_size=BATCH)
        with Loader(store, chosen, RandomView(), order=order, frames=FRAMES, fps=store.spec.fps) as loader:
            batches = loader.steps()
            next(batches)
            out["first batch s"] = round(time.perf_counter() - begin, 2)
            for _ in range(2 * loader.job.slots):
                next(batches)
            reader, clips = [loader.reader_pid], 0
            used, begin = cpu_seconds(reader), time.perf_counter()
            while time.perf_counter() - begin < given["seconds"]:
                clips += len(next(batches))
            out["clips/s"] = round(clips / (time.perf_counter() - begin), 1)
            out["CPU ms/clip"] = round((cpu_seconds(reader) - used) / clips * 1e3, 2)
    if not clips:
        raise AvstoreError("no clips were read")
    return out


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
