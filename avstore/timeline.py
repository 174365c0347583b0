"""PyAV's clock on the times of packets alone: which source frame each row shows, without decoding a picture.

For decoders that take a file as a whole and say nothing of time. `scan` reads the packets, and refuses (`Unfit`) what
cannot be known before decoding; `Clock` is `decode_pyav.Job`, its loop, its sound and its judgement, with stamps in
place of decoded pictures. No pixel is touched here but the file's first picture's: it tells size, turn and colours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from avstore.decode_pyav import Job
from avstore.facts import Sink
from avstore.fit import Fit
from avstore.pictures import MATRICES, Pictures
from avstore.probe import open_media

FORMATS = {"yuv420p": 1, "yuvj420p": 2, "nv12": 1}  # pixel formats of all devices -> their range unless named


class Unfit(Exception):
    """A file that PyAV must decode; the words are for its record."""


@dataclass
class Stamp:
    """A picture of which only the time is known; takes the place of a decoded frame on the clock."""

    pts: int
    duration: int
    dts: None = None
    is_corrupt: bool = False


@dataclass(frozen=True)
class Scan:
    """The pictures of a file by its packets: times and durations in the order in which they are shown (ticks), which
    of them are keyframes, and FFmpeg's first picture."""

    pts: list[int]
    durations: list[int]
    keys: list[int]  # ordinals
    first: Any
    space: int


def scan(path: Path, index: int, where: str) -> Scan:
    """Packets and the first picture of the stream `index`. Unfit for what the clock cannot know without decoding."""
    times: list[tuple[int, int, bool]] = []
    first = _first_picture(path, index)
    with open_media(path) as container:
        stream = container.streams[index]
        listed, profile = stream.frames, str(stream.codec_context.pix_fmt)
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_discard or packet.is_corrupt:
                raise Unfit("an edit list or damaged packets")
            if packet.pts is None:
                raise Unfit("packets without timestamps")
            times.append((packet.pts, packet.duration or 0, bool(packet.is_keyframe)))
    times.sort()
    pts = [t for t, _, _ in times]
    if len(pts) < 2:
        raise Unfit("fewer than two pictures")
    if len(set(pts)) != len(pts):
        raise Unfit("two pictures with one timestamp")
    if listed and listed != len(pts):
        raise Unfit(f"its header counts {listed} pictures, its packets {len(pts)}")
    if first.pts != pts[0]:
        raise Unfit("it does not begin with the picture that is shown first")
    if not times[0][2]:
        raise Unfit("it does not begin with a keyframe")
    named = int(first.color_range)
    if profile not in FORMATS or first.format.name != profile:
        raise Unfit(f"its pixels are {first.format.name}: the device takes 8-bit 4:2:0")
    if where == "cpu" and named in (1, 2) and named != FORMATS[profile]:
        raise Unfit("its range of values differs from what its pixel format says")
    space = MATRICES.get(int(first.colorspace), 1 if first.height >= 720 else 5)
    keys = [k for k, (_, _, key) in enumerate(times) if key]
    return Scan(pts, [d for _, d, _ in times], keys, first, space)


def _first_picture(path: Path, index: int) -> Any:
    """FFmpeg's first decoded frame; Unfit where there is none."""
    with open_media(path) as container, contextlib.suppress(av.error.FFmpegError):
        container.streams[index].codec_context.thread_count = 1
        for frame in container.decode(container.streams[index]):
            return frame
    raise Unfit("its first packets are damaged")


class Shown:
    """Takes the clock's rows as (ordinal, repeat), and hands the sound through."""

    def __init__(self, sink: Sink) -> None:
        self.rows: list[tuple[int, int]] = []
        self.ordinals: set[int] = set()
        self.sound = sink.sound

    def frame(self, picture: np.ndarray, source: int, repeat: int) -> None:
        self.rows.append((source, repeat))
        self.ordinals.add(source)


class _Timeline(Pictures):
    """Rows of a clock whose frames are stamps: no pixels, but the fit of the file's first picture."""

    first: Any
    how: Fit | None = None

    def _picture(self, frame: Any) -> np.ndarray:
        if self.how is None:
            self.how = self._fit(self.first)
        return np.empty(0, np.uint8)


class Clock(Job):
    """PyAV's loop over packets and judgement, with stamps in place of pictures."""

    first: Any  # FFmpeg's first picture
    pictures: Any

    def make_pictures(self, video: Any, packed: bool) -> Pictures:
        made = _Timeline(video, self.spec, self.sink, self.start, self.length, self.slot, packed)
        made.first = self.first
        return made

    @property
    def how(self) -> Fit | None:
        return self.pictures.how if self.pictures is not None else None


class Timed:
    """A container whose packets of pictures decode to stamps, in the order in which they are shown."""

    def __init__(self, container: Any, stream: Any, seen: Scan) -> None:
        self._container, self._index = container, stream.index
        self._stamps = iter([Stamp(p, d) for p, d in zip(seen.pts, seen.durations, strict=True)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def demux(self) -> Iterator[Any]:
        for packet in self._container.demux():
            index = packet.stream_index if packet.size else packet.stream.index
            yield _TimedPacket(packet, self._stamps) if index == self._index else packet


class _TimedPacket:
    def __init__(self, packet: Any, stamps: Iterator[Stamp]) -> None:
        self._packet, self._stamps = packet, stamps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def decode(self) -> list[Stamp]:
        if not self._packet.size:
            return list(self._stamps)
        return [stamp] if (stamp := next(self._stamps, None)) is not None else []
