"""A small source folder with everything an ingest must account for, its store made once per session, the digest of a
store's bytes, and a stand-in for the pool of children that works in this process."""

from __future__ import annotations

import hashlib
import shutil
import struct
import threading
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avstore.children import Job, Result
from avstore.ingest import ingest
from avstore.spec import Spec
from avstore.spool import Payloads
from avstore.worker import answer, load

SPEC: dict[str, Any] = {"size": (32, 48), "fps": 8, "sample_rate": 8000, "front_ends": (), "shard_seconds": 8}


def write_wav(path: Path, seconds: float, rate: int = 8000, seed: int = 0) -> np.ndarray:
    """Noise, int16 mono; returns the samples."""
    samples = np.random.default_rng(seed).integers(-9000, 9000, int(seconds * rate), dtype=np.int16)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(samples.astype("<i2").tobytes())
    return samples


def mixed(tiny_media: Path, folder: Path, clips: int = 6) -> Path:
    """`folder` with `clips` short clips in train/ and test/ folders, a sound of 20 s (longer than a shard of 8), one
    of 1.5 s, two broken files, a text, and a file whose header says 1 s where 6 s are (`liar.mp4`)."""
    from benchmarks import demo_set

    for source in sorted(tiny_media.rglob("*.mp4"))[:clips]:
        target = folder / source.relative_to(tiny_media)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    write_wav(folder / "long.wav", 20)
    write_wav(folder / "short.wav", 1.5, seed=1)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "junk.mkv").write_bytes(bytes(range(256)) * 20)
    (folder / "notes.txt").write_text("not media")
    long = tiny_media.parent / "six"
    (clip,) = demo_set.generate(long, train=1, test=0, seconds=6, workers=1)
    (folder / "liar.mp4").write_bytes(lying(clip.read_bytes()))
    return folder


def lying(mp4: bytes) -> bytes:
    """The file with every track's duration set to one second; its samples stay."""
    out, at = bytearray(mp4), -1
    while (at := out.find(b"mdhd", at + 1)) > 0:
        (scale,) = struct.unpack(">I", out[at + 16 : at + 20])
        out[at + 20 : at + 24] = struct.pack(">I", scale)
    return bytes(out)


def digest(store: Path) -> dict[str, str]:
    """SHA-256 of every file that is part of the store's bytes: all but `lock` and `logs/`."""
    return {
        p.relative_to(store).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(store.rglob("*"))
        if p.is_file() and p.relative_to(store).parts[0] not in ("lock", "logs")
    }


_made: dict[str, Path] = {}


def made_once(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> tuple[Path, Path]:
    """(source, store): the folder of `mixed` and its store with SPEC, made by one worker without interruption. Both are
    shared by all tests of the session: copy what is to be changed."""
    if not _made:
        folder = tmp_path_factory.mktemp("mixed")
        source = mixed(tiny_media, folder / "media")
        summary = ingest(source, folder / "media.zarr", workers=1, **SPEC)
        assert (summary.ok, summary.failed) == (9, 2), summary.failures
        _made.update(source=source, store=folder / "media.zarr")
    return _made["source"], _made["store"]


class Here:
    """Stands in for the pool of children where only the parent is tested: same jobs, same decoder, same headers, in
    this process, so that thousands of runs take seconds."""

    def __init__(self, workers: int, spec: Spec, on_death: object = None, decode: str = "pyav") -> None:
        self.workers, self.spec = workers, spec

    def run(self, jobs: Iterable[Job], stop: threading.Event) -> Iterator[Result]:
        for job in jobs:
            header, body = answer(dict(job.__dict__), self.spec)
            yield Result(job, header, Payloads(body, Path(job.spool)) if "index" in header else None)

    def hello(self) -> dict[str, str]:
        return load(self.spec)

    def close(self) -> None:
        pass
