"""How bytes are stored: JPEG frames, `source` chunks, and the CRC-32C, little-endian, in which every inner chunk ends.

Loads no Zarr: decoding children and reader processes start with it. Zarr's own view of the frames is `jpeg_codec`.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np

from avstore.errors import CorruptError

MISSING = np.uint64(2**64 - 1)  # offset and length of an inner chunk that is not there


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """JPEG, 4:2:0, of one RGB frame, uint8 (H, W, 3), C-contiguous."""
    import simplejpeg

    return simplejpeg.encode_jpeg(frame, quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False)


def decode_jpeg_into(payload: Any, out: np.ndarray) -> None:
    """Decodes a JPEG into `out`, uint8 (H, W, 3), C-contiguous; at half, quarter ... scale where `out` is that much
    smaller. Raises ValueError for damaged data. Releases the GIL."""
    import simplejpeg

    simplejpeg.decode_jpeg(
        payload,
        colorspace="RGB",
        fastdct=False,
        fastupsample=False,
        min_height=out.shape[0],
        min_width=out.shape[1],
        min_factor=1,
        buffer=out,
    )


def crc32c(data: bytes | np.ndarray) -> int:
    return google_crc32c.value(data)


def with_crc(payload: bytes | memoryview | np.ndarray) -> bytes:
    """The payload followed by its CRC-32C, 4 bytes little-endian."""
    data = bytes(payload)
    return data + google_crc32c.value(data).to_bytes(4, "little")


def check_crc(chunk: np.ndarray, where: str) -> np.ndarray:
    """The payload of a chunk, uint8 (n,); CorruptError naming `where` when the checksum differs."""
    body = chunk[:-4]
    if chunk.size < 4 or google_crc32c.value(body) != int.from_bytes(chunk[-4:].tobytes(), "little"):
        raise CorruptError(
            f"damaged bytes in {where}",
            "the checksum differs",
            "avstore verify STORE --repair makes the video again from its source",
        )
    return body


def encode_rows(rows: np.ndarray) -> bytes:
    """An inner chunk of plain rows: little-endian bytes and checksum."""
    return with_crc(np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<")).tobytes())


def encode_source(rows: np.ndarray) -> bytes:
    """One chunk of `source`: int32 rows of a shard, zstd level 3, checksum (the codecs that its zarr.json lists)."""
    from numcodecs.zstd import Zstd

    return with_crc(bytes(Zstd(level=3, checksum=False).encode(np.ascontiguousarray(rows, dtype="<i4"))))


def decode_source(data: bytes, rows: int, where: str) -> np.ndarray:
    """int32 (rows,) of one chunk of `source`; CorruptError naming `where`."""
    from numcodecs.zstd import Zstd

    body = check_crc(np.frombuffer(data, np.uint8), where)
    out = np.frombuffer(Zstd().decode(body.tobytes()), "<i4")
    if out.size != rows:
        raise CorruptError(
            f"damaged bytes in {where}", f"{out.size} rows instead of {rows}", "avstore verify STORE --repair"
        )
    return out
