"""Cutting: from tape rows to arrays, straight into memory that the caller owns.

One index slice and, as a rule, one contiguous read per array and clip; JPEG frames are decoded into the rows of the
batch, raw frames land there by one vectored read. Nothing is allocated per clip but small views.
"""

from __future__ import annotations

import threading

import numpy as np

from avstore.codecs import MISSING, check_crc, crc32c, decode_jpeg_into
from avstore.errors import CorruptError
from avstore.shard import Reader
from avstore.spec import ArraySpec

SPARSE = 4  # read rows one by one when a contiguous read would fetch more than this many times what is wanted
REPAIR = "avstore verify STORE --repair makes the video again from its source"

_local = threading.local()


def scratch(nbytes: int) -> np.ndarray:
    """This thread's buffer, uint8 (nbytes,); it grows and is used again."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.size < nbytes:
        buffer = _local.buffer = np.empty(max(nbytes, 1 << 20) * 3 // 2, np.uint8)
    return buffer[:nbytes]


def damaged(array: ArraySpec, row: int, why: str) -> CorruptError:
    return CorruptError(f"{array.path} at second {row // array.rate} of the tape (row {row}) is damaged", why, REPAIR)


def spans(chunks: np.ndarray, per_shard: int) -> list[tuple[int, int, int]]:
    """(shard, start, stop) runs of `chunks`, absolute inner chunk numbers in any order, that lie in one shard and rise."""
    out, start = [], 0
    shards = chunks // per_shard
    for i in range(1, len(chunks) + 1):
        if i == len(chunks) or shards[i] != shards[start] or chunks[i] < chunks[i - 1]:
            out.append((int(shards[start]), start, i))
            start = i
    return out


def fetch(reader: Reader, array: ArraySpec, per_shard: int, shard: int, chunks: np.ndarray) -> list[np.ndarray | None]:
    """The bytes of rising inner chunks of one shard as views of this thread's scratch; None where one is missing."""
    key = array.key(shard)
    first = int(chunks[0]) - shard * per_shard
    table = reader.index(key, first, int(chunks[-1] - chunks[0]) + 1, per_shard)
    entries = table[chunks - chunks[0]]
    there = entries[:, 0] != MISSING
    if not there.any():
        return [None] * len(chunks)
    begin = int(entries[there, 0].min())
    end = int((entries[there, 0] + entries[there, 1]).max())
    wanted = int(entries[there, 1].sum())
    out: list[np.ndarray | None] = []
    if end - begin <= SPARSE * wanted:
        buffer = scratch(end - begin)
        reader.read(key, begin, buffer)
        for (offset, length), ok in zip(entries.tolist(), there.tolist(), strict=True):
            out.append(buffer[offset - begin : offset - begin + length] if ok else None)
        return out
    buffer, used = scratch(wanted), 0
    for (offset, length), ok in zip(entries.tolist(), there.tolist(), strict=True):
        if not ok:
            out.append(None)
            continue
        reader.read(key, offset, buffer[used : used + length])
        out.append(buffer[used : used + length])
        used += length
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
    keep = np.ones(len(rows), bool)
    keep[1:] = rows[1:] != rows[:-1]
    targets = np.flatnonzero(keep)
    chunks = rows[targets]
    if raw and out.shape[1:] != array.row:
        raise CorruptError(
            "a raw store holds frames of one size",
            f"{array.row[:2]} stored, {out.shape[1:3]} asked",
            "crop or resize the batch instead",
        )
    for shard, start, stop in spans(chunks, per_shard):
        part = chunks[start:stop]
        if raw and _scatter_raw(reader, array, per_shard, shard, part, out, targets[start:stop], check):
            continue
        for row, target, data in zip(
            part.tolist(), targets[start:stop].tolist(), fetch(reader, array, per_shard, shard, part), strict=True
        ):
            if data is None:
                raise damaged(array, row, "the frame is missing from its shard")
            if check or raw:
                body = check_crc(data, f"{array.path} at second {row // array.rate} of the tape (row {row})")
            else:
                body = data[:-4]
            if raw:
                out[target] = body.reshape(array.row)
                continue
            try:
                decode_jpeg_into(body, out[target])
            except ValueError as e:
                raise damaged(array, row, str(e)) from e
    for i in np.flatnonzero(~keep).tolist():
        out[i] = out[i - 1]


def _scatter_raw(
    reader: Reader,
    array: ArraySpec,
    per_shard: int,
    shard: int,
    chunks: np.ndarray,
    out: np.ndarray,
    targets: np.ndarray,
    check: bool,
) -> bool:
    """Raw frames without gaps: one vectored read into the rows of `out` and a strip of checksums."""
    scatter = getattr(reader, "scatter", None)
    if scatter is None or int(chunks[-1] - chunks[0]) + 1 != len(chunks):
        return False
    key = array.key(shard)
    table = reader.index(key, int(chunks[0]) - shard * per_shard, len(chunks), per_shard)
    size = int(np.prod(array.row)) + 4
    if (
        (table[:, 0] == MISSING).any()
        or (table[:, 1] != size).any()
        or (np.diff(table[:, 0].astype(np.int64)) != size).any()
    ):
        return False
    sums = scratch(4 * len(chunks)).reshape(-1, 4)
    parts: list[np.ndarray] = []
    for i, target in enumerate(targets.tolist()):
        parts += [out[target].reshape(-1), sums[i]]
    scatter(key, int(table[0, 0]), parts)
    if check:
        expected = sums.copy().view("<u4").reshape(-1)
        for i, (row, target) in enumerate(zip(chunks.tolist(), targets.tolist(), strict=True)):
            if crc32c(out[target].reshape(-1)) != expected[i]:
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
    fill = np.nan if array.fill == "NaN" else array.fill
    chunks = np.arange(first // inner, (first + n - 1) // inner + 1)
    for shard, start, stop in spans(chunks, per_shard):
        part = chunks[start:stop]
        for chunk, data in zip(part.tolist(), fetch(reader, array, per_shard, shard, part), strict=True):
            a, b = max(first, chunk * inner), min(first + n, (chunk + 1) * inner)
            if data is None:
                out[a - first : b - first] = fill
                continue
            body = check_crc(data, f"{array.path} at second {chunk * inner // array.rate} of the tape")
            if body.size != inner * int(np.prod(array.row, dtype=np.int64)) * dtype.itemsize:
                raise damaged(array, chunk * inner, "a chunk has the wrong length")
            values = (
                body.view(dtype) if body.ctypes.data % dtype.itemsize == 0 else np.frombuffer(body.tobytes(), dtype)
            )
            out[a - first : b - first] = values.reshape(inner, *array.row)[a - chunk * inner : b - chunk * inner]
