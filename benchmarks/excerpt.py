"""Stretches of a media file, one after another, as a new video with its sound: H.264 and AAC in mp4.

Cut on the video's clock (t = 0: the first frame shown, else the first sample): pictures keep their times within each
stretch, so a varying frame rate stays so; what is shown when a stretch begins is shown from its first moment on; sound
is cut to the sample, gaps are silence. Turned as the file says, odd sizes made even. Nothing is chosen here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from avstore.durable import machine_errors, sync_folder
from avstore.errors import AvstoreError, ConflictError, UsageError
from avstore.fit import turn_of
from avstore.probe import DecodeFailed, choose, open_media

TICKS = 90_000
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # that AAC has
AHEAD = Fraction(1, 2)  # seconds by which sound is written before pictures
Interval = tuple[Fraction, Fraction]


@dataclass(frozen=True)
class Written:
    """Pictures and samples (of each channel) written; 0 where the source has none."""

    seconds: Fraction
    frames: int
    samples: int


def write_excerpt(
    source: str | os.PathLike[str], intervals: Sequence[Interval], out: str | os.PathLike[str], force: bool = False
) -> Written:
    """Writes the intervals (seconds, ascending, apart) of `source` to `out`, an .mp4 file, whole or not at all.

    UsageError for intervals that cannot be or a source that cannot be decoded, ConflictError where `out` is there and
    `force` is not given.
    """
    path = Path(out)
    times = [(Fraction(a), Fraction(b)) for a, b in intervals]
    edges = [t for pair in times for t in pair]
    if not times or edges[0] < 0 or edges != sorted(edges) or any(a == b for a, b in times):
        raise UsageError("intervals that overlap, run backwards or are none", "from < to, ascending")
    if path.suffix.lower() not in (".mp4", ".m4v", ".mov"):
        raise UsageError(f"{path.name}: the summary is written as mp4", "", "name it OUT.mp4")
    if path.exists() and (not force or path.is_dir()):
        raise ConflictError(f"{path} is there already", "", "--force replaces it, or name another file")
    if path.exists() and os.path.samefile(path, source):
        raise ConflictError(f"{path} is the video itself", "it would be replaced by its summary", "name another file")
    tmp = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    with machine_errors(path):
        try:
            written = _written(Path(source), times, tmp)
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())
            os.rename(tmp, path)
        except DecodeFailed as e:
            raise UsageError(f"{source} cannot be decoded", str(e), "another file") from e
        finally:
            with suppress(OSError):
                os.unlink(tmp)
        sync_folder(path.parent)
    return written


def stills(source: str | os.PathLike[str], times: Sequence[float], tall: int = 120) -> list[NDArray[np.uint8]]:
    """uint8 (tall, w, 3): what is shown at each of these seconds, in their order. [] where there are no pictures."""
    want = sorted(range(len(times)), key=lambda i: times[i])
    out: dict[int, NDArray[np.uint8]] = {}
    with open_media(Path(source)) as container:
        stream = choose(container).video
        if stream is None or not want:
            return []
        last = None
        for frame, _, end in _shown(container, stream):
            while want and times[want[0]] < end:
                out[want.pop(0)] = _small(frame, stream, tall)
            if not want:
                break
            last = frame
        for i in want if last is not None else ():  # at or after the end
            out[i] = _small(last, stream, tall)
    return [out[i] for i in range(len(times))] if out else []


def _small(frame: Any, stream: Any, tall: int) -> NDArray[np.uint8]:
    transpose, flip_x, flip_y = _turn(frame)
    aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
    h, w = frame.height, max(1, round(frame.width * aspect))
    wide = max(2, round(tall * (h / w if transpose else w / h)))
    size = (wide, tall) if not transpose else (tall, wide)
    rgb = frame.reformat(width=size[0], height=size[1], format="rgb24", interpolation="AREA").to_ndarray()
    return _turned(rgb, transpose, flip_x, flip_y)


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    named = {data.type.name for data in frame.side_data}
    return turn_of(bytes(frame.side_data["DISPLAYMATRIX"]) if "DISPLAYMATRIX" in named else None)


def _turned(x: NDArray[np.uint8], transpose: bool, flip_x: bool, flip_y: bool) -> NDArray[np.uint8]:
    x = x.transpose(1, 0, 2) if transpose else x
    return np.ascontiguousarray(x[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _shown(container: Any, stream: Any) -> Iterator[tuple[Any, Fraction, Fraction]]:
    """(frame, from, to) in seconds since the first frame; damaged packets and frames out of order are left out."""
    stream.thread_type = "AUTO"
    origin = before = None
    begin, rate = Fraction(0), stream.average_rate or 25
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        for frame in frames:
            if frame.pts is None:
                at = begin + 1 / Fraction(rate) if before is not None else Fraction(0)
            else:
                origin = frame.pts * stream.time_base if origin is None else origin
                at = frame.pts * stream.time_base - origin
            if before is not None:
                if at <= begin:
                    continue
                yield before, begin, at
            before, begin = frame, at
    if before is not None:
        yield before, begin, begin + 1 / Fraction(rate)


def _written(source: Path, times: list[Interval], tmp: Path) -> Written:
    with open_media(source) as container:
        streams = choose(container)
        if streams.video is None and streams.audio is None:
            raise UsageError(f"{source} holds no media", "neither pictures nor sound")
        origin = None
        if streams.video is not None:
            for packet in container.demux(streams.video):
                origin = next((f.pts * f.time_base for f in packet.decode() if f.pts is not None), None)
                if origin is not None:
                    break
    sound, rate = _sound(source, times, origin) if streams.audio is not None else (None, 0)
    frames, fed = 0, 0
    with av.open(os.fspath(tmp), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        pictures: Any = None
        sounds: Any = None
        with open_media(source) as container:
            stream = choose(container).video
            if stream is not None:
                pictures = file.add_stream("libx264", rate=stream.average_rate or 25, options={"crf": "20"})
            if sound is not None:
                layout = "mono" if len(sound) == 1 else "stereo"
                sounds = file.add_stream("aac", rate=rate, layout=layout)

            def feed(until: Fraction) -> None:
                nonlocal fed
                while sound is not None and sounds is not None and fed < min(sound.shape[1], int(until * rate)):
                    part = np.ascontiguousarray(sound[:, fed : fed + 1024])
                    block = av.AudioFrame.from_ndarray(part, format="s16p", layout=layout)
                    block.sample_rate, block.pts, block.time_base = rate, fed, Fraction(1, rate)
                    file.mux(sounds.encode(block))
                    fed += part.shape[1]

            if stream is not None:
                last = -1
                for frame, at in _placed(container, stream, times):
                    ready = _ready(frame, pictures, stream)
                    ready.pts, ready.time_base = max(round(at * TICKS), last + 1), Fraction(1, TICKS)
                    last = ready.pts
                    file.mux(pictures.encode(ready))
                    frames += 1
                    feed(at + AHEAD)
                if not frames:
                    raise AvstoreError(
                        f"{source} shows nothing in the chosen moments", "", "avstore verify, or --debug"
                    )
            feed(Fraction(10**9))
        for out in (pictures, sounds):
            if out is not None:
                file.mux(out.encode())
    return Written(sum((b - a for a, b in times), Fraction(0)), frames, 0 if sound is None else sound.shape[1])


def _placed(container: Any, stream: Any, times: list[Interval]) -> Iterator[tuple[Any, Fraction]]:
    """(frame, when the excerpt shows it)."""
    offsets = np.cumsum([Fraction(0), *(b - a for a, b in times)])
    for frame, begin, end in _shown(container, stream):
        for (a, b), offset in zip(times, offsets, strict=False):
            if begin < b and end > a:
                yield frame, offset + max(begin - a, Fraction(0))
        if begin >= times[-1][1]:
            return


def _ready(frame: Any, out: Any, stream: Any) -> Any:
    """The frame upright, of even size, yuv420p; the first one fixes what the encoder is told."""
    turn = _turn(frame)
    if any(turn):
        frame = av.VideoFrame.from_ndarray(_turned(frame.to_ndarray(format="rgb24"), *turn), format="rgb24")
    if not out.codec_context.is_open:
        out.width, out.height = frame.width // 2 * 2, frame.height // 2 * 2
        out.pix_fmt = "yuv420p"
        out.codec_context.time_base = Fraction(1, TICKS)
        aspect = stream.sample_aspect_ratio
        if aspect:
            out.codec_context.sample_aspect_ratio = 1 / Fraction(aspect) if turn[0] else aspect
    return frame.reformat(width=out.width, height=out.height, format="yuv420p")


def _sound(source: Path, times: list[Interval], origin: Fraction | None) -> tuple[NDArray[np.int16], int]:
    """int16 (channels, samples) of all intervals one after another, and the rate."""
    edges = [Fraction(0)]
    for a, b in times:
        edges.append(edges[-1] + b - a)
    with open_media(source) as container:
        stream = choose(container).audio
        rate = stream.rate if stream.rate in RATES else 48000
        layout = "mono" if stream.channels == 1 else "stereo"
        out = np.zeros((1 if layout == "mono" else 2, int(edges[-1] * rate)), np.int16)
        resampler = av.AudioResampler(format="s16p", layout=layout, rate=rate)
        at = None

        def take(frames: Sequence[Any]) -> None:
            nonlocal origin, at
            for frame in frames:
                if frame.pts is not None:
                    begin = frame.pts * frame.time_base
                    origin = begin if origin is None else origin
                    at = round((begin - origin) * rate)
                here = 0 if at is None else at
                x = frame.to_ndarray()
                for (a, b), offset in zip(times, edges, strict=False):
                    first, last = max(here, round(a * rate)), min(here + x.shape[1], round(b * rate))
                    to = int(offset * rate) + first - round(a * rate)
                    last = min(last, first + out.shape[1] - to)
                    if first < last:
                        out[:, to : to + last - first] = x[:, first - here : last - here]
                at = here + x.shape[1]

        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    take(resampler.resample(frame))
            except av.error.InvalidDataError:
                continue
        take(resampler.resample(None))
    return out, rate
