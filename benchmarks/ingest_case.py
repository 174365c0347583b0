"""What `bench ingest` runs, each in a process of its own (`python -m benchmarks.ingest_case NAME JSON`).

* `bare`: as many processes as ingest has children, each a loop that decodes, resizes and JPEG-encodes file after file,
  with the same decoder settings, scaler, geometry and encoder, and does nothing else: no probe, no sound, no checksum,
  no store.
* `ingest`: `avstore.ingest` into a new store. `split`: the same, its children timed by `benchmarks.ingest_worker`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.ingest_worker import DEMUX, ENCODE, PICTURES, RESIZE, REST, START, Watch


def bare_file(path: str, given: dict[str, Any], watch: Watch) -> int:
    """Decodes one file, resizes and encodes each picture that a clock of `fps` shows; returns their bytes."""
    import av
    import numpy as np
    from av.video.reformatter import VideoReformatter

    from avstore.codecs import encode_jpeg
    from avstore.fit import fit
    from avstore.pictures import SCALER

    into, fps, quality = (given["height"], given["width"]), given["fps"], given["quality"]
    scaler, total = VideoReformatter(), 0

    def put(frame: Any) -> int:
        with watch.stage(RESIZE):
            how = fit(frame.width, frame.height, into, aspect=stream.sample_aspect_ratio or Fraction(1))
            small = scaler.reformat(frame, *how.scale, "gbrp", interpolation=SCALER, threads=1)
            planes: Any = small.planes
            width, height = how.scale
            green, blue, red = (np.ndarray((height, width), np.uint8, p, strides=(p.line_size, 1)) for p in planes)
            picture = how.lay((red, green, blue))
        with watch.stage(ENCODE):
            return len(encode_jpeg(picture, quality))

    with av.open(path) as file:
        stream: Any = file.streams.best("video")
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        base: Any = stream.time_base
        first: int | None = None
        last: Any = None
        shown = 0
        packets: Any = file.demux(stream)
        while True:
            with watch.stage(DEMUX):
                packet = next(packets, None)
            if packet is None:
                break
            with watch.stage(PICTURES):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    continue
            for frame in frames:
                if frame.pts is None:
                    continue
                first = frame.pts if first is None else first
                row = ceil((frame.pts - first) * base * fps)
                if last is not None and row > shown:
                    total += put(last)
                last, shown = frame, row
        if (
            last is not None
            and first is not None
            and shown < ceil((last.pts + (last.duration or 1) - first) * base * fps)
        ):
            total += put(last)
    return total


def _bare_child(given: dict[str, Any], files: Any, told: Any) -> None:
    import av
    import numpy
    import simplejpeg

    assert av and numpy and simplejpeg  # imported before it says that it is ready
    watch, size = Watch(), 0
    watch.seconds[START] = time.process_time()
    told.put({"ready": time.time()})
    while (path := files.get()) is not None:
        with watch.stage(REST):
            size += bare_file(path, given, watch)
    told.put({"seconds": watch.seconds, "calls": watch.calls, "bytes": size, "cpu": time.process_time()})


def bare(given: dict[str, Any]) -> dict[str, Any]:
    """files, workers, height, width, fps, quality -> wall, start, cpu (all processes), seconds and calls by stage."""
    context = multiprocessing.get_context("spawn")
    begin = time.time()
    files: Any = context.Queue()
    told: Any = context.Queue()
    for path in [*given["files"], *[None] * given["workers"]]:
        files.put(path)
    children = [context.Process(target=_bare_child, args=(given, files, told)) for _ in range(given["workers"])]
    for child in children:
        child.start()
    answers: list[dict[str, Any]] = []
    while len(answers) < 2 * len(children):
        try:
            answers.append(told.get(timeout=1))
        except Exception:
            if any(child.exitcode for child in children):
                raise RuntimeError("a process of the bare loop ended early") from None
    wall = time.time() - begin
    for child in children:
        child.join()
    ready = max(a["ready"] for a in answers if "ready" in a) - begin
    return {**_sum([a for a in answers if "seconds" in a]), "wall": wall, "start": ready, "cpu": _cpu()}


def ingested(given: dict[str, Any]) -> dict[str, Any]:
    """source, store, workers, options -> wall, start, cpu, seconds of media, `write`: wall seconds of shards, records
    and plans, fsync included; with `split`: also seconds and calls by stage of the children."""
    from avstore import children, ingest, planning, tasks

    walls = {"write": 0.0}
    started: list[float] = []
    begin = time.time()

    def walled(function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            since = time.time()
            try:
                return function(*args, **named)
            finally:
                walls["write"] += time.time() - since

        return call

    class Child(children.Child):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            started.append(time.time() - begin)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(children, "Child", Child):
        real = subprocess.Popen

        def popen(args: list[str], **named: Any) -> Any:
            if args[-2:-1] == ["avstore.worker"]:
                args = [*args[:-2], "benchmarks.ingest_worker", args[-1], folder]
            return real(args, **named)

        patches = [mock.patch.object(tasks.TaskWriter, name, walled(getattr(tasks.TaskWriter, name)))
                   for name in ("add", "commit")]  # fmt: skip
        patches.append(mock.patch.object(planning, "write_plan", walled(planning.write_plan)))
        if given.get("split"):
            patches.append(mock.patch.object(subprocess, "Popen", popen))
        for patch in patches:
            patch.start()
        summary = ingest(given["source"], given["store"], workers=given["workers"], **given["options"])
        wall = time.time() - begin
        for patch in patches:
            patch.stop()
        stages = _sum([json.loads(p.read_text()) for p in Path(folder).glob("*.json")])
    return {
        **stages, **walls, "wall": wall, "start": max(started, default=0.0), "cpu": _cpu(),
        "parent": time.process_time(), "media": summary.seconds, "ok": summary.ok, "failed": summary.failed,
        "bytes": summary.size,
    }  # fmt: skip


def _sum(parts: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"seconds": {}, "calls": {}, "bytes": sum(p.get("bytes", 0) for p in parts)}
    for kind in ("seconds", "calls"):
        for part in parts:
            for name, value in part[kind].items():
                out[kind][name] = out[kind].get(name, 0) + value
    return out


def _cpu() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in uses)


CASES = {"bare": bare, "ingest": ingested}

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    answer = CASES[sys.argv[1]](json.loads(sys.argv[2]))
    sys.stdout.write(json.dumps(answer) + "\n")
