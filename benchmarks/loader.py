"""`bench loader`: how fast clips come, beside everything else that could bring them, and beside what a trainer does.

From one folder of media: a jpeg store and a raw store of profile 112, and what the other contenders make of the jpeg
store's frames. Contenders run in turn, several rounds, each in a process of its own (`benchmarks.contenders`); a ratio
is the median over rounds of rates measured one after the other. The cases that only concern avstore are in
`benchmarks.loader_cases`. Nothing is printed here; absolute numbers belong to the machine, ratios travel better.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from avstore import open as open_store
from avstore.errors import NotFoundError, UsageError, did_you_mean
from avstore.ingest import ingest
from benchmarks.contenders import CONTENDERS, all_files
from benchmarks.contenders_clips import FRAMES, ClipSet, clip_list
from benchmarks.loader_process import Child, cpu_seconds, memory_bytes
from benchmarks.loader_stores import write_raw
from benchmarks.table import Table

Progress = Callable[[str, int, int], None]
COLD = 5.0  # seconds of the cold epoch at most
LIMITS = {"jpeg": "libjpeg-turbo", "raw": "memcpy"}
JPEG = [*CONTENDERS][: [*CONTENDERS].index("memcpy")]
COLUMNS = ("contender", "clips/s", "ratio", "GB/s", "CPU ms/clip", "CPU ratio", "cold clips/s", "first batch s",
           "memory MB", "disk MB", "note")  # fmt: skip
JPEG_RIVALS = ("webdataset", "mosaicml-streaming", "litdata", "ffcv")
BARS = (  # what is asked of 16-frame clips, shuffled, warm: ours, the fastest of these, times
    ("avstore jpeg", ("libjpeg-turbo",), 0.90),
    ("avstore jpeg", JPEG_RIVALS, 1.3),
    ("avstore jpeg", ("pyav on the fly",), 15.0),
    ("avstore raw", ("memcpy",), 0.70),
    ("avstore raw", ("tensorstore", "tensorstore batched"), 1.5),
    ("avstore raw", ("zarr-python",), 10.0),
)


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
    """The tables of contenders, jpeg and raw, and of the bars that they are to clear, for each number of `threads`.

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
            write_raw(clips.jpeg, path, inner)
    return clips


def _rate(run: dict[str, float]) -> float:
    return run["clips"] / run["seconds"]


def _limit(name: str) -> str:
    return LIMITS["jpeg" if name in JPEG else "raw"]


class _Field:
    """The contenders that run, each with its process, and what they have done so far."""

    def __init__(self, clips: ClipSet, names: Sequence[str], progress: Progress) -> None:
        self.clips, self.progress = clips, progress
        self.children: dict[str, Child] = {}
        self.left_out: dict[str, str] = {}
        self.runs: dict[str, list[dict[str, float]]] = {n: [] for n in names}
        self.colds: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self.names = list(names)

    def __enter__(self) -> _Field:
        for i, name in enumerate(self.names):
            self.progress("make", i, len(self.names))
            child = Child(name, self.clips)
            made = Path(self.clips.work) / f".made-{name.replace(' ', '-')}"
            answer = {} if made.exists() else child.ask(do="make")
            if "error" not in answer:
                made.touch()
                answer = child.ask(do="start")
                self.first[name] = answer.get("first", 0.0)
            if "error" not in answer:
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

    def alive(self) -> Iterator[tuple[str, Child]]:
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
            answer = child.ask(do="run", seconds=COLD, clips=counted)
            if "error" not in answer:
                self.colds[name] = answer["clips"] / answer["seconds"]

    def tables(self, rounds: int, seconds: float) -> list[Table]:
        spec = open_store(self.clips.jpeg).spec
        pixels = FRAMES * spec.height * spec.width * 3 / 1e9
        count = len(clip_list(self.clips.jpeg)[1])
        words = f"{self.clips.threads} thread{'s' if self.clips.threads > 1 else ''}"
        out = []
        for kind, limit in LIMITS.items():
            rows = [self._row(n, limit, pixels) for n in self.names if _limit(n) == limit]
            if not rows:
                continue
            out.append(Table(
                f"Loader, {kind}, {words}", COLUMNS, rows,
                (f"{count} clips of {FRAMES} frames {spec.height}x{spec.width}, the same for all, shuffled, warm; done "
                 f"is a batch of {self.clips.batch} in memory, uint8; {rounds} rounds of {seconds:g} s in turn; "
                 f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.",
                 f"ratio: of rates, to {limit} in the same round, median; CPU ratio: of CPU time per clip, likewise, "
                 "which neighbours on the machine disturb less.",
                 f"cold: first epoch, its first {COLD:g} s, after posix_fadvise(DONTNEED); first batch: from nothing, "
                 "imports included, the cost of a tiny set; memory: anonymous and shared, of all processes of a "
                 "contender."),
            ))  # fmt: skip
        bars = [row for bar in BARS if (row := self._bar(*bar)) is not None]
        if bars:
            columns = ("ours", "theirs", "ratio", "aim", "reached", "CPU ratio")
            notes = ("ratio, CPU ratio: as above, to the fastest of those asked for, median over rounds.",)
            out.append(Table(f"Bars, {words}", columns, bars, notes))
        return out

    def _bar(self, ours: str, theirs: Sequence[str], aim: float) -> dict[str, Any] | None:
        """One bar; None where either side did not run."""
        rate = {n: statistics.median(_rate(r) for r in self.runs[n]) for n in (ours, *theirs) if self._ran(n)}
        rivals = [n for n in theirs if n in rate]
        if ours not in rate or not rivals:
            return None
        best = max(rivals, key=rate.__getitem__)
        pairs = list(zip(self.runs[ours], self.runs[best], strict=False))
        ratio = statistics.median(_rate(a) / _rate(b) for a, b in pairs)
        return {"ours": ours, "theirs": best, "ratio": ratio, "aim": aim, "reached": ratio >= aim,
                "CPU ratio": statistics.median(b["cpu"] / a["cpu"] for a, b in pairs)}  # fmt: skip

    def _ran(self, name: str) -> bool:
        return bool(self.runs.get(name)) and name not in self.left_out

    def _row(self, name: str, limit: str, pixels: float) -> dict[str, Any]:
        contender = CONTENDERS[name]
        runs = self.runs[name]
        if not self._ran(name):
            return {"contender": name, "note": f"left out: {self.left_out.get(name, 'no answer')}"}
        rate = statistics.median(_rate(r) for r in runs)
        limits = self.runs.get(limit, [])
        pairs = list(zip(runs, limits, strict=False))
        disk = sum(f.stat().st_size for f in all_files(contender.files(self.clips)))
        return {
            "contender": name,
            "clips/s": round(rate, 1),
            "ratio": statistics.median(_rate(a) / _rate(b) for a, b in pairs) if pairs else None,
            "GB/s": round(rate * pixels, 2),
            "CPU ms/clip": round(statistics.median(r["cpu"] for r in runs) * 1e3, 2),
            "CPU ratio": statistics.median(b["cpu"] / a["cpu"] for a, b in pairs) if pairs else None,
            "cold clips/s": round(self.colds[name], 1) if name in self.colds else None,
            "first batch s": round(self.first[name], 2),
            "memory MB": round(self.peak[name]),
            "disk MB": round(disk / 1e6, 1),
            "note": contender.what,
        }  # fmt: skip
