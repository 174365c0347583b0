"""Cutting: from tape rows to arrays, straight into memory that the caller owns.

One index slice and, as a rule, one contiguous read per array and clip; JPEG frames are decoded into the rows of the
batch, raw frames land there by one vectored read, or one copy out of the mapped shard. Nothing is allocated per clip
but small views. What runs per frame is plain Python on ints: NumPy's calls on arrays of 16 cost more than the loop.
"""

from __future__ import annotations

import math
import struct
import threading
from operator import add

import numpy as np
from google_crc32c import value as crc32c
from simplejpeg import decode_jpeg

from avstore.codecs import MISSING
from avstore.errors import CorruptError
from avstore.shard import INDEX_ROW, Reader
from avstore.spec import ArraySpec

SPARSE = 4  # read rows one by one when a contiguous read would fetch more than this many times what is wanted
REPAIR = "avstore verify STORE --repair makes the video again from its source"

RESIDUE = 0x48674BC7  # CRC-32C of any bytes followed by their own CRC-32C, little-endian
_MISSING = int(MISSING)
_local = threading.local()


def scratch(nbytes: int) -> np.ndarray:
    """This thread's buffer, uint8 (nbytes,); it grows and is used again."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.size < nbytes:
        buffer = _local.buffer = np.empty(max(nbytes, 1 << 20) * 3 // 2, np.uint8)
    return buffer[:nbytes]


def damaged(array: ArraySpec, row: int, why: str) -> CorruptError:
    """The error for an absolute tape row; its attribute `second` is the place on the tape."""
    error = CorruptError(f"{array.path} at second {row // array.rate} of the tape (row {row}) is damaged", why, REPAIR)
    error.second = row / array.rate  # type: ignore[attr-defined]
    return error


def spans(chunks: list[int], per_shard: int) -> list[tuple[int, int, int]]:
    """(shard, start, stop) runs of `chunks`, absolute inner chunk numbers in any order, that rise inside one shard."""
    out, start, n = [], 0, len(chunks)
    if n and chunks[0] // per_shard == chunks[-1] // per_shard and chunks == list(range(chunks[0], chunks[0] + n)):
        return [(chunks[0] // per_shard, 0, n)]  # as a rule
    for i in range(1, n + 1):
        if i == n or chunks[i] // per_shard != chunks[start] // per_shard or chunks[i] < chunks[i - 1]:
            out.append((chunks[start] // per_shard, start, i))
            start = i
    return out


def fetch(reader: Reader, array: ArraySpec, per_shard: int, shard: int, chunks: list[int]) -> list[np.ndarray | None]:
    """The bytes of rising inner chunks of one shard as views of this thread's scratch; None where one is missing."""
    key, first = array.key(shard), chunks[0]
    flat = reader.entries(key, first - shard * per_shard, chunks[-1] - first + 1, per_shard)
    offsets, sizes = flat[::2], flat[1::2]
    if len(offsets) != len(chunks):
        offsets, sizes = tuple(offsets[c - first] for c in chunks), tuple(sizes[c - first] for c in chunks)
    entries = list(zip(offsets, sizes, strict=True))
    begin, length, wanted = offsets[0], offsets[-1] + sizes[-1] - offsets[0], sum(sizes)
    # one read, as a rule: payloads rise with the tape, and a hole's offset is larger than any
    if length <= SPARSE * wanted and offsets[-1] != _MISSING and list(offsets) == sorted(offsets):
        buffer = scratch(length)
        reader.read(key, begin, buffer)
        return [buffer[o - begin : o - begin + size] for o, size in entries]
    buffer, used = scratch(sum(size for offset, size in entries if offset != _MISSING)), 0
    out: list[np.ndarray | None] = []
    for offset, size in entries:
        if offset == _MISSING:
            out.append(None)
            continue
        reader.read(key, offset, buffer[used : used + size])
        out.append(buffer[used : used + size])
        used += size
    return out


def cut_frames(
    reader: Reader, array: ArraySpec, per_shard: int, rows: np.ndarray, out: np.ndarray, *, check: bool = True
) -> None:
    """Fills `out`, uint8 (n, H, W, 3), with the frames at absolute tape rows `rows`, int64 (n,).

    `out` may be 1/2, 1/4 or 1/8 of the stored size for JPEG stores. Rows that repeat the row before are copied.
    CorruptError names the row when bytes are damaged (with `check`; without it a damaged JPEG may decode to wrong
    pixels) or missing.
    """
    raw = array.codecs[0]["name"] == "bytes"
    if raw and out.shape[1:] != array.row:
        raise CorruptError(
            "a raw store holds frames of one size",
            f"{array.row[:2]} stored, {out.shape[1:3]} asked",
            "crop or resize the batch instead",
        )
    height, width = out.shape[1:3]
    chunks: list[int] = rows.tolist()
    n = len(chunks)
    targets, repeats = list(range(n)), []
    if len(set(chunks)) < n:
        repeats = [i for i in range(1, n) if chunks[i] == chunks[i - 1]]
        again = set(repeats)
        targets = [i for i in targets if i not in again]
        chunks = [chunks[i] for i in targets]
    for shard, start, stop in spans(chunks, per_shard):
        part, places = chunks[start:stop], targets[start:stop]
        if raw:
            _cut_raw(reader, array, per_shard, shard, part, out, places, check)
            continue
        for place, row, data in zip(places, part, fetch(reader, array, per_shard, shard, part), strict=True):
            if data is None:
                raise damaged(array, row, "the frame is missing from its shard")
            if check and crc32c(data) != RESIDUE:
                raise damaged(array, row, "the checksum differs")
            try:  # height and width choose the scale; decoding stops at the picture's end, before the checksum
                decode_jpeg(data, "RGB", False, False, height, width, 1, out[place])
            except ValueError as e:
                raise damaged(array, row, str(e)) from e
    for i in repeats:
        out[i] = out[i - 1]


def _cut_raw(
    reader: Reader,
    array: ArraySpec,
    per_shard: int,
    shard: int,
    rows: list[int],
    out: np.ndarray,
    places: list[int],
    check: bool,
) -> None:
    """Raw frames at rising rows of one shard. Each run without gaps is one copy out of the mapped shard, where the
    reader maps, else one vectored read into `out` and a strip of checksums; rows between that are not asked for are
    not read."""
    key, first, pixels = array.key(shard), rows[0], math.prod(array.row)
    size, n = pixels + 4, rows[-1] - rows[0] + 1
    mapped = getattr(reader, "mapped", None)
    data: np.ndarray | None = mapped(key) if mapped is not None else None
    flat: tuple[int, ...] = ()
    if data is not None:
        tail = len(data) - 4 - INDEX_ROW * per_shard
        if tail >= 0:
            flat = struct.unpack_from(f"<{2 * n}Q", data, tail + INDEX_ROW * (first - shard * per_shard))  # type: ignore[arg-type]
        if not flat or max(map(add, flat[::2], flat[1::2])) > tail:
            data = None  # cut short, damage or a hole: whoever is slower looks closer
    if data is None:
        flat = reader.entries(key, first - shard * per_shard, n, per_shard)
    count, i, at = len(rows), 0, flat[0]
    if (
        count == n == places[-1] - places[0] + 1
        and flat[::2] == tuple(range(at, at + size * n, size))
        and flat[1::2] == (size,) * n
    ):  # as a rule; the loop below would find the same, frame by frame
        i, target = count, out[places[0] : places[0] + n]
        if data is not None:
            _copy(array, data, at, size, first, target, check)
        else:
            _scatter(reader, array, key, at, first, target, check)
    while i < count:
        at = flat[2 * (rows[i] - first)]
        j = i
        while j < count and rows[j] - rows[i] == places[j] - places[i] == j - i:
            entry = 2 * (rows[j] - first)
            if flat[entry] == _MISSING:
                raise damaged(array, rows[j], "the frame is missing from its shard")
            if flat[entry + 1] != size:
                raise damaged(array, rows[j], "a frame has the wrong length")
            if flat[entry] != at + (j - i) * size:
                break
            j += 1
        target = out[places[i] : places[i] + j - i]
        if data is not None:
            _copy(array, data, at, size, rows[i], target, check)
        else:
            _scatter(reader, array, key, at, rows[i], target, check)
        i = j


def _copy(
    array: ArraySpec, data: np.ndarray, at: int, size: int, row: int, target: np.ndarray, check: bool
) -> None:
    """Raw frames without gaps, `row` the first, out of a mapped shard."""
    shown = np.ndarray(target.shape, np.uint8, data, at, (size, *target.strides[1:]))  # type: ignore[call-overload]
    if not check:
        np.copyto(target, shown)
        return
    for i in range(len(target)):  # what the checksum has brought into the cache is copied from there
        if crc32c(data[at + i * size : at + (i + 1) * size]) != RESIDUE:
            raise damaged(array, row + i, "the checksum differs")
        np.copyto(target[i], shown[i])


def _scatter(
    reader: Reader, array: ArraySpec, key: str, at: int, row: int, target: np.ndarray, check: bool
) -> None:
    """Raw frames without gaps, `row` the first, by one read, or one for each frame where the reader knows no vectored
    one."""
    n, pixels = len(target), math.prod(array.row)
    sums = scratch(4 * n)
    vectored = getattr(reader, "scatter", None)
    if vectored is None:
        for i in range(n):
            reader.read(key, at + i * (pixels + 4), target[i].reshape(-1))
            reader.read(key, at + i * (pixels + 4) + pixels, sums[4 * i : 4 * i + 4])
    else:
        to, strip = memoryview(target.reshape(-1)), memoryview(sums)  # type: ignore[arg-type]
        parts: list[memoryview] = []
        for i in range(n):
            parts += (to[i * pixels : (i + 1) * pixels], strip[4 * i : 4 * i + 4])
        vectored(key, at, parts)
    for i in range(n if check else 0):
        if crc32c(target[i].reshape(-1)) != int.from_bytes(sums[4 * i : 4 * i + 4].tobytes(), "little"):
            raise damaged(array, row + i, "the checksum differs")


def cut_rows(reader: Reader, array: ArraySpec, per_shard: int, first: int, out: np.ndarray) -> None:
    """Fills `out` (n, *row) with consecutive rows of a sharded plain array (waveform, spectrograms) from absolute row
    `first`; inner chunks that are missing read as the array's fill value."""
    inner = array.inner_rows
    n = len(out)
    if not n:
        return
    dtype = np.dtype(array.dtype).newbyteorder("<")
    size = inner * math.prod(array.row) * dtype.itemsize
    fill = np.nan if array.fill == "NaN" else array.fill
    chunks = list(range(first // inner, (first + n - 1) // inner + 1))
    for shard, start, stop in spans(chunks, per_shard):
        part = chunks[start:stop]
        for chunk, data in zip(part, fetch(reader, array, per_shard, shard, part), strict=True):
            a, b = max(first, chunk * inner), min(first + n, (chunk + 1) * inner)
            if data is None:
                out[a - first : b - first] = fill
                continue
            body = data[:-4]
            if crc32c(data) != RESIDUE:
                raise damaged(array, chunk * inner, "the checksum differs")
            if len(body) != size:
                raise damaged(array, chunk * inner, "a chunk has the wrong length")
            values = np.frombuffer(body, dtype).reshape(inner, *array.row)  # unaligned as it lies; the copy aligns it
            out[a - first : b - first] = values[a - chunk * inner : b - chunk * inner]
