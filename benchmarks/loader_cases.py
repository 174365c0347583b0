"""What a trainer does beside the loader, and what it may ask for: the part of `bench loader` without rivals.

* beside: the reader's rate, and the trainer's own, when the main thread keeps the interpreter busy;
* along: waveform, spectrograms, fewer frames per second, half the size: what each costs;
* growth: opening, first batch and CPU time per clip with 1e2 ... 1e6 videos, simulated: records over few real shards.

Each measurement runs in a process of its own (`python -m benchmarks.loader_cases NAME JSON`), on the stores that
`benchmarks.loader.prepare` made.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avstore import open as open_store
from avstore.errors import AvstoreError
from avstore.ingest import ingest
from benchmarks.contenders_clips import FRAMES
from benchmarks.loader import prepare
from benchmarks.loader_process import cpu_seconds, family
from benchmarks.table import Table

BATCH = 16


def run(
    source: str | os.PathLike[str],
    work: str | os.PathLike[str],
    *,
    seconds: float = 2.0,
    rounds: int = 3,
    videos: Sequence[int] = (100, 10_000, 240_000, 1_000_000),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Table]:
    """The three tables. source, work: as in `benchmarks.loader.run`; a 224 store is made too, for the half size."""
    told = progress or (lambda stage, done, total: None)
    clips = prepare(source, work, told)
    large = Path(clips.work) / "jpeg-224.zarr"
    told("ingest", 2, 3)
    ingest(source, large, profile="224")
    store = str(clips.jpeg)
    out = []
    rows: list[dict[str, Any]] = []
    for kind in ("python", "torch"):
        for in_process in (False, True):
            told("beside", len(rows), 4)
            rows.append(_ask("beside", {"store": store, "work": kind, "in_process": in_process, "seconds": seconds,
                                        "rounds": rounds}))  # fmt: skip
    out.append(Table(
        "Beside a busy main thread", ("main thread", "reader", "clips/s alone", "clips/s beside", "rate beside/alone",
                                      "steps/s alone", "steps/s beside", "step beside/alone", "reader's share"),
        rows, (f"one decode thread; medians of {rounds} rounds of {seconds:g} s, alone and beside in turn; the main "
               f"thread takes a batch when one is ready and never waits; {os.cpu_count()} cores, load "
               f"{os.getloadavg()[0]:.1f}.",
               "reader's share: of the CPU time that both used beside each other."),
    ))  # fmt: skip
    rows = []
    cases: dict[str, dict[str, Any]] = {
        "frames only": {},
        "8 fps of a 16-fps tape": {"fps": 8},
        "with 2 s of waveform": {"samples": 48000},
        "with stored crisscross-mel80": {"samples": 48000, "front_end": "crisscross-mel80"},
        "with computed crisscross-mel80": {"samples": 48000, "compute": "crisscross-mel80"},
        "with computed avid-linear257": {"samples": 48000, "compute": "avid-linear257"},
        "224 store at half size": {"store": str(large), "size": [128, 176]},
        "224 store": {"store": str(large)},
    }
    for name, more in cases.items():
        told("along", len(rows), len(cases))
        rows.append({"clips": name, **_ask("along", {"store": store, "seconds": seconds, "rounds": rounds, **more})})
    for row in rows:
        if "CPU ms/clip" in row and "CPU ms/clip" in rows[0]:
            row["CPU beside frames only"] = row["CPU ms/clip"] / rows[0]["CPU ms/clip"]
    out.append(Table("What comes along", ("clips", "clips/s", "CPU ms/clip", "CPU beside frames only", "note"), rows,
                     (f"{FRAMES} frames, two decode threads; CPU time of reader and trainer together; computed "
                      "spectrograms: by the trainer's one torch thread, batch by batch.",)))  # fmt: skip
    rows = []
    for n in videos:
        told("growth", len(rows), len(videos))
        rows.append({"videos": n, **_ask("growth", {"store": store, "videos": n, "seconds": seconds})})
    columns = ("videos", "parse s", "parse CPU s", "first batch s", "first batch CPU s", "CPU ms/clip", "memory MB",
               "note")  # fmt: skip
    notes = (
        "records simulated: the real videos' places over and over, so the same few shards are read; parse: plans and "
        "records of as many videos, from files; first batch: from starting the loader; memory: anonymous and shared, "
        "trainer and reader.",
    )
    out.append(Table("As the store grows", columns, rows, notes))
    return out


def _ask(name: str, given: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.loader_cases", name, json.dumps(given)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        words = done.stderr.strip().splitlines()
        return {"note": f"failed: {words[-1] if words else done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _loader(store: Any, threads: int, in_process: bool = False, **more: Any) -> Any:
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
    """Rates of reader and main thread, each alone and both at once."""
    step, seconds = _work(given["work"]), given["seconds"]
    alone: list[float] = []
    steps_alone: list[float] = []
    both: list[tuple[float, float, float]] = []
    with open_store(given["store"]) as store, _loader(store, 1, given["in_process"]) as loader:
        batches = loader.steps()
        for _ in range(6):
            next(batches)
            step()
        for _ in range(given["rounds"]):
            _settle(loader)
            begin, n = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:  # the reader idles: its slots are full
                step()
                n += 1
            steps_alone.append(n / (time.perf_counter() - begin))
            for _ in range(loader.job.slots):
                next(batches)
            begin, n = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                n += len(next(batches))
            alone.append(n / (time.perf_counter() - begin))
            reader = [loader.reader_pid] if not given["in_process"] else []
            mine, theirs = time.process_time(), cpu_seconds(reader)
            begin, n, clips = time.perf_counter(), 0, 0
            while time.perf_counter() - begin < seconds:
                step()
                n += 1
                if loader.ready():
                    clips += len(next(batches))
            passed = time.perf_counter() - begin
            mine, theirs = time.process_time() - mine, cpu_seconds(reader) - theirs
            both.append((clips / passed, n / passed, theirs / max(mine + theirs, 1e-9)))
    median = statistics.median
    return {
        "main thread": {"python": "pure Python", "torch": "small torch operations"}[given["work"]],
        "reader": "threads of the trainer" if given["in_process"] else "process",
        "clips/s alone": round(median(alone), 1),
        "clips/s beside": round(median(b[0] for b in both), 1),
        "rate beside/alone": median(b[0] / a for a, b in zip(alone, both, strict=True)),
        "steps/s alone": round(median(steps_alone), 1),
        "steps/s beside": round(median(b[1] for b in both), 1),
        "step beside/alone": median(b[1] / s for s, b in zip(steps_alone, both, strict=True)),
        "reader's share": None if given["in_process"] else median(b[2] for b in both),
    }


def _settle(loader: Any) -> None:
    """Waits until the reader has filled its slots and sleeps."""
    pids, before = family(os.getpid()), -1.0
    while (now := cpu_seconds(pids)) - before > 0.02:
        before = now
        time.sleep(0.3)


def along(given: dict[str, Any]) -> dict[str, Any]:
    """Rate and CPU time per clip of one way of asking for clips."""
    compute = given.get("compute")
    more: dict[str, Any] = {
        k: tuple(v) if k == "size" else v for k, v in given.items() if k in ("fps", "samples", "front_end", "size")
    }
    rates, costs = [], []
    with open_store(given["store"]) as store, _loader(store, 2, **more) as loader:
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


CASES = {"beside": beside, "along": along, "growth": growth}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(CASES[sys.argv[1]](json.loads(sys.argv[2]))) + "\n")
