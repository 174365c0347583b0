"""`bench loader`, along and memory: what else comes with the clips, its cost, and how much memory it all takes."""

from __future__ import annotations

import os
import statistics
import time
import tracemalloc
from typing import Any

from avstore import open as open_store
from benchmarks.loader_beside import BATCH, make_loader
from benchmarks.loader_process import cpu_seconds, family, memory_bytes


def along(given: dict[str, Any]) -> dict[str, Any]:
    """Rate and CPU time per clip of one way of asking for clips."""
    compute = given.get("compute")
    more: dict[str, Any] = {
        k: tuple(v) if k == "size" else v for k, v in given.items() if k in ("fps", "samples", "front_end", "size")
    }
    rates, costs = [], []
    with open_store(given["store"]) as store, make_loader(store, given.get("threads", 2), **more) as loader:
        if compute:
            import torch

            from avstore.frontends import spectrogram

            torch.set_num_threads(1)
        batches = loader.steps()
        for _ in range(given["rounds"]):
            for _ in range(loader.job.slots):
                next(batches)
            pids = family(os.getpid())
            used, begin, n = cpu_seconds(pids), time.perf_counter(), 0
            while time.perf_counter() - begin < given["seconds"]:
                batch = next(batches)
                if compute:
                    spectrogram(batch.waveform, compute, store.spec.sample_rate)
                n += len(batch)
            rates.append(n / (time.perf_counter() - begin))
            costs.append((cpu_seconds(pids) - used) / n * 1e3)
    return {"clips/s": round(statistics.median(rates), 1), "CPU ms/clip": round(statistics.median(costs), 2)}


def memory(given: dict[str, Any]) -> dict[str, Any]:
    """Anonymous and shared memory of trainer and reader while the loader runs, in MB; and, in process, the most that
    Python and NumPy had allocated at once on top of what was there when the first epoch began."""
    in_process = given["in_process"]
    with open_store(given["store"]) as store:
        before = memory_bytes(family(os.getpid()))
        with make_loader(store, 2, in_process) as loader:
            batches = loader.steps()
            for _ in range(4 * loader.job.slots):
                next(batches)
            slots = loader.job.slots * loader.job.layout.nbytes
            seen, count, begin = [memory_bytes(family(os.getpid()))], 0, time.perf_counter()
            while (passed := time.perf_counter() - begin) < given["seconds"] * 4 or count < 40 * BATCH:
                count += len(next(batches))
                if passed * 4 > given["seconds"] * len(seen):
                    seen.append(memory_bytes(family(os.getpid())))
            seen.append(memory_bytes(family(os.getpid())))
            most = None
            if in_process:
                tracemalloc.start()
                for _ in range(loader.job.slots):
                    next(batches)
                tracemalloc.reset_peak()
                there = tracemalloc.get_traced_memory()[0]
                for _ in range(12):
                    next(batches)
                most = tracemalloc.get_traced_memory()[1] - there
                tracemalloc.stop()
    mb = 2**20
    return {
        "slots MB": round(slots / mb, 1),
        "at first MB": round((seen[0] - before) / mb, 1),
        "at the end MB": round((seen[-1] - before) / mb, 1),
        "most MB": round((max(seen) - before) / mb, 1),
        "beyond slots MB": round((max(seen) - before - slots) / mb, 1),
        "clips": count,
        "allocated at once KB": None if most is None else round(most / 1024, 1),
    }
