"""NVIDIA DALI, the one place that imports it: a file's bytes in, all of its pictures out in order, scaled, on a device.

`why_not(kind)` tells what keeps a kind of decoding from working here. A `Stream` is a DALI pipeline that serves one
file after another; DALI's pipelines die with the first bad file, so whoever sees it fail makes a new one. Colours
come as DALI makes them (BT.601, whatever the stream says); which picture is shown when, and all judgement, is
`avstore.decode_dali`. Its CPU build decodes VP8, VP9 and MJPEG only: good for tests, and for machines without a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import ExtraMissingError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {
    "dali": "pictures on NVDEC, JPEG on the CPU",
    "dali-nvjpeg": "pictures on NVDEC, JPEG on the device by nvImageCodec",
    "dali-cpu": "DALI's CPU build: VP8, VP9 and MJPEG",
}
CODECS = {  # FFmpeg's names of what a backend of DALI 2.4 decodes; MPEG-4 in AVI has no times before decoding
    "cpu": {"vp8", "libvpx", "vp9", "libvpx-vp9", "mjpeg"},
    "gpu": {"h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "libaom-av1", "mpeg4", "mjpeg"},
}
SEQUENCE = 16  # pictures that a pipeline makes at a time
MOST_BYTES = 2**31 - 1  # of a file: DALI counts them in an int
PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
INSTALL = "pip install 'avstore[gpu]' on Linux with CUDA"


def backend(kind: str) -> str:
    """'gpu' or 'cpu', which DALI works on for this kind."""
    return "cpu" if kind == "dali-cpu" else "gpu"


def installed() -> str | None:
    """The distribution of DALI that is installed, with its version."""
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return None


def cuda_devices() -> int:
    """How many CUDA devices the driver shows, without starting CUDA in this process' torch; 0 without a driver."""
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0


def has_nvdec() -> bool:
    """Whether the driver's library of the video decoder is there."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


def why_not(kind: str) -> str | None:
    """None where this kind of decoding works, else what is missing and how to get it."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return f"DALI is not installed ({INSTALL})"
    if backend(kind) == "gpu":
        if not cuda_devices():
            return "there is no CUDA device (nvidia-smi should list one)"
        if not has_nvdec():
            return "libnvcuvid.so.1 is not there (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"
    if kind == "dali-nvjpeg" and importlib.util.find_spec("nvidia.nvimgcodec") is None:
        return "nvImageCodec is not installed (pip install nvidia-nvimgcodec-cu13[all])"
    try:
        import nvidia.dali.fn  # noqa: F401
    except Exception as e:  # whatever a broken installation raises
        return f"DALI does not start: {type(e).__name__}: {e}"
    return None


def choose(asked: str) -> tuple[str, str]:
    """Who decodes, "pyav" or one of KINDS, and one line to tell where `auto` chose.

    UsageError for an unknown name, ExtraMissingError for a kind that does not work here."""
    if asked == "pyav":
        return "pyav", ""
    if asked == "auto":
        missing = why_not("dali")
        return ("dali", f"{installed()} on {cuda_devices()} CUDA device(s)") if missing is None else ("pyav", missing)
    if asked not in KINDS:
        raise UsageError(f"no decoder {asked!r}", did_you_mean(asked, ("auto", "pyav", *KINDS)))
    missing = why_not(asked)
    if missing is not None:
        what = f"--decode {asked} does not work here"
        raise ExtraMissingError(what, missing, "--decode pyav, or auto; avstore doctor")
    return asked, ""


def versions(kind: str) -> dict[str, str]:
    """What shapes the pictures, for the record: DALI, its device, the driver's CUDA version."""
    out = {"dali": installed() or "unknown", "decode": kind}
    if backend(kind) == "gpu":
        import torch

        out |= {"device": torch.cuda.get_device_name(device_index()), "cuda": str(torch.version.cuda)}
        if kind == "dali-nvjpeg":
            out["nvimagecodec"] = _version("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")
    return out


def device_index() -> int:
    """The CUDA device of this process: decoding children spread over all of them."""
    return os.getpid() % max(cuda_devices(), 1)


class Stream:
    """A pipeline that scales to (width, height) given with each file; not for several threads."""

    def __init__(self, where: str) -> None:
        import nvidia.dali.fn as fn
        from nvidia.dali import types
        from nvidia.dali.pipeline import Pipeline

        self.where = where
        self.index = device_index() if where == "gpu" else None
        self.pipe: Any = Pipeline(batch_size=1, num_threads=1, device_id=self.index, prefetch_queue_depth=1)
        with self.pipe:
            pictures = fn.experimental.inputs.video(
                name="file",
                sequence_length=SEQUENCE,
                device="mixed" if where == "gpu" else "cpu",
                last_sequence_policy="partial",
                affine=False,
            )
            size = fn.external_source(name="size", device="cpu")
            # a triangle that widens where it scales down, as swscale's "bilinear" does
            self.pipe.set_outputs(fn.resize(pictures, size=size, interp_type=types.INTERP_LINEAR, antialias=True))
        self.pipe.build()

    def pictures(self, data: np.ndarray, count: int, scale: tuple[int, int]) -> Iterator[Tensor]:
        """The `count` pictures of the file whose bytes are `data`, uint8 (n, height, width, 3) RGB at a time, in the
        order in which they are shown, on the device. Raises RuntimeError where DALI fails, and where it makes another
        number of pictures; then, and when left early, this pipeline is of no more use (`spent`)."""
        import torch
        from nvidia.dali.plugin.pytorch import feed_ndarray

        self.spent = True
        width, height = scale
        wanted = np.array([[height, width]], np.float32)
        self.pipe.feed_input("file", data[None])
        done = n = 0
        while done < count:
            self.pipe.feed_input("size", wanted)
            (out,) = self.pipe.run()
            made = out[0]
            shape = tuple(made.shape())
            n = shape[0]
            if n == 0 or done + n > count or shape[1:] != (height, width, 3):
                raise RuntimeError(f"the device made pictures of shape {shape} after {done} of {count}")
            place = torch.device("cpu") if self.index is None else torch.device("cuda", self.index)
            chunk = torch.empty(shape, dtype=torch.uint8, device=place)
            stream = torch.cuda.current_stream(place) if place.type == "cuda" else None
            feed_ndarray(made, chunk, cuda_stream=stream)
            done += n
            yield chunk
        # a last sequence that is full does not prove that it was the last: what is left would begin the next file
        self.spent = n == SEQUENCE

    spent = False


def _version(*names: str) -> str:
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "unknown"
