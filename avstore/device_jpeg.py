"""Decoders of JPEG for `avstore.packed`: nvImageCodec and torchvision (nvJPEG) on a CUDA device, libjpeg-turbo here.

    decode = make("nvimagecodec", torch.device("cuda", 0))
    pixels = decode(jpegs, height, width)       # uint8 (n, H, W, 3) on the device, on torch's current stream

A device's pixels are not libjpeg-turbo's to the bit (another inverse transform, a few levels apart): a run says which
it used. `cpu` gives those of the loader's ordinary path to the bit and stands in for a device in tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.codecs import decode_jpeg_into
from avstore.errors import ExtraMissingError, UsageError, did_you_mean
from avstore.packed import Decode

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGES = {"nvimagecodec": "nvidia.nvimgcodec", "torchvision": "torchvision"}
INSTALL = "pip install 'avstore[gpu]' (nvImageCodec comes with DALI), or a torchvision built for CUDA"


def why_not(name: str, device: torch.device) -> str | None:
    """None where this decoder can be tried on `device`, else what is missing. UsageError for an unknown name."""
    if name not in MAKERS:
        raise UsageError(f"no JPEG decoder {name!r}", did_you_mean(name, MAKERS))
    if name == "cpu":
        return None
    if device.type != "cuda":
        return f"it decodes on a CUDA device, this is {device}"
    package = PACKAGES[name]
    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        return f"{package} is not installed ({INSTALL})"
    return None


def make(name: str, device: torch.device) -> Decode:
    """The decoder of this name, proven on one picture. UsageError for an unknown name, ExtraMissingError where it is
    not installed, or does not decode here."""
    missing = why_not(name, device)
    if missing is None:
        try:
            made = MAKERS[name](device)
            _prove(made, device)
            return made
        except Exception as e:  # whatever a library without its own libraries raises
            missing = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    raise ExtraMissingError(f"JPEG is not decoded by {name} on {device}", missing, "--set jpeg=cpu; avstore doctor")


def available(device: torch.device) -> dict[str, Decode | str]:
    """Every decoder of a device, `cpu` not among them: the function, or why it does not work."""
    out: dict[str, Decode | str] = {}
    for name in PACKAGES:
        try:
            out[name] = make(name, device)
        except ExtraMissingError as e:
            out[name] = e.why
    return out


def _prove(decode: Decode, device: torch.device) -> None:
    """A smooth picture comes back within 8 levels, of the right shape: a decoder that is broken is found here."""
    from avstore.codecs import encode_jpeg

    y, x = np.mgrid[:32, :48]
    picture = np.stack([2 * x + y, 96 + x, 200 - 3 * y], -1).astype(np.uint8)
    jpeg = np.frombuffer(encode_jpeg(picture, 90), np.uint8)
    made = decode([jpeg, jpeg], 32, 48)
    if tuple(made.shape) != (2, 32, 48, 3) or made.device.type != device.type:
        raise RuntimeError(f"it gave {tuple(made.shape)} on {made.device}")
    off = float(np.abs(made[1].cpu().numpy().astype(int) - picture).mean())
    if off > 8:
        raise RuntimeError(f"a known picture came back {off:.0f} levels off")


def _cpu(device: torch.device) -> Decode:
    """libjpeg-turbo, one thread; the pixels are copied to `device`."""
    import torch

    def decode(jpegs: Sequence[np.ndarray], height: int, width: int) -> Tensor:
        out = np.empty((len(jpegs), height, width, 3), np.uint8)
        for one, row in zip(jpegs, out, strict=True):
            decode_jpeg_into(one, row)
        return torch.from_numpy(out).to(device)

    return decode


def _nvimagecodec(device: torch.device) -> Decode:
    import torch
    from nvidia import nvimgcodec as codec

    # never its own CPU decoder: that is the loader's work; upsampling of colour as libjpeg-turbo does it
    kinds = (codec.HW_GPU_ONLY, codec.GPU_ONLY, codec.HYBRID_CPU_GPU)
    decoder = codec.Decoder(
        device_id=_index(device), backends=[codec.Backend(kind) for kind in kinds], options=":fancy_upsampling=1"
    )
    params = codec.DecodeParams(apply_exif_orientation=False)

    def decode(jpegs: Sequence[np.ndarray], height: int, width: int) -> Tensor:
        stream = torch.cuda.current_stream(device)
        streams = [codec.CodeStream(one) for one in jpegs]
        images = decoder.decode(streams, params=params, cuda_stream=stream.cuda_stream)
        if any(one is None for one in images):
            raise ValueError(f"nvImageCodec decoded {sum(one is not None for one in images)} of {len(jpegs)} pictures")
        # one copy, on the same stream: the images' own memory goes back with them
        return torch.stack([torch.as_tensor(one, device=device) for one in images])

    return decode


def _torchvision(device: torch.device) -> Decode:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(jpegs: Sequence[np.ndarray], height: int, width: int) -> Tensor:
        given = [torch.from_numpy(one) for one in jpegs]
        try:
            made = decode_jpeg(given, mode=ImageReadMode.RGB, device=device)
        except RuntimeError as e:
            raise ValueError(f"torchvision: {' '.join(str(e).split())[:200]}") from e
        return torch.stack(made).permute(0, 2, 3, 1).contiguous()

    return decode


MAKERS: dict[str, Callable[[Any], Decode]] = {
    "cpu": _cpu, "nvimagecodec": _nvimagecodec, "torchvision": _torchvision,
}  # fmt: skip


def _index(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index
