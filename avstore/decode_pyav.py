"""The CPU decoder: one file in, pictures and sound on one clock out, with every fact that a record keeps.

t = 0 is `start` (seconds after the file's first shown frame), else that frame; for sound only, the first sample. Which
row shows what is `avstore.pictures`, which sample lies where is `avstore.sound`; here are the loop over packets and
the judgement: whole, damaged but good enough, truncated, longer than planned.

Runs in a child process with limits: a hostile file may kill it. It plans nothing and writes nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import av
import numpy as np

from avstore.errors import UsageError
from avstore.facts import Facts, Sink
from avstore.pictures import Pictures, SeekMissed
from avstore.probe import (
    DecodeFailed,
    Streams,
    check_size,
    choose,
    first_time,
    format_name,
    open_media,
    scan,
    stated_end,
    words,
)
from avstore.sound import Sound
from avstore.spec import Spec

__all__ = ["DecodeFailed", "Facts", "Sink", "decode", "decoder_versions"]

SHOWN = Fraction(9, 10)  # share of the rows that a damaged file must still show
PREROLL = Fraction(1, 2)  # seconds of decoding before a segment's start, for the sound's codec to settle
SEEK_FROM = 5  # seconds below which a segment is decoded from the file's beginning
EXACT_INDEX = {"mov", "matroska"}  # containers whose seeks and timestamps agree
ONE_PER_PACKET = {"h264", "hevc", "av1", "libdav1d", "vp9", "mjpeg", "prores", "png"}


def decoder_versions() -> dict[str, str]:
    """Versions of PyAV and of the FFmpeg libraries that shape pictures and sound."""
    parts = ("libavcodec", "libavformat", "libavutil", "libavfilter", "libswscale", "libswresample")
    return {"av": av.__version__, **{p: ".".join(map(str, av.library_versions[p])) for p in parts}}


@dataclass
class Tally:
    """What the packets of one stream say, whatever becomes of them."""

    count: int = 0
    failed: int = 0
    begin: int | None = None
    end: int | None = None
    timeless: bool = False

    def add(self, packet: Any) -> None:
        self.count += 1
        pts = packet.pts if packet.pts is not None else packet.dts
        if packet.pts is None:
            self.timeless = True
        if pts is not None:
            stop = pts + (packet.duration or 0)
            self.end = stop if self.end is None or stop > self.end else self.end
            self.begin = pts if self.begin is None or pts < self.begin else self.begin


def decode(
    path: str | Path,
    spec: Spec,
    sink: Sink,
    *,
    start: Fraction | None = None,
    end: Fraction | None = None,
    slot_seconds: int,
) -> Facts:
    """Decodes a file, or its stretch from `start` to `end` seconds, into `sink`.

    `frames` of the facts = rows k with k / fps < end of the picture; `samples` = ceil(end * rate), the length of the
    same clock: sound beyond it is dropped and counted. Sound only: all of its samples.

    Raises DecodeFailed with a reason of the file (`longer_than_planned` carries the true seconds), MachineError where
    the disk fails, UsageError for a segment that cannot be.
    """
    if slot_seconds < 1 or (start or 0) < 0 or (end is not None and end <= (start or 0)):
        raise UsageError(
            f"no video lies from {start or 0} to {end} in a slot of {slot_seconds} s",
            next="start < end, slots of a second or more",
        )
    for seek in (True, False):
        with open_media(path) as container:
            streams = choose(container, spec.picture)
            job = Job(Path(path), container, streams, spec, sink, start, end, slot_seconds)
            try:
                return job.run(seek)
            except SeekMissed:  # nothing was handed out yet
                continue
    raise AssertionError("decoding from the beginning seeks nothing")


class Job:
    """One call of decode: the loop over packets, and the judgement at its end."""

    def __init__(
        self,
        path: Path,
        container: Any,
        streams: Streams,
        spec: Spec,
        sink: Sink,
        start: Fraction | None,
        end: Fraction | None,
        slot: int,
    ) -> None:
        self.path, self.container, self.streams, self.spec, self.sink = path, container, streams, spec, sink
        self.start, self.end, self.slot = start, end, slot
        self.length = None if end is None else end - (start or 0)
        self.message: str | None = None
        self.broken: str | None = None  # why reading stopped early
        self.times = array("q")  # timestamps of the packets with pictures
        self.tallies: dict[int, Tally] = {}
        for stream in (streams.video, streams.audio):
            if stream is not None and stream.codec_context is not None:
                stream.codec_context.thread_count = 1
                stream.codec_context.thread_type = "NONE"

    def run(self, seek: bool) -> Facts:
        spec, video, audio = self.spec, self.streams.video, self.streams.audio
        most = ceil(
            (min(self.length, Fraction(self.slot)) if self.length is not None else self.slot) * spec.sample_rate
        )
        self.sound = Sound(spec.sample_rate, self.sink.sound, most)
        self.pictures: Pictures | None = None
        if video is not None:
            if video.codec_context is None:
                raise DecodeFailed("unsupported", "no decoder for its pictures")
            packed = format_name(self.container) == "avi" and "mpeg4" in video.codec_context.name
            self.pictures = self.make_pictures(video, packed)
            check_size(video.codec_context.width, video.codec_context.height, spec)
        if audio is not None and audio.codec_context is None:
            if video is None:
                raise DecodeFailed("unsupported", "no decoder for its sound")
            self.message = "its sound has no decoder"
        if self.start:
            self._go_to_start(self.start, seek)
        self._read()
        self.sound.finish()
        if self.pictures is not None and not self._tally(video).count and not self.broken and audio is not None:
            self.pictures = None  # a track without a single picture
        return self._with_pictures(self.pictures) if self.pictures is not None else self._sound_only()

    def make_pictures(self, video: Any, packed: bool) -> Pictures:
        """What takes the decoded frames; another decoder of pictures puts its own here."""
        return Pictures(video, self.spec, self.sink, self.start, self.length, self.slot, packed)

    def _tally(self, stream: Any) -> Tally:
        return self.tallies.setdefault(stream.index, Tally())

    def _read(self) -> None:
        """Decodes packet by packet; damage is counted, not fatal."""
        video, audio, pictures, sound = self.streams.video, self.streams.audio, self.pictures, self.sound
        index_v, index_a = (video.index if video is not None else -1), (audio.index if audio is not None else -1)
        deaf = audio is None or audio.codec_context is None
        ticking = 0
        try:
            for packet in self.container.demux():
                index = packet.stream_index if packet.size else packet.stream.index  # PyAV's flushing packets say 0
                tally = self.tallies.get(index) or self.tallies.setdefault(index, Tally())
                if packet.size and not packet.is_discard:
                    tally.add(packet)
                    if index == index_v and packet.pts is not None:
                        self.times.append(packet.pts)
                if index == index_v and pictures is not None:
                    if pictures.done:
                        if deaf or self._sound_done():
                            return
                        continue
                    try:
                        for frame in packet.decode():
                            pictures.push(frame)
                    except av.error.DecoderNotFoundError as e:
                        raise DecodeFailed("unsupported", "no decoder for its pictures") from e
                    except av.error.FFmpegError as e:
                        self._damage(tally, e)
                    if pictures.overrun:
                        raise DecodeFailed(
                            "longer_than_planned", f"longer than its {self.slot} s", self._true_seconds(video)
                        )
                    if pictures.origin is not None and sound.origin is None:
                        sound.origin = pictures.origin
                elif index == index_a and not deaf:
                    try:
                        for frame in packet.decode():
                            sound.push(frame)
                    except av.error.FFmpegError as e:
                        self._damage(tally, e)
                    if pictures is None and self._sound_done():
                        return
                else:
                    continue
                ticking += 1
                if ticking % 256 == 0:
                    self._hand_out_sound()
        except av.error.FFmpegError as e:
            if isinstance(e, MemoryError):
                raise
            self.broken = words(e)
            self._drain()

    def _drain(self) -> None:
        """Reading broke off: what the decoders still hold comes out."""
        for stream, take in ((self.streams.video, self.pictures), (self.streams.audio, self.sound)):
            if stream is None or stream.codec_context is None or take is None or not self._tally(stream).count:
                continue
            try:
                for frame in stream.codec_context.decode(None):
                    frame.time_base = stream.time_base
                    take.push(frame)
            except av.error.FFmpegError as e:
                self._damage(self._tally(stream), e)

    def _damage(self, tally: Tally, error: Exception) -> None:
        if isinstance(error, MemoryError):
            raise error
        tally.failed += 1
        self.last_error = words(error)

    last_error = "damaged"

    def _sound_done(self) -> bool:
        known, origin = self.sound.known(), self._origin()
        return known is not None and origin is not None and self.length is not None and known >= origin + self.length

    def _origin(self) -> Fraction | None:
        """t = 0 on the file's clock, once known."""
        if self.pictures is not None:
            return self.pictures.origin
        if self.sound.origin is None and self.sound.first_seen is not None:
            self.sound.origin = self.sound.first_seen + (self.start or 0)
        return self.sound.origin

    def _hand_out_sound(self) -> None:
        """Sound up to the newest picture may go: its clock is known that far."""
        if self.pictures is None:
            if self._origin() is not None:
                self.sound.hand_out(self.sound.most)
        elif self.pictures.rows and self.sound.origin is not None:
            self.sound.hand_out(
                (self.pictures.rows - 1) * self.spec.sample_rate // self.spec.fps
            )  # the last row may be cut

    def _go_to_start(self, start: Fraction, seek: bool) -> None:
        """Fixes t = 0 for a segment, and skips to the last keyframe before it where that is exact and worthwhile."""
        video, pictures = self.streams.video, self.pictures
        name = format_name(self.container)
        if pictures is None:
            if (
                seek
                and name in EXACT_INDEX
                and start > SEEK_FROM
                and self.streams.audio is not None
                and self.streams.audio.start_time is not None
            ):
                stream = self.streams.audio
                self.sound.origin = first_time(stream) + start
                self.container.seek(int((self.sound.origin - 2 * PREROLL) / stream.time_base), stream=stream)
            return
        times, keys = array("q"), []
        with open_media(self.path) as again:
            stream = again.streams[video.index]
            for packet in again.demux(stream):
                if packet.size and not packet.is_discard and packet.pts is not None:
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append((packet.pts, packet.dts))
                if packet.dts is not None and times and (packet.dts - times[0]) * video.time_base > start + 1:
                    break
        if not times:
            return  # no timestamps: decoded from the beginning, t = 0 from its first frame
        begin = min(times)
        origin = begin * video.time_base + start
        pictures.set_origin(origin)
        self.sound.origin = origin
        safe = name in EXACT_INDEX and video.codec_context.name in ONE_PER_PACKET
        before = [k for k in keys if k[0] * video.time_base <= origin - PREROLL]
        if not seek or not safe or not before or (before[-1][0] - begin) * video.time_base < SEEK_FROM:
            return
        pts, dts = max(before)
        self.container.seek(dts if name == "mov" and dts is not None else pts, stream=video)
        pictures.seek_to = pts
        pictures.ordinal = bisect_left(sorted(times), pts)

    def _true_seconds(self, stream: Any) -> Fraction:
        """Seconds by the packets; more than the slot, or planning anew would go in circles."""
        with open_media(self.path) as again:
            first, end, _ = scan(again, again.streams[stream.index])
        seconds = end - first - (self.start or 0)
        if self.length is not None:
            seconds = min(seconds, self.length)
        seconds = max(seconds, self.slot + Fraction(1, 2))
        if seconds > self.spec.max_seconds:
            raise DecodeFailed("too_large", f"{float(seconds):.0f} s long, {self.spec.max_seconds} s are allowed")
        return seconds

    def _short(self, stream: Any, decoded: Fraction) -> Fraction:
        """Seconds that the header states and neither the decoder nor the packets reach; 0 where that is no matter."""
        stated, own = stated_end(self.container, stream)
        if stated is None:
            return Fraction(0)
        first = first_time(stream)
        if self.end is not None:
            stated = min(stated, first + self.end)
        allowed = max(Fraction(1, 2), (stated - first) / 50)
        tallies = {i: t for i, t in self.tallies.items() if t.end is not None and (i == stream.index or not own)}
        packets = max(
            (t.end * self.container.streams[i].time_base for i, t in tallies.items() if t.end is not None),
            default=first,
        )
        reached = max(decoded, packets)
        return stated - reached if stated - reached > allowed else Fraction(0)

    def _check_whole(self, stream: Any, decoded: Fraction) -> None:
        missing = self._short(stream, decoded)
        if missing:
            raise DecodeFailed("truncated", f"ends {float(missing):.2f} s before its stated end")

    def _with_pictures(self, pictures: Pictures) -> Facts:
        spec, video, audio, sound = self.spec, self.streams.video, self.streams.audio, self.sound
        tally = self._tally(video)
        if not pictures.seen:
            self._check_whole(video, first_time(video))
            raise DecodeFailed(
                "unreadable",
                f"none of its {tally.count} pictures could be decoded: {self.last_error}"
                if tally.count
                else "holds no media",
            )
        if pictures.backwards > (1 - SHOWN) * (len(pictures.seen) + pictures.backwards):
            raise DecodeFailed("bad_timestamps", f"{pictures.backwards} pictures lie before the one that precedes them")
        still = len(pictures.seen) == 1 and pictures.ordinal == 1 and tally.count <= 1 and sound.last_seen is not None
        if still:
            sound.origin = pictures.origin
            pictures.finish(max(sound.last_seen or Fraction(0), pictures.end_pts() * pictures.base))
        else:
            self._check_whole(video, pictures.end_pts() * pictures.base)
            pictures.finish()
        if pictures.overrun:
            seconds = (sound.last_seen or Fraction(0)) - (pictures.origin or 0) if still else self._true_seconds(video)
            raise DecodeFailed(
                "longer_than_planned", f"longer than its {self.slot} s", max(seconds, self.slot + Fraction(1, 2))
            )
        if not pictures.rows:
            raise DecodeFailed("unreadable", f"shows no picture from {float(self.start or 0):g} s on")
        self._check_shown(pictures, tally)
        if audio is not None and audio.codec_context is not None:
            heard = self._tally(audio)
            if sound.last_seen is not None or heard.failed:
                if self.length is None:
                    self._check_whole(audio, sound.last_seen or first_time(audio))
                if sound.last_seen is None:
                    self.message = f"its sound could not be decoded: {self.last_error}"
        assert pictures.origin is not None
        if still:
            over = Fraction(pictures.rows, spec.fps)
            if sound.last_seen is not None:
                over = min(over, max(sound.last_seen, pictures.end_pts() * pictures.base) - pictures.origin)
        else:
            over = min(pictures.end_pts() * pictures.base - pictures.origin, Fraction(pictures.rows, spec.fps))
        samples = ceil((over if self.length is None else min(over, self.length)) * spec.sample_rate)
        rate = pictures.rate()
        return self._facts(
            samples,
            frames=pictures.rows,
            errors=pictures.errors + pictures.backwards,
            source_frames=pictures.ordinal,
            source_fps=str(rate) if rate else None,
            display=list(pictures.display or ()),
            box=list(pictures.box or ()),
            video_stream=video.index,
            audio_stream=audio.index if audio is not None else None,
        )

    def _sound_only(self) -> Facts:
        sound, audio, spec = self.sound, self.streams.audio, self.spec
        if audio is None:
            raise DecodeFailed("unreadable", "holds no media")
        heard = self._tally(audio)
        if sound.last_seen is None or sound.first_seen is None:
            self._check_whole(audio, first_time(audio))
            raise DecodeFailed(
                "unreadable",
                f"none of its {heard.count} packets of sound could be decoded: {self.last_error}"
                if heard.count
                else "holds no media",
            )
        self._check_whole(audio, sound.last_seen)
        if heard.failed > (1 - SHOWN) * heard.count:
            raise DecodeFailed(
                "unreadable", f"{heard.failed} of {heard.count} packets of sound are damaged: {self.last_error}"
            )
        origin = self._origin()
        assert origin is not None
        seconds = sound.last_seen - origin
        if self.length is not None:
            seconds = min(seconds, self.length)
        if seconds <= 0:
            raise DecodeFailed("unreadable", f"has no sound from {float(self.start or 0):g} s on")
        if seconds > spec.max_seconds:
            raise DecodeFailed("too_large", f"{float(seconds):.0f} s long, {spec.max_seconds} s are allowed")
        if seconds > self.slot:
            raise DecodeFailed("longer_than_planned", f"longer than its {self.slot} s", seconds)
        samples = ceil(seconds * spec.sample_rate)
        if self.length is None:  # the resampler rounds its last samples; they are what there is
            sound.hand_out(sound.most)
            samples = max(sound.at, 1)
        return self._facts(samples, audio_stream=audio.index)

    def _check_shown(self, pictures: Pictures, tally: Tally) -> None:
        """A damaged file is `unreadable` unless 90 % of the rows that its packets promise show the right picture."""
        decoded = pictures.end_pts() * pictures.base
        tail = (tally.end or 0) * pictures.base - decoded
        if not (tally.failed or pictures.backwards or tail > Fraction(1, 2)) or pictures.done:
            return
        if tally.timeless or not self.times:
            share = Fraction(len(pictures.seen), max(len(pictures.seen) + tally.failed + pictures.backwards, 1))
        else:
            packets = np.unique(np.frombuffer(self.times, np.int64))
            rows = np.array([pictures.raw_row(int(p)) for p in packets])
            stop = max(pictures.row(int(tally.end or 0)), int(rows[-1]))
            if self.start:
                rows = np.clip(rows, 0, None)
            spans = np.diff(np.append(rows, stop))
            share = Fraction(
                int(spans[np.isin(packets, np.frombuffer(pictures.seen, np.int64))].sum()), max(int(spans.sum()), 1)
            )
        if share < SHOWN:
            raise DecodeFailed("unreadable", f"only {float(share):.0%} of its rows show: {self.last_error}")

    def _facts(self, samples: int, errors: int = 0, **known: Any) -> Facts:
        """Hands out the rest of the sound, and closes the account."""
        sound = self.sound
        sound.close(samples)
        errors += sum(t.failed for t in self.tallies.values()) + (self.broken is not None)
        if self.broken and not self.message:
            self.message = f"reading broke off: {self.broken}"
        return Facts(
            message=self.message,
            samples=samples,
            sound_start=sound.start,
            sound_end=sound.end,
            silent=sound.silent,
            errors=errors,
            sound_dropped=(0 if self.start else sound.before)
            + (0 if self.end else sound.beyond),  # cut off is not lost
            **known,
        )
