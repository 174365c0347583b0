"""`bench loader`: how fast clips come, beside everything else that could bring them, and beside what a trainer does.

From one folder of media: a jpeg store and a raw store of profile 112, and what the other contenders make of the jpeg
store's frames. Contenders run in turn, several rounds, each in a process of its own (`benchmarks.contenders`); a ratio
is the median over rounds of rates measured one after the other. The cases that only concern avstore are in
`benchmarks.loader_cases`. Nothing is printed here; absolute numbers belong to the machine, ratios travel better.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from avstore import open as open_store
from avstore.codecs import MISSING, with_crc
from avstore.cut import cut_frames
from avstore.durable import canonical_json, read_json, write_atomic
from avstore.errors import NotFoundError, UsageError, did_you_mean
from avstore.ingest import ingest
from avstore.records import Record, plan_path, record_path
from avstore.shard import ShardWriter
from avstore.spec import arrays
from benchmarks.contenders import CONTENDERS, FRAMES, ClipSet, all_files, clip_list
from benchmarks.table import Table

Progress = Callable[[str, int, int], None]
LIMITS = {"jpeg": "libjpeg-turbo", "raw": "memcpy"}
JPEG = [*CONTENDERS][: [*CONTENDERS].index("memcpy")]
COLUMNS = ("contender", "clips/s", "ratio", "GB/s", "CPU ms/clip", "CPU ratio", "cold clips/s", "memory MB", "disk MB",
           "note")  # fmt: skip


def run(
    source: str | os.PathLike[str],
    work: str | os.PathLike[str],
    *,
    threads: Sequence[int] = (1, 2),
    rounds: int = 5,
    seconds: float = 1.5,
    cold: bool = True,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Table]:
    """The tables of contenders, jpeg and raw, for each number of `threads`.

    source: a folder of media. work: a folder for what is made of it (gigabytes per hour of media; kept, and used again
    by the same command). rounds x seconds: how long each contender runs. cold: also one epoch after its files were
    dropped from the page cache, as far as that goes without privileges. only: names of contenders, to which the limit
    of their kind is added. UsageError for an unknown name, NotFoundError where there is no picture.
    """
    for name in only:
        if name not in CONTENDERS:
            raise UsageError(f"no contender is called {name!r}", did_you_mean(name, CONTENDERS))
    if rounds < 1 or not seconds > 0 or not threads or min(threads) < 1:
        raise UsageError("nothing to measure", f"{rounds} rounds of {seconds} s with threads {list(threads)}")
    told = progress or (lambda stage, done, total: None)
    clips = prepare(source, work, told)
    names = [n for n in CONTENDERS if not only or n in only or (_limit(n) == n and any(_limit(o) == n for o in only))]
    tables = []
    for count in threads:
        here = ClipSet(clips.work, clips.media, count)
        with _Field(here, names, told) as field:
            field.rounds(rounds, seconds)
            if cold:
                field.cold()
            tables += field.tables(rounds, seconds)
    return tables


def prepare(source: str | os.PathLike[str], work: str | os.PathLike[str], progress: Progress) -> ClipSet:
    """Ingests `source` into the jpeg store, and writes its decoded frames as raw stores, where they are not yet."""
    source, work = Path(source), Path(work)
    work.mkdir(parents=True, exist_ok=True)
    clips = ClipSet(str(work.absolute()), str(source.absolute()))
    progress("ingest", 0, 3)
    ingest(source, clips.jpeg, codec="jpeg")
    if not len(clip_list(clips.jpeg)[1]):
        raise NotFoundError(f"no video of {source} lasts {FRAMES} frames", "there are no clips to read", "name another")
    for i, (path, inner) in enumerate(((clips.raw, 1), (clips.seconds, 0))):
        progress("raw stores", i + 1, 3)
        if not (path / "zarr.json").is_file():
            _write_raw(clips.jpeg, path, inner)
    return clips


def _write_raw(source: Path, target: Path, inner: int) -> None:
    """A copy of a store whose frames are raw, `inner` to an inner chunk (0: a second): the same pixels for everybody.
    With chunks of one frame it is a store of avstore; its arrays but `frames` are those of the source."""
    if target.exists():
        shutil.rmtree(target)
    with open_store(source) as store:
        jpeg = store.arrays["frames"]
        spec = dataclasses.replace(store.spec, codec="raw")
        inner = inner or spec.fps
        array = dataclasses.replace(arrays(spec)["frames"], inner_rows=inner)
        shutil.copytree(source, target, ignore=lambda folder, names: {"frames", "zarr.json"} & set(names)
                        if Path(folder) == source else set())  # fmt: skip
        (target / "frames").mkdir()
        per = spec.shard_seconds * spec.fps
        for shard in range(store.tape_seconds // spec.shard_seconds):
            if not (source / jpeg.key(shard)).is_file():
                continue
            there = store.reader.index(jpeg.key(shard), 0, per, per)[:, 0] != MISSING
            writer = ShardWriter(target / array.key(shard), per // inner)
            for chunk in np.unique(np.flatnonzero(there) // inner).tolist():
                rows = chunk * inner + np.flatnonzero(there[chunk * inner : (chunk + 1) * inner])
                buffer, part = np.zeros((inner, *array.row), np.uint8), np.empty((len(rows), *array.row), np.uint8)
                cut_frames(store.reader, jpeg, per, rows + shard * per, part)
                buffer[rows - chunk * inner] = part
                writer.append(chunk, with_crc(buffer.tobytes()))
            writer.close()
        metadata = array.metadata(spec.shard_seconds, store.tape_seconds)
        write_atomic(target / "frames" / "zarr.json", canonical_json(metadata))
        for plan in store.plans:
            plan.fingerprint = spec.fingerprint
            write_atomic(plan_path(target, plan.number), plan.to_bytes())
            for task in plan.tasks:
                if record_path(target, task.number).is_file():
                    record = Record.read(record_path(target, task.number))
                    record.fingerprint = spec.fingerprint
                    write_atomic(record_path(target, task.number), record.to_bytes())
    root = read_json(source / "zarr.json")
    root["attributes"]["avstore"] |= {"spec": spec.to_json(), "fingerprint": spec.fingerprint}
    write_atomic(target / "zarr.json", canonical_json(root))


def _limit(name: str) -> str:
    return LIMITS["jpeg" if name in JPEG else "raw"]


class _Child:
    """One contender's process, asked by lines of JSON."""

    def __init__(self, name: str, clips: ClipSet) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                       "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.contenders", name, json.dumps(asdict(clips))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def ask(self, **what: Any) -> dict[str, Any]:
        """Its answer; `error` where it has none to give."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": f"its process ended with {self.process.wait()}"}

    def family(self) -> list[int]:
        """Its process and all that come from it."""
        return family(self.process.pid)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        pids = self.family()
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            for pid in pids:
                _signal(pid)
            self.process.wait()
        self.process.stdout.close()


class _Field:
    """The contenders that run, each with its process, and what they have done so far."""

    def __init__(self, clips: ClipSet, names: Sequence[str], progress: Progress) -> None:
        self.clips, self.progress = clips, progress
        self.children: dict[str, _Child] = {}
        self.left_out: dict[str, str] = {}
        self.runs: dict[str, list[dict[str, float]]] = {n: [] for n in names}
        self.colds: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self.names = list(names)

    def __enter__(self) -> _Field:
        for i, name in enumerate(self.names):
            self.progress("make", i, len(self.names))
            child = _Child(name, self.clips)
            made = Path(self.clips.work) / f".made-{name.replace(' ', '-')}"
            answer = {} if made.exists() else child.ask(do="make")
            if "error" not in answer:
                made.touch()
                answer = child.ask(do="run", seconds=0.3)  # warms caches, and shows whether it runs at all
            if "error" in answer:
                self.left_out[name] = str(answer["error"])
                child.close()
            else:
                self.children[name] = child
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children.values():
            child.close()

    def alive(self) -> Iterator[tuple[str, _Child]]:
        for name, child in list(self.children.items()):
            if name not in self.left_out:
                yield name, child

    def rounds(self, rounds: int, seconds: float) -> None:
        for k in range(rounds):
            for i, (name, child) in enumerate(self.alive()):
                self.progress(f"round {k + 1} of {rounds}", i, len(self.children))
                before = cpu_seconds(child.family())
                answer = child.ask(do="run", seconds=seconds)
                if "error" in answer:
                    self.left_out[name] = str(answer["error"])
                    continue
                # what was ready at the beginning was paid for before it, and nothing is left over at the end
                answer["cpu"] = (cpu_seconds(child.family()) - before) / answer["clips"]
                self.runs[name].append(answer)
                self.peak[name] = max(self.peak.get(name, 0.0), memory_bytes(child.family()) / 2**20)

    def cold(self) -> None:
        """One epoch after everybody's files were dropped; what was ready before is not counted."""
        n = len(clip_list(self.clips.jpeg)[1])
        for i, (name, child) in enumerate(self.alive()):
            self.progress("cold", i, len(self.children))
            if name in LIMITS.values() or name == "torch in memory":
                continue
            child.ask(do="drop")
            counted = n - CONTENDERS[name].ahead * self.clips.batch
            if counted < self.clips.batch:
                continue  # a set as small as this is ready before it is cold
            answer = child.ask(do="run", seconds=20, clips=counted)
            if "error" not in answer:
                self.colds[name] = answer["clips"] / answer["seconds"]

    def tables(self, rounds: int, seconds: float) -> list[Table]:
        spec = open_store(self.clips.jpeg).spec
        pixels = FRAMES * spec.height * spec.width * 3 / 1e9
        count = len(clip_list(self.clips.jpeg)[1])
        out = []
        for kind, limit in LIMITS.items():
            rows = [self._row(n, limit, pixels) for n in self.names if _limit(n) == limit]
            if not rows:
                continue
            out.append(Table(
                f"Loader, {kind}, {self.clips.threads} thread{'s' if self.clips.threads > 1 else ''}", COLUMNS, rows,
                (f"{count} clips of {FRAMES} frames {spec.height}x{spec.width}, shuffled, warm, batches of "
                 f"{self.clips.batch}; {rounds} rounds of {seconds:g} s; {os.cpu_count()} cores, load "
                 f"{os.getloadavg()[0]:.1f}.",
                 f"ratio: of rates, to {limit} in the same round, median; CPU ratio: of CPU time per clip, likewise, "
                 "which neighbours on the machine disturb less.",
                 "FFCV is not among them: no wheel is published, and its build asks for OpenCV's headers.",
                 "memory: anonymous and shared, of all processes of a contender; cold: first epoch after "
                 "posix_fadvise(DONTNEED)."),
            ))  # fmt: skip
        return out

    def _row(self, name: str, limit: str, pixels: float) -> dict[str, Any]:
        contender = CONTENDERS[name]
        runs = self.runs[name]
        if name in self.left_out or not runs:
            return {"contender": name, "note": f"left out: {self.left_out.get(name, 'no answer')}"}
        rate = statistics.median(r["clips"] / r["seconds"] for r in runs)
        limits = self.runs.get(limit, [])
        pairs = list(zip(runs, limits, strict=False))
        disk = sum(f.stat().st_size for f in all_files(contender.files(self.clips)))
        return {
            "contender": name,
            "clips/s": round(rate, 1),
            "ratio": statistics.median(a["clips"] / a["seconds"] / (b["clips"] / b["seconds"]) for a, b in pairs)
            if pairs else None,
            "GB/s": round(rate * pixels, 2),
            "CPU ms/clip": round(statistics.median(r["cpu"] for r in runs) * 1e3, 2),
            "CPU ratio": statistics.median(b["cpu"] / a["cpu"] for a, b in pairs) if pairs else None,
            "cold clips/s": round(self.colds[name], 1) if name in self.colds else None,
            "memory MB": round(self.peak[name]),
            "disk MB": round(disk / 1e6, 1),
            "note": contender.what,
        }  # fmt: skip


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(stat[1]), []).append(int(entry.name))
    out, todo = [], [pid]
    while todo:
        one = todo.pop()
        out.append(one)
        todo += parents.get(one, [])
    return out


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of these processes, user and system."""
    total = 0.0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_bytes(pids: Sequence[int]) -> int:
    """Anonymous and shared memory of these processes, what they share counted once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def _signal(pid: int) -> None:
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
