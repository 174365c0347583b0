"""A reader of stores written from docs/format.md alone: json, numpy, a JPEG decoder, zstd. Nothing of avstore.

It is what somebody would write in another language; `test_format.py` holds it against avstore.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

GONE = 2**64 - 1


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), bit-reflected, polynomial 0x1EDC6F41: by a table of 256."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table() -> list[int]:
    out = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ 0x82F63B78 if n & 1 else n >> 1
        out.append(n)
    return out


TABLE = _table()


class Stranger:
    """One store. `decode_jpeg`: bytes -> uint8 (H, W, 3) RGB. `unzstd`: bytes -> bytes."""

    def __init__(
        self, root: Path, decode_jpeg: Callable[[bytes], np.ndarray], unzstd: Callable[[bytes], bytes]
    ) -> None:
        self.root, self.decode_jpeg, self.unzstd = root, decode_jpeg, unzstd
        attributes = self.json("zarr.json")["attributes"]["avstore"]
        assert attributes["format"] == 1
        self.spec: dict[str, Any] = attributes["spec"]
        text = json.dumps(self.spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == attributes["fingerprint"]
        self.videos: list[dict[str, Any]] = []
        number = 1
        while (root / f"plans/{number:04d}.json").exists():
            plan = self.json(f"plans/{number:04d}.json")
            assert plan["first_video"] == len(self.videos) and plan["fingerprint"] == attributes["fingerprint"]
            for i in range(len(plan["key"])):
                video = {name: plan[name][i] for name in ("key", "path", "start", "end", "place", "seconds", "bytes")}
                video["columns"] = {name: values[i] for name, values in plan["columns"].items()}
                self.videos.append({**video, "status": "pending"})
            for task, _, _, first, count in plan["tasks"]:
                if (root / f"commits/{task:06d}.json").exists():
                    record = self.json(f"commits/{task:06d}.json")
                    assert record["task"] == task
                    for name, values in record.items():
                        if isinstance(values, list):
                            assert len(values) == count
                            for i, value in enumerate(values):
                                self.videos[first + i][name] = value
            number += 1

    def json(self, path: str) -> Any:
        data = (self.root / path).read_bytes()
        value = json.loads(data)
        if not path.endswith("zarr.json"):  # plans and records carry the digest of their own bytes
            blank = data.replace(value["digest"].encode(), b"0" * 64, 1)
            assert hashlib.sha256(blank).hexdigest() == value["digest"], path
        return value

    def current(self) -> dict[str, int]:
        """Key -> its latest number that has a record, else its first."""
        out: dict[str, int] = {}
        for number, video in enumerate(self.videos):
            if video["status"] != "pending" or video["key"] not in out:
                out[video["key"]] = number
        return out

    def rows(self, array: str, first: int, count: int) -> np.ndarray:
        """Tape rows `first ... first + count` of an array."""
        meta = self.json(f"{array}/zarr.json")
        shape, outer = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        fill = np.nan if meta["fill_value"] == "NaN" else meta["fill_value"]
        out = np.full((count, *shape[1:]), fill, dtype)
        codec = meta["codecs"][0]
        sharded = codec["name"] == "sharding_indexed"
        inner = codec["configuration"]["chunk_shape"][0] if sharded else outer[0]
        for chunk in range(first // inner, -(-(first + count) // inner)):
            shard = chunk * inner // outer[0]
            file = self.root / array / ("c." + ".".join([str(shard), *["0"] * (len(shape) - 1)]))
            if not file.exists():
                continue
            data = file.read_bytes()
            if sharded:
                chunks = outer[0] // inner
                table = data[len(data) - 4 - 16 * chunks : -4]
                assert crc32c(table) == int.from_bytes(data[-4:], "little")
                at = 16 * (chunk - shard * chunks)
                offset, length = (int.from_bytes(table[at + i : at + i + 8], "little") for i in (0, 8))
                if offset == GONE:
                    assert length == GONE
                    continue
                data = data[offset : offset + length]
            payload, sum_ = data[:-4], int.from_bytes(data[-4:], "little")
            assert crc32c(payload) == sum_, f"{array} chunk {chunk}"
            if array == "frames" and self.spec["codec"] == "jpeg":
                values = self.decode_jpeg(payload)[None]
            elif array == "source":
                values = np.frombuffer(self.unzstd(payload), dtype)
            else:
                values = np.frombuffer(payload, dtype).reshape(-1, *shape[1:])
            assert len(values) == inner
            a, b = max(first, chunk * inner), min(first + count, (chunk + 1) * inner)
            out[a - first : b - first] = values[a - chunk * inner : b - chunk * inner]
        return out

    def frames(self, number: int) -> np.ndarray:
        video = self.videos[number]
        return self.rows("frames", video["place"] * self.spec["fps"], video["frames"])

    def source(self, number: int) -> np.ndarray:
        video = self.videos[number]
        return self.rows("source", video["place"] * self.spec["fps"], video["frames"])

    def waveform(self, number: int) -> np.ndarray:
        video = self.videos[number]
        return self.rows("waveform", video["place"] * self.spec["sample_rate"], video["samples"])

    def spectrogram(self, number: int, front_end: str) -> np.ndarray:
        video, array = self.videos[number], f"spectrograms/{front_end}"
        codec = self.json(f"{array}/zarr.json")["codecs"][0]["configuration"]
        rate = codec["chunk_shape"][0]
        return self.rows(array, video["place"] * rate, video["samples"] * rate // self.spec["sample_rate"])

    def clip_rows(self, number: int, offset: Fraction, n: int, fps: Fraction) -> list[int]:
        """Tape rows of a clip that lies inside the video."""
        tape = self.spec["fps"]
        return [self.videos[number]["place"] * tape + int((offset + k / fps) * tape) for k in range(n)]

    def digest(self) -> str:
        """SHA-256 over all that a store says of its videos, and over their sound, spectrograms and sources. Not over
        the pixels: JPEG decoders may differ in the last bit."""
        h = hashlib.sha256()
        for number, video in enumerate(self.videos):
            h.update(json.dumps(video, sort_keys=True).encode())
            if video["status"] != "ok":
                continue
            if video["sound_end"] > video["sound_start"]:
                h.update(self.waveform(number).tobytes())
                for name in self.spec["front_ends"]:
                    h.update(np.nan_to_num(self.spectrogram(number, name), nan=-1e4).tobytes())
            if video["frames"]:
                h.update(self.source(number).tobytes())
        return h.hexdigest()
