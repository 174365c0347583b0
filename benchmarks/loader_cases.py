"""What a trainer does beside the loader, and what it may ask for: the part of `bench loader` without rivals.

* beside (`benchmarks.loader_beside`): a main thread that keeps the interpreter busy;
* along (`benchmarks.loader_along`): waveform, spectrograms, fewer frames per second, half the size: what each costs;
* memory (there too): flat, and bounded by the slots and a constant;
* growth (`benchmarks.growth`, `bench growth` alone): opening, first batch and cost of a clip with 1e2 ... 1e6 videos.

Each measurement runs in a process of its own (`python -m benchmarks.loader_cases NAME JSON`), on the stores that
`benchmarks.loader.prepare` made.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avstore.ingest import ingest
from benchmarks import growth
from benchmarks.contenders_clips import FRAMES, ClipSet
from benchmarks.loader import prepare
from benchmarks.loader_along import along, memory
from benchmarks.loader_beside import beside
from benchmarks.table import Table

Progress = Callable[[str, int, int], None]
RATE, STEP, BEYOND = 0.85, 0.97, 200.0  # the aims: of the rates alone; MB beyond the slots


def run(
    source: str | os.PathLike[str],
    work: str | os.PathLike[str],
    *,
    seconds: float = 2.0,
    rounds: int = 3,
    videos: Sequence[int] = (100, 10_000, 240_000, 1_000_000),
    progress: Progress | None = None,
) -> list[Table]:
    """The four tables. source, work: as in `benchmarks.loader.run`; a 224 store is made too, for the half size."""
    told = progress or (lambda stage, done, total: None)
    clips = prepare(source, work, told)
    large = Path(clips.work) / "jpeg-224.zarr"
    told("ingest", 2, 3)
    ingest(source, large, profile="224")
    given = {"store": str(clips.jpeg), "seconds": seconds, "rounds": rounds}
    return [
        _beside(given, told),
        _along(given, large, told),
        _memory(given, clips, told),
        growth.run(clips.jpeg, clips.work, videos=videos, seconds=seconds, progress=told),
    ]


def _beside(given: dict[str, Any], told: Progress) -> Table:
    rows: list[dict[str, Any]] = []
    for kind in ("python", "torch"):
        for in_process in (False, True):
            told("beside", len(rows), 4)
            row = _ask("beside", {**given, "work": kind, "in_process": in_process})
            if "note" not in row:
                row["reached"] = row["rate beside/alone"] >= RATE and row["step beside/alone"] >= STEP
            rows.append(row)
    columns = ("main thread", "reader", "clips/s alone", "clips/s beside", "rate beside/alone", "steps/s alone",
               "steps/s beside", "step beside/alone", "cores, main", "cores, reader", "clips per CPU s, beside/alone",
               "steps per CPU s, beside/alone", "reached", "note")  # fmt: skip
    notes = (
        f"one decode thread; medians of {given['rounds']} rounds of {given['seconds']:g} s, alone and beside in turn; "
        f"the main thread takes a batch when one is ready and never waits; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}.",
        f"cores: CPU time over wall time beside each other; reached: rate >= {RATE} and step >= {STEP}; per CPU s: "
        "what the same work costs, whoever else had the cores.",
    )
    return Table("Beside a busy main thread", columns, rows, notes)


def _along(given: dict[str, Any], large: Path, told: Progress) -> Table:
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
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for k in range(given["rounds"]):
        for i, (name, more) in enumerate(cases.items()):
            told("along", k * len(cases) + i, given["rounds"] * len(cases))
            found[name].append(_ask("along", {**given, "rounds": 1, **more}))
    rows = []
    for name, answers in found.items():
        failed = next((a for a in [*answers, *found["frames only"]] if "note" in a), None)
        if failed is not None:
            rows.append({"clips": name, **failed})
            continue
        row: dict[str, Any] = {"clips": name}
        for field in ("clips/s", "CPU ms/clip"):
            row[field] = round(statistics.median(a[field] for a in answers), 2)
            pairs = zip(answers, found["frames only"], strict=True)
            row[f"{field} beside frames only"] = statistics.median(a[field] / b[field] for a, b in pairs)
        rows.append(row)
    columns = (
        "clips",
        "clips/s",
        "clips/s beside frames only",
        "CPU ms/clip",
        "CPU ms/clip beside frames only",
        "note",
    )
    notes = (
        f"{FRAMES} frames, two decode threads, {given['rounds']} rounds in turn; CPU time of reader and trainer "
        "together; computed spectrograms: by the trainer's one torch thread, batch by batch, beside them.",
    )
    return Table("What comes along", columns, rows, notes)


def _memory(given: dict[str, Any], clips: ClipSet, told: Progress) -> Table:
    rows: list[dict[str, Any]] = []
    for kind, store in (("jpeg", clips.jpeg), ("raw", clips.raw)):
        for in_process in (False, True):
            told("memory", len(rows), 4)
            row = _ask("memory", {**given, "store": str(store), "in_process": in_process})
            if "note" not in row:
                row["reached"] = row["beyond slots MB"] <= BEYOND
            rows.append({"store": kind, "reader": "threads of the trainer" if in_process else "process", **row})
    columns = ("store", "reader", "slots MB", "at first MB", "at the end MB", "most MB", "beyond slots MB", "reached",
               "allocated at once KB", "clips", "note")  # fmt: skip
    notes = (
        "anonymous and shared memory of trainer and reader together, less what the trainer had before the loader; at "
        f"first: after 16 batches; reached: at most {BEYOND:g} MB beyond the slots.",
        f"allocated at once: by Python and NumPy, seen by tracemalloc over 12 batches; one clip is {FRAMES} frames, "
        "1056 KB.",
    )
    return Table("Memory", columns, rows, notes)


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


CASES = {"beside": beside, "along": along, "memory": memory}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(CASES[sys.argv[1]](json.loads(sys.argv[2]))) + "\n")
