"""`bench loader`, growth: opening, first batch and CPU time per clip of simulated stores."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from avstore import open as open_store
from avstore.errors import AvstoreError
from benchmarks.contenders_clips import FRAMES
from benchmarks.loader_beside import BATCH
from benchmarks.loader_process import cpu_seconds, family


def growth(given: dict[str, Any]) -> dict[str, Any]:
    """Parsing, the first batch and the cost of a clip with many videos."""
    import tempfile

    from avstore.catalogue import Catalogue
    from avstore.loader import Loader
    from avstore.sampler import Order
    from avstore.selection import Selection
    from avstore.views import RandomView
    from benchmarks.loader_process import memory_bytes

    n = given["videos"]
    with open_store(given["store"]) as store, tempfile.TemporaryDirectory() as folder:
        _many_records(store, Path(folder), n)
        begin, used = time.perf_counter(), time.process_time()
        parsed = Catalogue(Path(folder))
        parse, parse_cpu = time.perf_counter() - begin, time.process_time() - used
        if len(parsed) != n:
            raise AvstoreError(f"{len(parsed)} of {n} videos parsed")
        real = store.numbers[store.has_picture[store.numbers]]
        many = real[np.arange(n) % len(real)]
        selection = Selection(many, "simulated", f"{n} simulated videos")
        begin, used = time.perf_counter(), time.process_time()
        order = Order(n, 4, seed=0, batch_size=BATCH)
        with Loader(store, selection, RandomView(), order=order, frames=FRAMES, fps=store.spec.fps) as loader:
            batches = loader.steps()
            next(batches)
            first = time.perf_counter() - begin
            first_cpu = time.process_time() - used + cpu_seconds([loader.reader_pid])
            for _ in range(loader.job.slots):
                next(batches)
            reader, clips = [loader.reader_pid], 0
            used, begin = cpu_seconds(reader), time.perf_counter()
            while time.perf_counter() - begin < given["seconds"] * 2:
                clips += len(next(batches))
            cost = (cpu_seconds(reader) - used) / clips * 1e3
            memory = memory_bytes(family(os.getpid()))
    return {
        "parse s": round(parse, 2),
        "parse CPU s": round(parse_cpu, 2),
        "first batch s": round(first, 2),
        "first batch CPU s": round(first_cpu, 2),
        "CPU ms/clip": round(cost, 2),
        "memory MB": round(memory / 2**20),
    }


def _many_records(store: Any, folder: Path, n: int) -> None:
    """Plans and records of `n` videos in tasks of 256, each a copy of a real one; no shard."""
    from avstore.durable import canonical_json
    from avstore.records import FIELDS, Plan, Record, Task, plan_path, record_path

    for name in ("plans", "commits"):
        (folder / name).mkdir()
    real = store.numbers.tolist()
    picks = [real[i % len(real)] for i in range(n)]
    tasks = [Task(k, k, 1, first, min(256, n - first)) for k, first in enumerate(range(0, n, 256))]
    keys = [f"{i:08d}/{store.keys[p]}" for i, p in enumerate(picks)]
    none: list[str | None] = [None] * n
    plan = Plan(1, store.fingerprint, 0, 0, len(tasks), tasks, keys, keys, none, none,
                [int(store.places[p]) for p in picks], [int(store.slots[p]) for p in picks], [1] * n, none)  # fmt: skip
    plan_path(folder, 1).write_bytes(plan.to_bytes())
    for task in tasks:
        facts = {k: [store.facts[k][picks[i]] for i in task.videos] for k in FIELDS}
        record = Record(task.number, store.fingerprint, {"avstore": "simulated"}, facts)
        record_path(folder, task.number).write_bytes(record.to_bytes())
    attributes = {"avstore": {"format": 1, "spec": store.spec.to_json(), "fingerprint": store.fingerprint}}
    (folder / "zarr.json").write_bytes(canonical_json({"attributes": attributes}))
