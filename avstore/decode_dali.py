"""The decoder of pictures on a device, by NVIDIA DALI, on the same clock as PyAV's; sound is always PyAV's.

A file is read three times, from the page cache: its first picture is decoded by PyAV (size, turn, colours); its
packets go through PyAV's own clock (`decode_pyav.Job`) with timestamps in place of decoded pictures, which says for
every row which source frame it shows, and decodes the sound; DALI decodes all pictures in one stream, scales them,
and those that are shown are corrected in colour, turned, cut and padded on the device.

DALI hides damage: it conceals broken pictures and ends early without an error. So whatever is not plain (a codec or
pixel format that the device lacks, damaged, missing or repeated timestamps, edit lists, several sizes, a count that
differs) raises `Unfit`, and pictures are compared with PyAV's at up to three keyframes. An unfit file is PyAV's, from
the beginning; the record says why.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from avstore import dali
from avstore.decode_pyav import EXACT_INDEX
from avstore.encode import encode_batch
from avstore.facts import Facts, Sink
from avstore.fit import Fit
from avstore.pictures import Pictures
from avstore.probe import DecodeFailed, Streams, choose, format_name, open_media
from avstore.spec import Spec
from avstore.timeline import Clock, Scan, Shown, Timed, Unfit, scan

if TYPE_CHECKING:
    from torch import Tensor

LEAST_PSNR = 35.0  # dB between DALI's picture and PyAV's, as stored: below it the device shows something else
FAR = 60  # seconds before a segment's start that are still decoded only to be dropped
COLOURS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593),
           10: (0.2627, 0.0593)}  # swscale's matrices -> Kr, Kb  # fmt: skip


def decode(
    path: str | Path,
    spec: Spec,
    sink: Sink,
    *,
    start: Fraction | None = None,
    end: Fraction | None = None,
    slot_seconds: int,
    device: Device,
) -> Facts:
    """As `decode_pyav.decode`, with the pictures from `device`. Raises Unfit for whatever PyAV must decode or judge,
    failures of the file included: `sink` has then taken some of it and must be thrown away."""
    data = read(Path(path))
    with _judged():
        with open_media(path) as container:
            streams = choose(container, spec.picture)
            require_fit(container, streams, device.where, start)
            index = streams.video.index  # a stream's attributes go with its container
            seen = scan(Path(path), index, device.where)
        shown = Shown(sink)
        with open_media(path) as container:
            streams = choose(container, spec.picture)
            timed = Timed(container, streams.video, seen)
            job = Clock(Path(path), timed, streams, spec, shown, start, end, slot_seconds)
            job.first = seen.first
            facts = job.run(seek=False)
            how = job.how
        if job.broken or facts.errors or facts.source_frames > len(seen.pts):
            raise Unfit("its packets are damaged")
    if how is None or not shown.rows:
        raise Unfit("it shows no picture")
    checks = {k: picture for k, picture in reference(Path(path), seen, index, spec).items() if k in shown.ordinals}
    try:
        device.show(data, seen, how, shown.rows, checks, spec, sink)
    except RuntimeError as e:
        raise Unfit(f"the device failed: {_brief(e)}") from e
    return replace(facts, decoder="dali")


class Device:
    """The stream that decodes, made anew after each failure, and the way to JPEG. `kind`: of dali.KINDS."""

    def __init__(self, kind: str) -> None:
        self.kind, self.where = kind, dali.backend(kind)
        self.encoder = "nvimagecodec" if kind == "dali-nvjpeg" else "cpu"
        # of a video whose pictures it decodes; what falls back to PyAV is the CPU's, sound and all
        self.sound_on = f"cuda:{dali.device_index()}" if self.where == "gpu" else "cpu"
        self.stream: Any = None

    def show(
        self,
        data: np.ndarray,
        seen: Scan,
        how: Fit,
        rows: list[tuple[int, int]],
        checks: dict[int, np.ndarray],
        spec: Spec,
        sink: Sink,
    ) -> None:
        """Hands the pictures of `rows` ((ordinal, repeat), rising) to the sink; those of `checks` are compared."""
        if self.stream is None or self.stream.spent:
            self.stream = dali.Stream(self.where)
        repeats, first = dict(rows), 0
        mix = colour_mix(seen.space)
        for chunk in one_ahead(self.stream.pictures(data, len(seen.pts), how.scale)):
            wanted = [k for k in range(first, first + len(chunk)) if k in repeats]
            if wanted:
                pictures = lay(chunk[[k - first for k in wanted]], how, mix)
                for k in wanted:
                    if k in checks:
                        compare(pictures[wanted.index(k)], checks[k], k)
                self._hand_out(pictures, wanted, repeats, spec, sink)
            first += len(chunk)

    def _hand_out(self, pictures: Tensor, wanted: list[int], repeats: dict[int, int], spec: Spec, sink: Sink) -> None:
        take = getattr(sink, "encoded", None)
        if self.encoder == "cpu" or spec.codec != "jpeg" or take is None:
            for picture, k in zip(pictures.cpu().numpy(), wanted, strict=True):
                sink.frame(picture, k, repeats[k])
            return
        for jpeg, k in zip(encode_batch(pictures, spec.quality, self.encoder), wanted, strict=True):
            take(jpeg, k, repeats[k])

    def close(self) -> None:
        self.stream = None


def one_ahead(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The chunks, the next one decoded by another thread while this one is laid and encoded."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, chunks, None)
            yield chunk


# What may go to the device


def read(path: Path) -> np.ndarray:
    """The file's bytes, uint8 (n,). Raises Unfit for an empty or too large one, and where the disk fails."""
    try:
        size = path.stat().st_size
        if not 0 < size <= dali.MOST_BYTES:
            raise Unfit(f"{size} bytes, the device takes up to {dali.MOST_BYTES}")
        return np.fromfile(path, np.uint8)
    except OSError as e:
        raise Unfit(e.strerror or str(e)) from e


def require_fit(container: Any, streams: Streams, where: str, start: Fraction | None) -> None:
    """Unfit unless one plain stream of pictures is there whose codec the device has."""
    video = streams.video
    if video is None or video.codec_context is None:
        raise Unfit("no picture that the device could decode")
    name = video.codec_context.name
    if name not in dali.CODECS[where]:
        raise Unfit(f"{name} is not decoded by DALI on the {where.upper()}")
    if name == "mpeg4" and format_name(container) == "avi":
        raise Unfit("MPEG-4 in AVI has no times before it is decoded")
    if container.streams.best("video") is not video:
        raise Unfit("the device would take another stream of pictures")
    if start and start > FAR:
        raise Unfit(f"it starts {float(start):.0f} s into its file, where PyAV seeks")


# Pixels


def colour_mix(space: int) -> np.ndarray | None:
    """float32 (3, 3) from RGB by BT.601 to RGB by swscale's matrix `space`; None where they are the same.

    Both are linear in the same Y', Cb, Cr, whatever the range, so that the way back and forth is one matrix."""
    if space == 5:
        return None
    return (_to_rgb(*COLOURS[space]) @ np.linalg.inv(_to_rgb(*COLOURS[5]))).astype(np.float32)


def _to_rgb(kr: float, kb: float) -> np.ndarray:
    """Y', Cb, Cr in [0, 1] and [-0.5, 0.5] -> RGB, from the definition of the colour differences (BT.709, 3.3)."""
    kg = 1 - kr - kb
    return np.array(
        [
            [1, 0, 2 * (1 - kr)],
            [1, -2 * kb * (1 - kb) / kg, -2 * kr * (1 - kr) / kg],
            [1, 2 * (1 - kb), 0],
        ]
    )


def lay(pictures: Tensor, how: Fit, mix: np.ndarray | None = None) -> Tensor:
    """uint8 (n, h, w, 3) at how.scale -> uint8 (n, H, W, 3): `Fit.lay` for a batch, on its device, colours mixed."""
    import torch

    if mix is not None:
        matrix = torch.from_numpy(mix).to(pictures.device)
        pictures = (pictures.float() @ matrix.T).round_().clamp_(0, 255).to(torch.uint8)
    transpose, flip_x, flip_y = how.turn
    if transpose:
        pictures = pictures.transpose(1, 2)
    if flip_x or flip_y:
        pictures = pictures.flip([d for d, on in ((2, flip_x), (1, flip_y)) if on])
    y, x, h, w = how.box
    rows = (torch.arange(how.into[0], device=pictures.device) - y).clamp_(0, h - 1) + how.crop[0]
    columns = (torch.arange(how.into[1], device=pictures.device) - x).clamp_(0, w - 1) + how.crop[1]
    return pictures[:, rows[:, None], columns].contiguous()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between two uint8 arrays of one shape; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare(picture: Tensor, wanted: np.ndarray, ordinal: int) -> None:
    """Unfit where the device's picture is not the one that PyAV shows there."""
    found = psnr(picture.cpu().numpy(), wanted)
    if found < LEAST_PSNR:
        raise Unfit(f"picture {ordinal} of the device is {found:.1f} dB from PyAV's, {LEAST_PSNR:g} are asked")


def reference(path: Path, seen: Scan, index: int, spec: Spec) -> dict[int, np.ndarray]:
    """PyAV's picture, as stored, at the first, a middle and the last keyframe, by ordinal."""
    out: dict[int, np.ndarray] = {}
    with open_media(path) as container:
        stream = container.streams[index]
        stream.codec_context.thread_count = 1
        maker = Pictures(stream, spec, _Nothing(), None, None, 1, packed=False)
        out[0] = maker._picture(seen.first)
        if format_name(container) not in EXACT_INDEX:
            return out
        for ordinal in {seen.keys[len(seen.keys) // 2], seen.keys[-1]} - {0}:
            with contextlib.suppress(av.error.FFmpegError):
                container.seek(seen.pts[ordinal], stream=stream)
                for frame in container.decode(stream):
                    if frame.pts is not None and frame.pts >= seen.pts[ordinal]:
                        if frame.pts == seen.pts[ordinal]:
                            out[ordinal] = maker._picture(frame)
                        break
    return out


class _Nothing:
    """A sink that nothing is given to."""

    def frame(self, picture: np.ndarray, source: int, repeat: int) -> None: ...

    def sound(self, samples: np.ndarray) -> None: ...


@contextlib.contextmanager
def _judged() -> Iterator[None]:
    """Failures of the file are PyAV's to judge, whole and by decoding."""
    try:
        yield
    except DecodeFailed as e:
        raise Unfit(e.message) from e


def _brief(error: Exception) -> str:
    """The last words of DALI's long errors, without a traceback."""
    noise = (" ", "Critical", "Error in", "which was", "encountered", "Current pipeline", "C++ context", "[frame")
    words = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(noise)]
    return (words[0] if words else type(error).__name__)[:200]
