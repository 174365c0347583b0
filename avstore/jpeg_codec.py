"""The Zarr v3 codec `imagecodecs_jpeg`, under which any Zarr reader finds the frames; Zarr loads it by its entry point.

Id and configuration are those that imagecodecs publishes (level and subsampling), so either package opens a store.
avstore's own reader and writer do without: they call `avstore.codecs`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from avstore.codecs import decode_jpeg_into
from avstore.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer


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
