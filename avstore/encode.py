"""Pictures to JPEG, many at a time: on CPU threads, or on the device by nvImageCodec, behind one function.

The CPU's bytes are those of `codecs.encode_jpeg`; nvImageCodec's decode to pictures a little apart, so the record says
which it was. The device pays where the pictures are there already and the CPU is busy: `avstore bench gpu` measures it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.codecs import encode_jpeg
from avstore.errors import ExtraMissingError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = ("cpu", "nvimagecodec")
_made: dict[int, Any] = {}  # an encoder for each device


def encode_batch(pictures: Tensor | np.ndarray, quality: int, encoder: str = "cpu", threads: int = 1) -> list[bytes]:
    """One JPEG, 4:2:0, of each RGB picture of uint8 (n, H, W, 3), in order.

    encoder: "cpu" (`threads` of them) or "nvimagecodec" (a CUDA tensor). UsageError for another name, shape or dtype;
    ExtraMissingError where nvImageCodec is not installed.
    """
    if encoder not in ENCODERS:
        raise UsageError(f"no JPEG encoder {encoder!r}", did_you_mean(encoder, ENCODERS))
    if pictures.ndim != 4 or pictures.shape[3] != 3 or not 1 <= quality <= 100:
        raise UsageError(f"pictures of shape {tuple(pictures.shape)} at quality {quality}", "uint8 (n, H, W, 3), 1-100")
    if encoder == "nvimagecodec":
        return _on_device(pictures, quality)
    array = pictures if isinstance(pictures, np.ndarray) else pictures.cpu().numpy()
    if array.dtype != np.uint8:
        raise UsageError(f"pictures of {array.dtype}", "uint8 (n, H, W, 3) is asked")
    array = np.ascontiguousarray(array)
    if threads < 2:
        return [encode_jpeg(one, quality) for one in array]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda one: encode_jpeg(one, quality), array))


def _on_device(pictures: Any, quality: int) -> list[bytes]:
    try:
        from nvidia import nvimgcodec
    except ImportError as e:
        raise ExtraMissingError(
            "nvImageCodec is not installed", str(e), "pip install nvidia-nvimgcodec-cu13[all], or encode on the CPU"
        ) from e
    if not getattr(pictures, "is_cuda", False):
        raise UsageError("nvImageCodec encodes pictures on a CUDA device", "these are elsewhere", "encoder='cpu'")
    import torch

    index = pictures.device.index or 0
    if index not in _made:  # of the pictures' own device, and never its encoder on the CPU
        kinds = (nvimgcodec.HW_GPU_ONLY, nvimgcodec.GPU_ONLY, nvimgcodec.HYBRID_CPU_GPU)
        _made[index] = nvimgcodec.Encoder(device_id=index, backends=[nvimgcodec.Backend(kind) for kind in kinds])
    stream = torch.cuda.current_stream(pictures.device).cuda_stream
    params = nvimgcodec.EncodeParams(
        quality_type=nvimgcodec.QualityType.QUALITY,
        quality_value=quality,
        chroma_subsampling=nvimgcodec.ChromaSubsampling.CSS_420,
    )
    images = [nvimgcodec.as_image(one, stream) for one in pictures]
    out = _made[index].encode(images, codec="jpeg", params=params, cuda_stream=stream)
    if len(out) != len(pictures) or any(one is None for one in out):
        raise RuntimeError("nvImageCodec encoded fewer pictures than it was given")
    return [bytes(memoryview(one)) for one in out]
