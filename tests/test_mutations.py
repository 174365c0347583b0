"""Mutations of real media: whatever a file has become, the ingest ends, it is ok or failed with a reason, and the good
files beside it are as without it.

Mutations are drawn from a seed: flipped bytes, cut ends, swapped parts (whole atoms where the file has them), absurd
sizes, counts and durations, runs of zeros, repeated parts. AVSTORE_MUTATIONS sets the number of the slow test.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ingest_media import SPEC, digest, write_wav

import avstore
from avstore.ingest import ingest
from avstore.records import REASONS
from avstore.verify import verify

LIMITS: dict[str, Any] = {**SPEC, "cpu_base": 10.0, "cpu_per_second": 5.0, "max_seconds": 600, "shard_seconds": 64}
ABSURD = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x01")
MP4_FIELDS = (
    b"mvhd",
    b"mdhd",
    b"tkhd",
    b"stts",
    b"stsz",
    b"stco",
    b"stsc",
    b"elst",
    b"ctts",
    b"trun",
    b"avc1",
    b"mp4a",
)


def atoms(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of the top-level atoms of an mp4 or mov; empty where it is none."""
    out, at = [], 0
    while at + 8 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if not data[at + 4 : at + 8].isalnum() or size < 8 or at + size > len(data):
            return []
        out.append((at, at + size))
        at += size
    return out


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The name of the mutation, and the file that it makes."""
    n = len(data)
    kind = rng.choice(["flips", "head", "cut", "swap", "absurd", "absurd", "zeros", "repeat"])
    out = bytearray(data)
    if kind == "flips":
        for _ in range(rng.choice([1, 4, 40, 400])):
            out[rng.randrange(n)] ^= rng.randrange(1, 256)
    elif kind == "head":
        for _ in range(rng.choice([1, 3, 10])):
            out[rng.randrange(min(n, 512))] = rng.randrange(256)
    elif kind == "cut":
        del out[rng.randrange(n) :]
    elif kind == "swap":
        parts = atoms(data)
        if len(parts) < 2:
            ends = sorted(rng.sample(range(n + 1), 4))
            parts = [(ends[0], ends[1]), (ends[2], ends[3])]
        (a, b), (c, d) = sorted(rng.sample(parts, 2))
        out = bytearray(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])
    elif kind == "absurd":
        places = [at + 4 * rng.randrange(1, 6) for name in MP4_FIELDS if (at := data.find(name)) > 0]
        at = rng.choice(places or [rng.randrange(min(n, 300))])
        out[at : at + 4] = rng.choice(ABSURD)
    elif kind == "zeros":
        at = rng.randrange(n)
        length = rng.choice([16, 1000, 20000])
        out[at : at + length] = bytes(min(length, n - at))
    else:
        at, length = rng.randrange(n), rng.choice([64, 4096, 65536])
        out[at:at] = data[at : at + length] * rng.choice([1, 5])
    return kind, bytes(out)


def sources(shared: Path, most: int) -> list[Path]:
    """The smallest good files of every suffix."""
    by_suffix: dict[str, list[Path]] = {}
    for folder in ("odd-media", "ucf", "grid", "drone-video", "av-events", "esc10-ogg"):
        for file in sorted((shared / folder).rglob("*"), key=lambda p: (p.stat().st_size, p)):
            if file.is_file() and 1000 < file.stat().st_size < 400_000:
                by_suffix.setdefault(file.suffix.lower(), []).append(file)
    return [
        f for files in by_suffix.values() for f in files[:most] if f.suffix not in (".txt", ".md", ".tsv", ".align")
    ]


def campaign(shared: Path, tmp_path: Path, count: int, seed: int) -> Counter[str]:
    """Ingests `count` mutations among good sounds; returns how they ended."""
    rng = random.Random(seed)
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    folder.mkdir()
    files = sources(shared, 4)
    assert len({f.suffix for f in files}) >= 8
    kinds = {}
    for i in range(count):
        file = files[i % len(files)]
        kind, data = mutate(file.read_bytes(), rng)
        name = f"{i:04d}-{kind}{file.suffix}"
        (folder / name).write_bytes(data)
        kinds[name] = kind
    good = [f"good-{i}.wav" for i in range(3)]
    for i, name in enumerate(good):
        write_wav(folder / name, 1.5, seed=i)
    began = time.monotonic()
    summary = ingest(folder, store, **LIMITS)
    wall = time.monotonic() - began
    assert summary.ok + summary.failed == count + 3 and not summary.pending
    assert {r for _, r, _ in summary.failures} <= set(REASONS)
    assert all(message for _, _, message in summary.failures)
    assert not {k for k, _, _ in summary.failures} & set(good)
    assert verify(store).ok and not list(store.rglob("*.tmp.*"))
    with avstore.open(store) as opened:
        for number in opened.find(good):
            assert opened[int(number)].samples == 12000
            assert opened.waveform(int(number))[0].std() > 1000
    ended = Counter({"ok": summary.ok - 3, **summary.reasons})
    print(f"{count} mutations of {len(files)} files in {wall:.0f} s: {dict(ended)}; {dict(Counter(kinds.values()))}")
    if not count > 300:  # repeated: nothing is left to do, and nothing changes
        before = digest(store)
        assert ingest(folder, store).done == 0 and digest(store) == before
    shutil.rmtree(folder)
    return ended


def test_some_mutations(shared: Path, tmp_path: Path) -> None:
    ended = campaign(shared, tmp_path, 16, seed=1)
    assert ended["ok"] and sum(ended.values()) == 16


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_mutations(shared: Path, tmp_path: Path) -> None:
    count = int(os.environ.get("AVSTORE_MUTATIONS", "1000"))
    ended = campaign(shared, tmp_path, count, seed=2)
    assert ended["ok"] > count // 20 and count - ended["ok"] > count // 20


def test_a_mutation_is_what_it_says() -> None:
    mp4 = struct.pack(">I4s", 16, b"ftyp") + b"isom0001" + struct.pack(">I4s", 12, b"free") + b"abcd"
    assert atoms(mp4) == [(0, 16), (16, 28)] and atoms(b"RIFF" + bytes(40)) == []
    rng = random.Random(0)
    seen = {}
    for _ in range(200):
        kind, data = mutate(mp4 * 20, rng)
        seen[kind] = data
    assert set(seen) == {"flips", "head", "cut", "swap", "absurd", "zeros", "repeat"}
    assert len(seen["cut"]) < len(mp4) * 20 < len(seen["repeat"]) and sorted(seen["swap"]) == sorted(mp4 * 20)
