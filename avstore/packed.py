"""Pictures that stay JPEG until they are on the device: a slot's rows hold their bytes, one function makes pixels.

    cut_packed(...)                      # the reader: each picture's JPEG at the beginning of its row of `frames`
    unpack(frames, lengths, decode, device)     # the trainer: uint8 pixels on the device

The layout of a slot stays as it is, so that what cannot stay JPEG (a picture longer than its pixels) lies there as
pixels. `decode` is given from outside (`avstore.device_jpeg`): nothing here knows of a device. Imports no torch before
`unpack`: the reader process starts with this module. Checksums are verified where the bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from google_crc32c import value as crc32c

from avstore.codecs import decode_jpeg_into
from avstore.cut import RESIDUE, damaged, fetch, spans
from avstore.errors import CorruptError, UsageError
from avstore.shard import Reader
from avstore.spec import ArraySpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AGAIN = -1  # in `lengths`: the picture of the row before
PIXELS = 0  # in `lengths`: the row holds pixels

# (JPEGs, each uint8 (n,); height; width) -> uint8 (len, height, width, 3) RGB on the device. The bytes stay valid until
# what was launched on the caller's stream is done.
Decode = Callable[[Sequence[np.ndarray], int, int], "Tensor"]


def cut_packed(
    reader: Reader,
    array: ArraySpec,
    per_shard: int,
    rows: np.ndarray,
    out: np.ndarray,
    lengths: np.ndarray,
    *,
    check: bool = True,
) -> None:
    """Fills `out`, uint8 (n, H, W, 3), with the JPEGs of the frames at absolute tape rows `rows`, int64 (n,), each at
    the beginning of its row; `lengths`, int32 (n,), says how long each is, PIXELS where it was decoded since it is
    longer than its pixels, AGAIN where the row before is shown again.

    CorruptError names the row when bytes are damaged (with `check`) or missing.
    """
    chunks: list[int] = rows.tolist()
    targets = [i for i in range(len(chunks)) if not i or chunks[i] != chunks[i - 1]]
    lengths[:] = AGAIN
    flat = out.reshape(len(chunks), -1)
    wanted = [chunks[i] for i in targets]
    for shard, start, stop in spans(wanted, per_shard):
        part, places = wanted[start:stop], targets[start:stop]
        for place, row, data in zip(places, part, fetch(reader, array, per_shard, shard, part), strict=True):
            if data is None:
                raise damaged(array, row, "the frame is missing from its shard")
            if check and crc32c(data) != RESIDUE:
                raise damaged(array, row, "the checksum differs")
            body = data[:-4]
            if 0 < len(body) <= flat.shape[1]:
                flat[place, : len(body)] = body
                lengths[place] = len(body)
                continue
            try:
                decode_jpeg_into(body, out[place])
            except ValueError as e:
                raise damaged(array, row, str(e)) from e
            lengths[place] = PIXELS


def unpack(
    frames: np.ndarray, lengths: np.ndarray, decode: Decode, device: torch.device | str | None = None
) -> Tensor:
    """What `cut_packed` left in `frames`, uint8 (..., H, W, 3), as pixels of the same shape on `device` (None: CPU).

    All JPEGs go to `decode` in one call, in order. UsageError where it gives another shape, type or device back;
    CorruptError where it refuses a picture by ValueError.
    """
    import torch

    where = torch.device("cpu" if device is None else device)
    height, width = frames.shape[-3:-1]
    rows, flat = frames.reshape(-1, height * width * 3), lengths.reshape(-1)
    coded, plain = np.flatnonzero(flat > 0), np.flatnonzero(flat == PIXELS)
    parts: list[Any] = []
    if len(coded):
        found = flat[coded].tolist()
        try:
            made = decode([rows[i, :n] for i, n in zip(coded.tolist(), found, strict=True)], height, width)
        except ValueError as e:
            raise CorruptError(
                "a stored picture is damaged", str(e), "avstore verify STORE --repair makes the video again"
            ) from e
        asked = (len(coded), height, width, 3)
        if tuple(made.shape) != asked or made.dtype != torch.uint8 or made.device.type != where.type:
            raise UsageError(
                f"the decoder gave {made.dtype} {tuple(made.shape)} on {made.device}", f"uint8 {asked} on {where}"
            )
        parts.append(made)
    if len(plain):
        pixels = torch.from_numpy(rows[plain]).reshape(-1, height, width, 3)
        parts.append(pixels.to(where, non_blocking=True))
    if len(coded) == len(flat):
        return parts[0].reshape(frames.shape)
    if not parts:
        return torch.zeros(frames.shape, dtype=torch.uint8, device=where)
    place = np.zeros(len(flat), np.int64)
    place[coded], place[plain] = np.arange(len(coded)), len(coded) + np.arange(len(plain))
    latest = np.maximum.accumulate(np.where(flat == AGAIN, -1, np.arange(len(flat))))  # the row that is shown
    index = torch.from_numpy(place[latest]).to(where, non_blocking=True)
    return torch.cat(parts).index_select(0, index).reshape(frames.shape)
