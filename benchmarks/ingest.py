"""`bench ingest`: how fast videos become a store, beside a bare loop over the same files on the same cores.

The bare loop decodes, resizes and JPEG-encodes, with ingest's decoder settings, scaler and encoder, and does nothing
else; ingest also probes, decodes the sound, makes spectrograms, checks, hands over, writes and syncs. Both run in turn,
several rounds, each in processes of its own (`benchmarks.ingest_case`), with their starting included. A third run times
the children's stages: where the rest goes. Nothing is printed here.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avstore import open as open_store
from avstore.crew import cpus
from avstore.errors import AvstoreError, NotFoundError, UsageError
from avstore.planning import given_fields
from avstore.sources import read_source
from avstore.spec import Spec
from benchmarks.ingest_worker import DEMUX, ENCODE, PICTURES, RESIZE, REST, STAGES, START
from benchmarks.table import Table

Progress = Callable[[str, int, int], None]
IN_BOTH = (START, DEMUX, PICTURES, RESIZE, ENCODE, REST)
BAR = 0.85  # of the bare loop's speed: the aim


def run(
    source: str | os.PathLike[str],
    work: str | os.PathLike[str],
    *,
    rounds: int = 3,
    workers: int | None = None,
    copies: int = 1,
    profile: str = "112",
    progress: Progress | None = None,
    **options: Any,
) -> list[Table]:
    """Two tables: ingest beside the bare loop; where the time of ingest's cores goes.

    source: a folder of videos. work: a folder for stores (deleted again) and copies. rounds: of both, in turn.
    workers: processes, default one per CPU. copies: every file so many times (hard links in `work`), so that a small
    set takes long enough. profile, options: of the store, as for `avstore.ingest`; frames are JPEG.
    UsageError for counts below 1, NotFoundError where no video has a picture.
    """
    if rounds < 1 or copies < 1 or (workers is not None and workers < 1):
        raise UsageError("nothing to measure", f"{rounds} rounds, {copies} copies, {workers} workers: at least 1")
    told = progress or (lambda stage, done, total: None)
    spec = Spec(**given_fields(profile, None, {**options, "codec": "jpeg"}))
    source, work, workers = Path(source).absolute(), Path(work).absolute(), workers or cpus()
    work.mkdir(parents=True, exist_ok=True)
    if copies > 1:
        source = _copies(source, work / f"{source.name}-{copies}", copies)
    asked = {"source": str(source), "store": str(work / "ingest.zarr"), "workers": workers,
             "options": {"profile": profile, **options, "codec": "jpeg"}}  # fmt: skip
    told("split", 0, 2 * rounds + 1)
    split = _ask("ingest", {**asked, "split": True}, work)  # also warms the page cache
    files = _good(work / "ingest.zarr", source)
    if not files:
        raise NotFoundError(f"no video of {source} has a picture", "there is nothing to encode", "name another folder")
    loop = {"files": files, "workers": workers, "height": spec.height, "width": spec.width, "fps": spec.fps,
            "quality": spec.quality}  # fmt: skip
    bares: list[dict[str, Any]] = []
    fulls: list[dict[str, Any]] = []
    for k in range(rounds):
        told(f"round {k + 1} of {rounds}", 2 * k + 1, 2 * rounds + 1)
        bares.append(_ask("bare", loop, work))
        told(f"round {k + 1} of {rounds}", 2 * k + 2, 2 * rounds + 1)
        fulls.append(_ask("ingest", asked, work))
    shutil.rmtree(work / "ingest.zarr", ignore_errors=True)
    return [_beside(bares, fulls, split, workers, len(files)), _split(bares, split, workers)]


def _copies(source: Path, target: Path, copies: int) -> Path:
    """A folder that holds every file of `source` so many times, as hard links (as copies on another filesystem)."""
    if not (target / "complete").is_file():
        shutil.rmtree(target, ignore_errors=True)
        for entry in read_source(source, exclude=[]).entries:
            for k in range(copies):
                place = target / f"{k:03d}" / entry.path
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source / entry.path, place)
                except OSError:
                    shutil.copyfile(source / entry.path, place)
        (target / "complete").touch()
    return target


def _good(store: Path, source: Path) -> list[str]:
    """The files that became videos with pictures, as paths, in the order of the store."""
    with open_store(store) as opened:
        seen = opened.numbers[opened.has_picture[opened.numbers]]
        return [str(source / opened.paths[n]) for n in seen.tolist()]


def _ask(name: str, given: dict[str, Any], work: Path) -> dict[str, Any]:
    shutil.rmtree(work / "ingest.zarr", ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.ingest_case", name, json.dumps(given)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise AvstoreError(f"the run `{name}` of bench ingest failed", words[-1] if words else str(done.returncode))
    return json.loads(done.stdout.splitlines()[-1])


def _beside(
    bares: list[dict[str, Any]], fulls: list[dict[str, Any]], split: dict[str, Any], workers: int, files: int
) -> Table:
    median, media = statistics.median, split["media"]
    rows = []
    for name, runs in (("bare loop", bares), ("avstore ingest", fulls)):
        wall = median(r["wall"] for r in runs)
        pairs = list(zip(bares, runs, strict=True))
        rows.append({
            "what": name,
            "wall s": round(wall, 2),
            "x real time": round(media / wall, 1),
            "x real time per core": round(media / wall / workers, 1),
            "ratio": median(b["wall"] / r["wall"] for b, r in pairs),
            "ratio once started": median((b["wall"] - b["start"]) / (r["wall"] - r["start"]) for b, r in pairs),
            "CPU s": round(median(r["cpu"] for r in runs), 2),
            "CPU ratio": median(b["cpu"] / r["cpu"] for b, r in pairs),
            "start s": round(median(r["start"] for r in runs), 2),
            "pictures": (bares[0] if name == "bare loop" else split)["calls"].get(ENCODE, 0),
            "JPEG MB" if name == "bare loop" else "store MB": round(runs[0]["bytes"] / 1e6, 1),
        })  # fmt: skip
    columns = ("what", "wall s", "x real time", "x real time per core", "ratio", "ratio once started", "CPU s",
               "CPU ratio", "start s", "pictures", "JPEG MB", "store MB")  # fmt: skip
    notes = (
        f"{files} videos with pictures, {media / 60:.1f} minutes of media, warm; {len(bares)} rounds in turn, medians, "
        f"of ratios too; {workers} processes each, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.",
        f"ratio: the bare loop's wall time over this one's, all included, the aim is {BAR:.2f}; once started: without "
        "the time until all processes are ready; CPU ratio: of CPU seconds, which neighbours disturb less.",
    )
    return Table("Ingest beside a bare loop", columns, rows, notes)


def _split(bares: list[dict[str, Any]], split: dict[str, Any], workers: int) -> Table:
    """Where the cores spent the wall time of the ingest whose children were timed; what the bare loop took."""
    cores = min(workers + 1, cpus())  # the parent may have one of its own
    have = cores * split["wall"]
    own = {k: statistics.median(b["seconds"].get(k, 0.0) for b in bares) for k in IN_BOTH}
    parts: dict[str, float] = {stage: split["seconds"].get(stage, 0.0) for stage in STAGES}
    parts["parent: receive, write, records"] = split["parent"]
    parts["ends of processes"] = max(0.0, split["cpu"] - sum(parts.values()))
    parts["idle"] = max(0.0, have - sum(parts.values()))
    rows: list[dict[str, Any]] = [
        {"stage": name, "CPU s": round(seconds, 2), "share": seconds / have,
         "bare CPU s": round(own[name], 2) if name in own else None,
         "ms per s of media": round(seconds / split["media"] * 1e3, 2)}
        for name, seconds in parts.items()
    ]  # fmt: skip
    notes = (
        f"one more ingest, its children timed: {split['wall']:.2f} s of wall time on {cores} cores; share: of both. "
        f"The parent wrote and synced for {split['write']:.2f} s of wall time, while the children went on.",
        "idle: cores without work of ours: the start, the end, waiting for the disk, and what neighbours took.",
    )
    return Table(
        "Where ingest's time goes", ("stage", "CPU s", "share", "bare CPU s", "ms per s of media"), rows, notes
    )
