"""Cutting: from tape rows to arrays, straight into memory that the caller owns.

One index slice and, as a rule, one contiguous read per array and clip; JPEG frames are decoded into the rows of the
batch, raw frames land there by one vectored read. Nothing is allocated per clip but small views. What runs per frame is
plain Python on ints: NumPy's calls on arrays of 16 cost more than the loop.
"""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import numpy as np

from avstore.codecs import MISSING, crc32c
from avstore.errors import CorruptError
from avstore.shard import Reader
from avstore.spec import ArraySpec

SPARSE = 4  # read rows one by one when a contiguous read would fetch more than this many times what is wanted
REPAIR = "avstore verify STORE --repair makes the video again from its source"

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
    n = len(chunks)
    if not n:
        return []
    first = chunks[0] // per_shard
    if chunks[-1] // per_shard == first and all(a <= b for a, b in pairwise(chunks)):
        return [(first, 0, n)]
    out, start = [], 0
    for i in range(1, n + 1):
        if i == n or chunks[i] // per_shard != chunks[start] // per_shard or chunks[i] < chunks[i - 1]:
            out.append((chunks[start] // per_shard, start, i))
            start = i
    return out


def fetch(reader: Reader, array: ArraySpec, per_shard: int, shard: int, chunks: list[int]) -> list[np.ndarray | None]:
    """The bytes of rising inner chunks of one shard as views of this thread's scratch; None where one is missing."""
    key, first = array.key(shard), chunks[0]
    entries = reader.index(key, first - shard * per_shard, chunks[-1] - first + 1, per_shard).tolist()
    if len(entries) != len(chunks):
        entries = [entries[c - first] for c in chunks]
    there = [e for e in entries if e[0] != _MISSING]
    if not there:
        return [None] * len(chunks)
    begin = min(offset for offset, _ in there)
    length = max(offset + size for offset, size in there) - begin
    wanted = sum(size for _, size in there)
    if length <= SPARSE * wanted:
        buffer = scratch(length)
        reader.read(key, begin, buffer)
        return [None if o == _MISSING else buffer[o - begin : o - begin + size] for o, size in entries]
    buffer, used = scratch(wanted), 0
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
    from simplejpeg import decode_jpeg

    raw = array.codecs[0]["name"] == "bytes"
    if raw and out.shape[1:] != array.row:
        raise CorruptError(
            "a raw store holds frames of one size",
            f"{array.row[:2]} stored, {out.shape[1:3]} asked",
            "crop or resize the batch instead",
        )
    height, width = out.shape[1:3]
    chunks: list[int] = rows.tolist()
    targets: list[int] = list(range(len(chunks)))
    repeats = [i for i in range(1, len(chunks)) if chunks[i] == chunks[i - 1]]
    if repeats:
        again = set(repeats)
        targets = [i for i in targets if i not in again]
        chunks = [chunks[i] for i in targets]
    for shard, start, stop in spans(chunks, per_shard):
        part, places = chunks[start:stop], targets[start:stop]
        if raw and _scatter_raw(reader, array, per_shard, shard, part, out, places, check):
            continue
        for row, place, data in zip(part, places, fetch(reader, array, per_shard, shard, part), strict=True):
            if data is None:
                raise damaged(array, row, "the frame is missing from its shard")
            body = data[:-4]
            if check and crc32c(body) != int.from_bytes(data[-4:].tobytes(), "little"):
                raise damaged(array, row, "the checksum differs")
            try:
                if raw:
                    out[place] = np.frombuffer(body, np.uint8).reshape(array.row)
                else:  # by position: data, colorspace, fastdct, fastupsample, min_height, min_width, min_factor, buffer
                    decode_jpeg(body, "RGB", False, False, height, width, 1, out[place])
            except ValueError as e:
                raise damaged(array, row, str(e)) from e
    for i in repeats:
        out[i] = out[i - 1]


def _scatter_raw(
    reader: Reader,
    array: ArraySpec,
    per_shard: int,
    shard: int,
    chunks: list[int],
    out: np.ndarray,
    targets: list[int],
    check: bool,
) -> bool:
    """Raw frames without gaps: one vectored read into the rows of `out` and a strip of checksums."""
    scatter = getattr(reader, "scatter", None)
    if scatter is None or chunks[-1] - chunks[0] + 1 != len(chunks):
        return False
    key = array.key(shard)
    table = reader.index(key, chunks[0] - shard * per_shard, len(chunks), per_shard).tolist()
    size, begin = math.prod(array.row) + 4, table[0][0]
    if any(entry != [begin + i * size, size] for i, entry in enumerate(table)):
        return False
    sums = scratch(4 * len(chunks)).reshape(-1, 4)
    parts: list[np.ndarray] = []
    for i, target in enumerate(targets):
        parts += (out[target].reshape(-1), sums[i])
    scatter(key, begin, parts)
    if check:
        for i, (row, target) in enumerate(zip(chunks, targets, strict=True)):
            if crc32c(out[target].reshape(-1)) != int.from_bytes(sums[i].tobytes(), "little"):
                raise damaged(array, row, "the checksum differs")
    return True


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
            if crc32c(body) != int.from_bytes(data[-4:].tobytes(), "little"):
                raise damaged(array, chunk * inner, "the checksum differs")
            if len(body) != size:
                raise damaged(array, chunk * inner, "a chunk has the wrong length")
            values = np.frombuffer(body, dtype).reshape(inner, *array.row)  # unaligned as it lies; the copy aligns it
            out[a - first : b - first] = values[a - chunk * inner : b - chunk * inner]
