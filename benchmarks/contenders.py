"""Contenders of `bench loader`: the same clips, kept and delivered by avstore and by others, each as its users would.

Every contender runs in a process of its own (`python -m benchmarks.contenders NAME JSON`), so that memory is its own, a
package that breaks breaks alone, and none disturbs another's imports. It answers lines of JSON on stdin with lines on
stdout; `benchmarks.loader_process` asks. A contender is two functions: one that makes its files from the jpeg store
(once), and one that yields the clips of batch after batch, shuffled, for ever: `benchmarks.contenders_arrays`,
`_records`, `_source`. Frames are ready as uint8 in memory when counted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import contenders_arrays as arrays
from benchmarks import contenders_records as records
from benchmarks import contenders_source as source
from benchmarks.contenders_clips import ClipSet


@dataclass(frozen=True)
class Contender:
    """`batches` yields the number of clips in each batch. `ahead`: batches it may hold ready, not counted at first."""

    batches: Callable[[ClipSet], Iterator[int]]
    files: Callable[[ClipSet], list[Path]]
    make: Callable[[ClipSet], None] = lambda clips: None
    ahead: int = 0
    what: str = ""


def _frames(path: str) -> Callable[[ClipSet], list[Path]]:
    return lambda clips: [getattr(clips, path) / "frames"]


def _media(clips: ClipSet) -> list[Path]:
    return [Path(clips.media)]


def _array(kind: str, batched: bool = False, path: str = "raw") -> Contender:
    """Zarr by others: kind zarr-python, zarrs or tensorstore; path raw (a frame to a chunk) or seconds."""
    what = "; ".join(
        [*(["a batch in one call"] if batched else []), *(["1 s to a chunk"] if path == "seconds" else [])]
    )
    if kind == "tensorstore":
        return Contender(arrays.tensorstore(path, batched), _frames(path), what=what)
    pipeline = "zarrs.ZarrsCodecPipeline" if kind == "zarrs" else None
    return Contender(arrays.zarr_python(path, batched, pipeline), _frames(path), what=what)


def _records(name: str, batches: Any, make: Any) -> Contender:
    return Contender(batches, lambda clips: [clips.folder(name)], make, ahead=5, what="records of 16 JPEGs")


CONTENDERS: dict[str, Contender] = {
    "libjpeg-turbo": Contender(arrays.libjpeg, _frames("jpeg"), what="limit of jpeg: threads decode JPEGs in memory"),
    "avstore jpeg": Contender(arrays.avstore_loader("jpeg", False), _frames("jpeg"), ahead=4),
    "avstore jpeg in-process": Contender(arrays.avstore_loader("jpeg", True), _frames("jpeg"), ahead=4),
    "avstore jpeg unchecked": Contender(arrays.avstore_loader("jpeg", False, check=False), _frames("jpeg"), ahead=4),
    "torch in memory": Contender(records.in_memory, _frames("jpeg"), ahead=5, what="a list under a DataLoader"),
    "webdataset": _records("webdataset", records.webdataset, records.make_webdataset),
    "mosaicml-streaming": _records("mosaicml-streaming", records.streaming, records.make_streaming),
    "litdata": _records("litdata", records.litdata, records.make_litdata),
    "ffcv": _records("ffcv", records.ffcv, records.make_ffcv),
    "pyav on the fly": Contender(source.pyav, _media, what="random seeks into the source"),
    "torchcodec on the fly": Contender(source.torchcodec, _media, what="random seeks into the source"),
    "memcpy": Contender(arrays.memcpy, _frames("raw"), what="limit of raw: threads copy clips in memory"),
    "avstore raw": Contender(arrays.avstore_loader("raw", False), _frames("raw"), ahead=4),
    "avstore raw in-process": Contender(arrays.avstore_loader("raw", True), _frames("raw"), ahead=4),
    "avstore raw checked": Contender(arrays.avstore_loader("raw", False, check=True), _frames("raw"), ahead=4),
    "zarr-python": _array("zarr-python"),
    "zarr-python batched": _array("zarr-python", True),
    "zarr-python 1 s chunks": _array("zarr-python", False, "seconds"),
    "zarr-python 1 s chunks batched": _array("zarr-python", True, "seconds"),
    "zarrs": _array("zarrs"),
    "zarrs batched": _array("zarrs", True),
    "zarrs 1 s chunks": _array("zarrs", False, "seconds"),
    "zarrs 1 s chunks batched": _array("zarrs", True, "seconds"),
    "tensorstore": _array("tensorstore"),
    "tensorstore batched": _array("tensorstore", True),
    "tensorstore 1 s chunks": _array("tensorstore", False, "seconds"),
    "tensorstore 1 s chunks batched": _array("tensorstore", True, "seconds"),
}


def all_files(paths: list[Path]) -> list[Path]:
    return [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]


def drop(paths: list[Path]) -> None:
    """Asks the kernel to forget these files: what can be dropped without privileges, clean pages."""
    for file in all_files(paths):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def measure(batches: Iterator[int], skip: int, seconds: float, limit: int = 0) -> dict[str, float]:
    """Clips and seconds of one run of `seconds` or more, or of `limit` clips, after `skip` batches that may have been
    ready before it began; of at least two batches, and of eight where some may be ready ahead."""
    for _ in range(skip):
        next(batches)
    least = 8 if skip else 2
    done, count, begin = 0, 0, time.perf_counter()
    while True:
        done += next(batches)
        count += 1
        passed = time.perf_counter() - begin
        if (passed >= seconds and count >= least) or (limit and done >= limit):
            return {"clips": done, "seconds": passed}


def main(name: str, given: dict[str, Any]) -> None:
    """Answers `make`, `start`, `run` and `drop` until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    clips, contender = ClipSet(**given), CONTENDERS[name]
    batches: Iterator[int] | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            out: dict[str, Any] = {}
            if asked["do"] == "make":
                shutil.rmtree(clips.folder(name), ignore_errors=True)  # what a run that was cut off left behind
                contender.make(clips)
            elif asked["do"] == "drop":
                drop(contender.files(clips))
            elif asked["do"] == "start":  # imports of the package, opening, its processes, and one batch
                begin = time.perf_counter()
                batches = contender.batches(clips)
                next(batches)
                out = {"first": time.perf_counter() - begin}
            else:
                assert batches is not None, "start comes first"
                out = measure(batches, contender.ahead, asked["seconds"], asked.get("clips", 0))
        except Exception as e:
            out = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"}
        answers.write(json.dumps(out) + "\n")
        answers.flush()
    late = threading.Timer(5, os._exit, (0,))  # a package may hang at exit
    late.daemon = True
    late.start()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
