"""Test media: a flash and a beep at known times, in any container and codec that PyAV can write. Same call, same file.

Pictures are dark grey with a bright left half in the top quarter (so that turns can be told), all white at the flash;
sound is silence with 50 ms of 1 kHz at the beep. It checks nothing: tests do.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {  # container: (picture, sound)
    ".mp4": ("libx264", "aac"),
    ".mov": ("libx264", "aac"),
    ".mkv": ("libx264", "aac"),
    ".webm": ("libvpx", "libopus"),
    ".avi": ("mpeg4", "libmp3lame"),
    ".ts": ("libx264", "aac"),
    ".mpg": ("mpeg2video", "mp2"),
    ".flv": ("libx264", "aac"),
    ".m4a": (None, "aac"),
    ".mp3": (None, "libmp3lame"),
    ".ogg": (None, "libopus"),
    ".wav": (None, "pcm_s16le"),
    ".flac": (None, "flac"),
}
FORMATS = {".mkv": "matroska", ".ts": "mpegts", ".mpg": "mpeg", ".m4a": "mp4"}
BEEP_SECONDS = 0.05


def picture(size: tuple[int, int], white: bool, level: int = 40) -> np.ndarray:
    """uint8 (height, width, 3)."""
    height, width = size
    out = np.full((height, width, 3), 255 if white else level, np.uint8)
    if not white:
        out[: height // 4, : width // 2] = 200
    return out


def tone(
    seconds: float, beep: float | None, rate: int, channels: int = 1, loud: Sequence[float] = (0.5,)
) -> np.ndarray:
    """float32 (channels, samples): the beep at `loud[c]` in channel c (the last value for those beyond)."""
    t = np.arange(round(seconds * rate)) / rate
    one = np.zeros_like(t)
    if beep is not None:
        one = np.where((t >= beep) & (t < beep + BEEP_SECONDS), np.sin(2 * np.pi * 1000 * (t - beep)), 0.0)
    return np.stack([one * loud[min(c, len(loud) - 1)] for c in range(channels)]).astype(np.float32)


def make_clip(
    path: Path,
    *,
    seconds: float = 2.0,
    fps: int = 25,
    size: tuple[int, int] = (96, 128),
    flash: float | None = 1.0,
    beep: float | None = 1.0,
    sample_rate: int = 44100,
    channels: int = 1,
    loud: Sequence[float] = (0.5,),
    start: float = 0.0,
    sound_start: float = 0.0,
    vcodec: str | None = None,
    acodec: str | None = None,
    pix_fmt: str | None = None,
    audio: bool = True,
    video: bool = True,
    rotation: int = 0,
    hflip: bool = False,
    aspect: Fraction | None = None,
    times: Sequence[float] | None = None,
    gop: int = 12,
    noise: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a clip. `start`: both streams begin that late; `sound_start`: the sound later still; `times`: seconds of
    each frame, for a variable rate; `noise`: in picture and sound, for files of some size; `rotation`: degrees
    counter-clockwise that a player must turn."""
    default_v, default_a = CODECS[path.suffix]
    video = video and (vcodec or default_v) is not None
    with av.open(str(path), "w", format=FORMATS.get(path.suffix), options=options or {}) as out:
        packets = []
        random = np.random.default_rng(0)
        if video:
            v = out.add_stream(vcodec or default_v, rate=fps)
            v.height, v.width = size
            v.pix_fmt = pix_fmt or {"mjpeg": "yuvj420p", "png": "rgb24"}.get(vcodec or "", "yuv420p")
            v.codec_context.thread_count = 1
            v.codec_context.gop_size = gop
            v.codec_context.bit_rate = 1_000_000
            if (vcodec or default_v) in ("mpeg4", "mpeg2video"):
                v.codec_context.max_b_frames = 0
            if aspect is not None:
                v.codec_context.sample_aspect_ratio = aspect
            if (vcodec or default_v) == "libx264":
                v.options = {"preset": "veryfast", "crf": "18"}
            if rotation or hflip:
                v.set_display_rotation(rotation, hflip=hflip)
            clock = Fraction(1, 1000 if times is not None else fps)
            v.codec_context.time_base = clock
            at = times if times is not None else [i / fps for i in range(round(seconds * fps))]
            bright = None if flash is None else min(range(len(at)), key=lambda i: abs(at[i] - flash))
            for i, t in enumerate(at):
                shown = picture(size, i == bright)
                if noise:
                    shown = shown // 2 + random.integers(0, 120, shown.shape, np.uint8)
                frame = av.VideoFrame.from_ndarray(shown, "rgb24")
                frame.pts, frame.time_base = int((t + start) / clock + Fraction(1, 2)), clock
                packets += [(p.dts * p.time_base, 0, p) for p in v.encode(frame)]
            packets += [(p.dts * p.time_base, 0, p) for p in v.encode(None)]
        if audio:
            if (acodec or default_a) == "libopus" and sample_rate not in (8000, 12000, 16000, 24000, 48000):
                sample_rate = 48000  # Opus knows no other rates
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
            a = out.add_stream(acodec or default_a, rate=sample_rate, layout=layout)
            data = tone(seconds, beep, sample_rate, channels, loud)
            if noise:
                data += 0.1 * random.standard_normal(data.shape, np.float32)
            form = a.codec_context.format.name if a.codec_context.format else "fltp"
            resampler = av.AudioResampler(form, layout, sample_rate, frame_size=a.codec_context.frame_size or 1024)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), "fltp", layout)
            frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), 0
            shift = round((start + sound_start) * sample_rate)
            for one in [*resampler.resample(frame), *resampler.resample(None)]:
                one.pts += shift
                packets += [((p.dts or 0) * p.time_base, 1, p) for p in a.encode(one)]
            packets += [((p.dts or 0) * p.time_base, 1, p) for p in a.encode(None)]
        for _, _, p in sorted(packets, key=lambda x: x[:2]):
            out.mux(p)
    return path


class Kept:
    """A sink that keeps all: rows uint8 (n, H, W, 3), their source frames, and the waveform."""

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []
        self.source: list[int] = []
        self.chunks: list[np.ndarray] = []

    def frame(self, picture: np.ndarray, source: int, repeat: int) -> None:
        assert picture.dtype == np.uint8 and picture.flags.c_contiguous and repeat >= 1
        self.pictures += [picture] * repeat
        self.source += [source] * repeat

    def sound(self, samples: np.ndarray) -> None:
        assert samples.dtype == np.int16 and samples.ndim == 1
        self.chunks.append(samples)

    @property
    def rows(self) -> np.ndarray:
        return np.stack(self.pictures)

    @property
    def waveform(self) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int16), *self.chunks])

    def flash(self, fps: int) -> float:
        """Seconds of the first row that is white."""
        return int(np.argmax([p.mean() > 160 for p in self.pictures])) / fps

    def beep(self, rate: int) -> float:
        """Seconds at which the beep reaches half of its loudness."""
        level = np.abs(self.waveform.astype(np.float64))
        assert level.max() > 1000, "no beep in the sound"
        return int(np.argmax(level > level.max() / 2)) / rate
