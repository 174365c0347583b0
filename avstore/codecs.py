"""How bytes are stored: JPEG frames, checksums, and the Zarr v3 codec under which any Zarr reader finds the frames.

The codec's id and configuration are those that imagecodecs publishes (`imagecodecs_jpeg`, level and subsampling),
so either package opens a store. Every inner chunk ends in the CRC-32C of its payload, little-endian.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import google_crc32c
import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from avstore.errors import CorruptError, UsageError, did_you_mean

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

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


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """Zarr v3 codec `imagecodecs_jpeg`: chunks (1, H, W, 3) or (H, W, 3), uint8 RGB, one JPEG each."""

    is_fixed_size = False
    level: int = 90
    subsampling: str = "420"

    NAME: ClassVar[str] = "imagecodecs_jpeg"

    def __post_init__(self) -> None:
        if not isinstance(self.level, int) or not 1 <= self.level <= 100:
            raise UsageError(f"imagecodecs_jpeg: level {self.level!r}", "avstore writes JPEG of quality 1 to 100")
        if self.subsampling not in ("444", "422", "420"):
            raise UsageError(f"imagecodecs_jpeg: subsampling {self.subsampling!r}", "avstore writes 444, 422 or 420")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> JpegCodec:
        configuration = dict(data.get("configuration") or {})
        unknown = sorted(set(configuration) - {"level", "subsampling"})
        if unknown:
            raise UsageError(
                f"imagecodecs_jpeg: option {unknown[0]!r} is not supported by avstore's codec",
                did_you_mean(unknown[0], ("level", "subsampling")),
                "install imagecodecs with its Zarr package to read this array",
            )
        return cls(**configuration)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.NAME, "configuration": {"level": self.level, "subsampling": self.subsampling}}

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a JPEG depends on its picture")

    def _decode(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        shape = tuple(chunk_spec.shape)
        out = np.empty(shape, np.uint8)
        decode_jpeg_into(chunk_bytes.to_bytes(), out.reshape(shape[-3], shape[-2], shape[-1]))
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(out)  # type: ignore[arg-type]  # its protocol lists one reshape overload

    def _encode(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        import simplejpeg

        frame = np.ascontiguousarray(chunk_array.as_numpy_array())
        if (
            frame.dtype != np.uint8
            or frame.ndim < 3
            or frame.shape[-1] != 3
            or frame.size != int(np.prod(frame.shape[-3:]))
        ):
            raise UsageError(
                f"imagecodecs_jpeg cannot store a chunk {frame.dtype} {frame.shape}",
                "one uint8 RGB frame per chunk, (1, H, W, 3)",
            )
        data = simplejpeg.encode_jpeg(
            frame.reshape(frame.shape[-3:]),
            quality=self.level,
            colorspace="RGB",
            colorsubsampling=self.subsampling,
            fastdct=False,
        )
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode, chunk_bytes, chunk_spec)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode, chunk_array, chunk_spec)
