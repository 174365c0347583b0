"""`bench loader`, beside: the reader's rate, and the trainer's own, when the main thread keeps the interpreter busy."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from avstore import open as open_store
from benchmarks.contenders_clips import FRAMES
from benchmarks.loader_process import cpu_seconds, family

BATCH = 16


def make_loader(store: Any, threads: int, in_process: bool = False, **more: Any) -> Any:
    """A loader as a trainer uses it, of 16-frame clips at the tape's rate unless `more` says otherwise."""
    from avstore.loader import Loader
    from avstore.sampler import Order
    from avstore.views import RandomView

    order = Order(len(store.select()), 64, seed=0, batch_size=BATCH)
    given = {"frames": FRAMES, "fps": store.spec.fps, **more}
    return Loader(store, None, RandomView(), order=order, threads=threads, in_process=in_process, **given)


def _work(kind: str) -> Callable[[], None]:
    """A unit of work of the main thread, a few milliseconds, that does not wait for anything."""
    if kind == "python":

        def step() -> None:
            total = 0
            for i in range(50_000):
                total += i * i

        return step
    import torch

    torch.set_num_threads(1)
    layers = torch.nn.Sequential(*[m for _ in range(12) for m in (torch.nn.Linear(64, 64), torch.nn.ReLU())])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-4)
    data = torch.randn(16, 64)

    def small_operations() -> None:
        loss = layers(data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return small_operations


def beside(given: dict[str, Any]) -> dict[str, Any]:
    """Rates of reader and main thread, each alone and both at once; work and clips per CPU second likewise."""
    step, seconds = _work(given["work"]), given["seconds"]
    measured: list[dict[str, float]] = []
    with open_store(given["store"]) as store, make_loader(store, 1, given["in_process"]) as loader:
        batches = loader.steps()
        for _ in range(6):
            next(batches)
            step()
        pids = [loader.reader_pid] if not given["in_process"] else []

        def run(steps: bool, clips: bool) -> tuple[float, float, float, float]:
            """(steps, clips) per second, CPU seconds per second of main thread and of all other threads."""
            n = done = 0
            main, every, theirs = time.thread_time(), time.process_time(), cpu_seconds(pids)
            begin = time.perf_counter()
            while (passed := time.perf_counter() - begin) < seconds:
                if steps:
                    step()
                    n += 1
                if clips and (not steps or loader.ready()):
                    done += len(next(batches))
            main, every = time.thread_time() - main, time.process_time() - every
            reader = every - main + cpu_seconds(pids) - theirs
            return n / passed, done / passed, main / passed, reader / passed

        for _ in range(given["rounds"]):
            _settle()
            steps, _, main, _ = run(True, False)  # the reader idles: its slots are full
            for _ in range(loader.job.slots):
                next(batches)
            _, clips, _, reader = run(False, True)
            both = run(True, True)
            measured.append({
                "alone": clips, "beside": both[1], "rate": both[1] / clips, "steps": steps, "steps beside": both[0],
                "step": both[0] / steps, "cores": both[2], "reader": both[3],
                "per core": both[0] / both[2] / (steps / main), "clips per core": both[1] / both[3] / (clips / reader),
            })  # fmt: skip
    m = {k: statistics.median(x[k] for x in measured) for k in measured[0]}
    return {
        "main thread": {"python": "pure Python", "torch": "small torch operations"}[given["work"]],
        "reader": "threads of the trainer" if given["in_process"] else "process",
        "clips/s alone": round(m["alone"], 1),
        "clips/s beside": round(m["beside"], 1),
        "rate beside/alone": m["rate"],
        "steps/s alone": round(m["steps"], 1),
        "steps/s beside": round(m["steps beside"], 1),
        "step beside/alone": m["step"],
        "cores, main": m["cores"],
        "cores, reader": m["reader"],
        "clips per CPU s, beside/alone": m["clips per core"],
        "steps per CPU s, beside/alone": m["per core"],
    }


def _settle() -> None:
    """Waits until the reader has filled its slots and sleeps."""
    pids, before = family(os.getpid()), -1.0
    while (now := cpu_seconds(pids)) - before > 0.02:
        before = now
        time.sleep(0.3)
