"""Probe: how long a file is, what it holds and what it promises, without decoding it.

Opens media for the decoder too, so that both choose the same streams and read the same clock. PyAV is imported only
when a file is opened. Never sizes anything from a frame count in a header; durations that FFmpeg merely estimates from
a bit rate are replaced by a packet scan.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from avstore.durable import MACHINE_ERRNOS
from avstore.errors import MachineError
from avstore.records import REASONS
from avstore.spec import Spec

# Containers whose header states a duration. That of the next group is read from the last page, which cannot promise
# more than there is. For all others FFmpeg guesses, from a bit rate or the last packets: there all packets are scanned.
STATES = {"mov", "matroska", "avi", "flv", "asf", "wav", "w64", "flac", "aiff", "caf", "au", "nut", "mxf"}
FROM_LAST_PAGE = {"ogg"}
ABSOLUTE = {"matroska", "flv"}  # their one duration is the end on the file's own clock, of whatever stream is longest


class DecodeFailed(Exception):
    """A file that cannot become a video: one of REASONS, and the decoder's words without any path.

    `seconds` is the true length, where the reason is `longer_than_planned`.
    """

    def __init__(self, reason: str, message: str, seconds: Fraction | None = None) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        super().__init__(f"{reason}: {message}")
        self.reason, self.message, self.seconds = reason, message, seconds

    def __reduce__(self) -> tuple[type[DecodeFailed], tuple[str, str, Fraction | None]]:
        return type(self), (self.reason, self.message, self.seconds)


@dataclass(frozen=True)
class Probe:
    """What planning needs. `seconds`: length of the video on its clock (of the sound where there is no picture or a
    single one), after `start` and `end`. `stated`: from a header; else from timestamps or packets. `width`, `height`:
    as coded, before turn and pixel aspect."""

    seconds: Fraction
    has_picture: bool
    has_sound: bool
    single_picture: bool
    width: int | None
    height: int | None
    source_fps: str | None
    sample_rate: int | None
    size: int
    stated: bool


@dataclass(frozen=True)
class Streams:
    """The streams that make the video: PyAV's VideoStream and AudioStream, or None."""

    video: Any
    audio: Any


def words(error: BaseException) -> str:
    """An FFmpeg error without the path that PyAV puts in it."""
    return str(getattr(error, "strerror", None) or "") or type(error).__name__


def check_readable(path: Path, whole: bool = False) -> None:
    """Reads the first byte (or the whole file): MachineError for a bad disk, DecodeFailed for a bad file."""
    try:
        with open(path, "rb", buffering=0) as f:
            while f.read(1 << 20) and whole:
                pass
    except OSError as e:
        if e.errno in MACHINE_ERRNOS:
            why = e.strerror or str(e)
            raise MachineError(f"cannot read {path}", why, "check the disk, then repeat the command") from e
        raise DecodeFailed("unreadable", (e.strerror or type(e).__name__).lower()) from e


@contextlib.contextmanager
def open_media(path: str | Path) -> Iterator[Any]:
    """A PyAV input container, closed at the end. Failures of FFmpeg inside the block become DecodeFailed."""
    import av

    path = Path(path)
    check_readable(path)
    if path.stat().st_size == 0:
        raise DecodeFailed("unreadable", "the file is empty")
    try:
        container = av.open(os.fspath(path), metadata_errors="ignore")
        try:
            yield container
        finally:
            container.close()
    except MemoryError as e:  # in a child with an address-space limit
        raise DecodeFailed("too_large", "asks for more memory than one file may have") from e
    except (av.error.DecoderNotFoundError, av.error.PatchWelcomeError, av.error.ProtocolNotFoundError) as e:
        raise DecodeFailed("unsupported", words(e)) from e
    except av.error.FFmpegError as e:
        if e.errno in MACHINE_ERRNOS:
            check_readable(path, whole=True)  # FFmpeg answers EIO to garbage too; a bad disk shows here
        raise DecodeFailed("unreadable", words(e)) from e


def format_name(container: Any) -> str:
    return container.format.name.split(",")[0]


def choose(container: Any, picture: bool = True) -> Streams:
    """FFmpeg's best video and audio stream; cover art and thumbnails are no video, nor is a track without a sample."""
    from av.stream import Disposition

    if not len(container.streams):
        raise DecodeFailed("no_streams", "no streams")
    still = Disposition.attached_pic | Disposition.timed_thumbnails
    listed = format_name(container) == "mov"

    def empty(stream: Any) -> bool:
        alone = len(container.streams) == 1
        return listed and not alone and not stream.frames and bool(stream.duration) and not len(stream.index_entries)

    videos = [s for s in container.streams.video if not s.disposition & still] if picture else []
    filled = [s for s in videos if not empty(s)] or videos
    video = container.streams.best("video") if filled else None
    if filled and video not in filled:
        sized = {s.index: s.codec_context.width * s.codec_context.height if s.codec_context else 0 for s in filled}
        video = max(filled, key=lambda s: (bool(s.disposition & Disposition.default), sized[s.index], -s.index))
    audio = container.streams.best("audio")
    if audio is None and container.streams.audio:  # `best` knows no stream without channels
        audio = container.streams.audio[0]
    if video is None and audio is None:
        raise DecodeFailed("no_streams", "neither picture nor sound")
    return Streams(video, audio)


def check_size(width: int, height: int, spec: Spec) -> None:
    if width * height > spec.max_pixels:
        raise DecodeFailed("too_large", f"pictures of {width}x{height}, {spec.max_pixels} pixels are allowed")


def first_time(stream: Any) -> Fraction:
    return Fraction(0) if stream.start_time is None else stream.start_time * stream.time_base


def stated_end(container: Any, stream: Any) -> tuple[Fraction | None, bool]:
    """(when the header says that `stream` ends, on the file's clock; whether it says so of this very stream)."""
    name = format_name(container)
    if name == "mp3":
        seconds = xing_seconds(Path(container.name), stream)
        return (None if seconds is None else first_time(stream) + seconds), True
    if name not in STATES:
        return None, False
    if name in ("avi", "wav") and (cut := riff_seconds(Path(container.name), stream)) is not None:
        return first_time(stream) + cut, True
    if name not in ABSOLUTE and stream.duration:
        return first_time(stream) + stream.duration * stream.time_base, True
    if not container.duration:
        return None, False
    end = Fraction(container.duration, 1_000_000)
    return (end if name in ABSOLUTE else end + Fraction(container.start_time or 0, 1_000_000)), False


def xing_seconds(path: Path, stream: Any) -> Fraction | None:
    """Seconds of an MP3 by the frame count of its Xing or Info header; None without one (then nothing is stated)."""
    with open(path, "rb") as f:
        head = f.read(10)
        skip = 0
        if head[:3] == b"ID3" and len(head) == 10:
            skip = 10 + sum((b & 127) << (7 * (3 - i)) for i, b in enumerate(head[6:10]))
        f.seek(skip)
        data = f.read(256)
    for tag in (b"Xing", b"Info"):
        at = data.find(tag)
        if at >= 4 and len(data) >= at + 12 and data[at + 7] & 1 and stream.codec_context:
            count, rate = int.from_bytes(data[at + 8 : at + 12], "big"), stream.codec_context.sample_rate
            if count and rate:
                return Fraction(count * (1152 if rate >= 32000 else 576), rate)
    return None


def riff_seconds(path: Path, stream: Any) -> Fraction | None:
    """Seconds that an AVI or WAV header states, where the file is shorter than its RIFF says; else None.

    FFmpeg answers with what is left of such a file, so that the cut would not show. Writers that could not seek back
    leave 0 or something close to 2 or 4 GiB: that states nothing.
    """
    with open(path, "rb") as f:
        head = f.read(1 << 16)
    size, whole = path.stat().st_size, 8 + int.from_bytes(head[4:8], "little")
    if head[:4] != b"RIFF" or size >= whole or whole > 0x7FFF0000:
        return None
    if head[8:12] != b"AVI ":
        return stream.duration * stream.time_base * Fraction(whole, size) if stream.duration else None
    at = -1
    for _ in range(stream.index + 1):  # stream headers: type 4, handler 4, 12 more, scale, rate, start, length
        at = head.find(b"strh", at + 1)
        if at < 0:
            return None
    scale, rate, _, length = (int.from_bytes(head[at + 8 + k : at + 12 + k], "little") for k in (20, 24, 28, 32))
    return Fraction(length * scale, rate) if scale and rate and length else None


def scan(container: Any, stream: Any) -> tuple[Fraction, Fraction, int]:
    """(first time, end, packets) of a stream from its packets; DecodeFailed where there is none or no time in them."""
    import av

    first = last = None
    total = count = 0
    try:
        for packet in container.demux(stream):
            if packet.is_discard or not packet.size:
                continue
            count += 1
            total += packet.duration or 0
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is not None:
                first = pts if first is None or pts < first else first
                last = max(pts + (packet.duration or 0), pts if last is None else last)
    except av.error.FFmpegError:
        pass  # what lies beyond cannot be decoded either
    if not count:
        raise DecodeFailed("unreadable", "holds no media")
    base = stream.time_base
    if first is not None and last is not None and last > first:
        return first * base, last * base, count
    rate: Any = getattr(stream, "guessed_rate", None) or getattr(stream, "average_rate", None)
    if total or rate:
        begin = (first or 0) * base
        return begin, begin + (total * base if total else Fraction(count) / rate), count
    if count == 1:
        return Fraction(0), Fraction(1, 25), count
    raise DecodeFailed("bad_timestamps", "no packet has a time")


def count_pictures(container: Any, video: Any) -> int:
    """0, 1 or 2 (= at least two) pictures, from an index of samples, else from the first packets."""
    import av

    if format_name(container) in ("mov", "avi") and len(video.index_entries) > 1:
        return 2
    count = 0
    with contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux(video):
            count += packet.size > 0 and not packet.is_discard
            if count == 2:
                break
    return count


def _length(path: Path, container: Any, stream: Any, spec: Spec, at_least: Fraction) -> tuple[Fraction, bool]:
    """(seconds, stated). Scans the packets where nothing is stated, or where what is stated cannot be used."""
    name = format_name(container)
    end, own = stated_end(container, stream)
    seconds = None if end is None else end - first_time(stream)
    if seconds is not None and not own and name == "matroska":
        tag = _clock(stream.metadata.get("DURATION", ""))
        if tag:
            seconds = min(Fraction(container.duration, 1_000_000), tag)
    if seconds is None and name in FROM_LAST_PAGE and stream.duration:
        estimate = stream.duration * stream.time_base
        if at_least < estimate <= spec.max_seconds:
            return estimate, False
    if seconds is not None and seconds > at_least:
        return seconds, True
    with open_media(path) as again:
        first, end, _ = scan(again, again.streams[stream.index])
    return end - first, False


def _clock(text: str) -> Fraction | None:
    """`00:01:02.345` in seconds; None for anything else."""
    try:
        hours, minutes, seconds = text.strip("\0 ").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    except ValueError:
        return None


def probe(
    path: str | Path, start: Fraction | None = None, end: Fraction | None = None, spec: Spec | None = None
) -> Probe:
    """What a file, or its stretch from `start` to `end` seconds after its first picture (sound only: sample), holds.

    Raises DecodeFailed with a reason of the file, MachineError where the disk fails. Meant to run in a child process
    with limits: a hostile file may kill it.
    """
    spec = spec or Spec()
    path = Path(path)
    with open_media(path) as container:
        streams = choose(container, spec.picture)
        video, audio = streams.video, streams.audio
        pictures = count_pictures(container, video) if video is not None else 0
        context: Any = video.codec_context if video is not None else None
        if pictures and context is None:
            raise DecodeFailed("unsupported", "no decoder for its pictures")
        if pictures:
            check_size(context.width, context.height, spec)
        if not pictures and audio is None:
            raise DecodeFailed("unreadable", "holds no media")
        if not pictures and audio.codec_context is None:
            raise DecodeFailed("unsupported", "no decoder for its sound")
        clock = video if pictures == 2 or (pictures and audio is None) else audio
        seconds, stated = _length(path, container, clock, spec, start or Fraction(0))
        begin = start or Fraction(0)
        if begin >= seconds:
            raise DecodeFailed("unreadable", f"begins at {float(begin):g} s, the file ends at {float(seconds):g} s")
        seconds = min(seconds, end if end is not None else seconds) - begin
        if seconds <= 0:
            raise DecodeFailed("unreadable", f"nothing lies between {float(begin):g} s and {float(end or 0):g} s")
        if seconds > spec.max_seconds:
            raise DecodeFailed("too_large", f"{float(seconds):.0f} s long, {spec.max_seconds} s are allowed")
        rate = (video.guessed_rate or video.average_rate) if pictures else None
        sound = audio.codec_context if audio is not None else None
        return Probe(
            seconds=seconds,
            has_picture=pictures > 0,
            has_sound=sound is not None,
            single_picture=pictures == 1,
            width=context.width if pictures else None,
            height=context.height if pictures else None,
            source_fps=str(rate) if rate else None,
            sample_rate=sound.sample_rate if sound is not None else None,
            size=path.stat().st_size,
            stated=stated,
        )
