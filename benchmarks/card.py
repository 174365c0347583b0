"""Cards: a video of a store as a moving picture, a picture of its sound and a player, inside a page.

The moving picture is one JPEG, its frames side by side, that CSS shifts; the sound is a WAV of at most 12 kHz; the
spectrogram is `crisscross-mel80`, coloured. Everything is a data: address. Not here: the page around it (`page.py`).
"""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from avstore.errors import UsageError
from benchmarks.page import escaped

if TYPE_CHECKING:
    from avstore.store import Store

FPS = 8  # of a moving picture
TALL = 144  # pixels of a frame's height, at most
HERTZ = 12000  # of a player's sound, at most
QUALITY = 72
# black - violet - red - orange - pale yellow, evenly rising in lightness
HEAT = np.array([[8, 6, 24], [58, 18, 96], [128, 28, 106], [196, 52, 72], [240, 112, 40], [250, 182, 62],
                 [252, 244, 190]], float)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a card says of its video. match: whether it is of the query's class, None: no question."""

    rank: int | None = None
    score: float | None = None
    label: str | None = None
    match: bool | None = None
    asked: bool = False
    name: str | None = None  # instead of the key


def uri(data: bytes, kind: str) -> str:
    """A data: address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def jpeg(picture: np.ndarray, quality: int = QUALITY) -> str:
    """uint8 (H, W, 3) as a data: address."""
    from avstore.codecs import encode_jpeg

    return uri(encode_jpeg(np.ascontiguousarray(_picture(picture)), quality), "image/jpeg")


def png(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as the bytes of a PNG file."""
    x = np.ascontiguousarray(_picture(picture))
    height, width = x.shape[:2]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), x.reshape(height, -1)], axis=1)  # filter 0 on each line

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines.tobytes()))
        + chunk(b"IEND", b"")
    )


def _picture(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 3 or not x.size:
        raise UsageError(f"a picture of {x.dtype} {x.shape}", "uint8 (height, width, 3) is wanted")
    return x


def shrunk(frames: np.ndarray, tall: int = TALL) -> np.ndarray:
    """uint8 (n, h, w, 3) of at most `tall` pixels in height: means of k x k blocks, k the smallest that does."""
    k = -(-frames.shape[1] // tall)
    if k <= 1:
        return frames
    n, h, w = frames.shape[0], frames.shape[1] // k, frames.shape[2] // k
    x = frames[:, : h * k, : w * k].reshape(n, h, k, w, k, 3)
    return np.rint(x.mean(axis=(2, 4))).astype(np.uint8)


def coloured(x: np.ndarray) -> np.ndarray:
    """Values in [0, 1], any shape, as uint8 (..., 3) of the HEAT scale."""
    at = np.clip(np.nan_to_num(np.asarray(x, float)), 0, 1) * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    return np.rint(HEAT[low] * (1 - part) + HEAT[low + 1] * part).astype(np.uint8)


def heard_as(rows: np.ndarray) -> np.ndarray:
    """A log-spectrogram (time, bins) as uint8 (bins, time, 3), low notes below: from its 20th percentile, black, to its
    maximum."""
    low, high = float(np.percentile(rows, 20)), float(rows.max())
    return coloured((rows.T[::-1] - low) / max(high - low, 1e-6))


def wav(samples: np.ndarray, sample_rate: int, hertz: int = HERTZ) -> bytes:
    """int16 (n,) as a mono WAV file of at most `hertz`, low-passed."""
    from scipy.signal import resample_poly

    if samples.dtype != np.int16 or samples.ndim != 1:
        raise UsageError(f"sound of {samples.dtype} {samples.shape}", "int16 (samples,) is wanted")
    if sample_rate > hertz and len(samples):
        ratio = Fraction(hertz, sample_rate)
        x = resample_poly(samples.astype(np.float64), ratio.numerator, ratio.denominator)
        samples, sample_rate = np.clip(np.rint(x), -32768, 32767).astype(np.int16), hertz
    file = io.BytesIO()
    with wave.open(file, "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(sample_rate)
        w.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def window(store: Store, video: int, second: int | None, seconds: float) -> tuple[float, float]:
    """(start, length) in seconds of what a card shows: centred on the middle of `second` (None: of the video), moved
    inside the video."""
    whole = float(store.seconds(video))
    length = min(seconds, whole)
    centre = whole / 2 if second is None else second + 0.5
    return max(0.0, min(centre - length / 2, whole - length)), length


def film(frames: np.ndarray, seconds: float, told: str) -> str:
    """uint8 (n, h, w, 3) as a moving picture that lasts `seconds`."""
    x = shrunk(frames)
    n, h, w = x.shape[:3]
    strip = x.transpose(1, 0, 2, 3).reshape(h, n * w, 3)
    style = f"--n:{n};--d:{max(seconds, 0.1):.2f}s;aspect-ratio:{w}/{h};background-image:url({jpeg(strip)})"
    return (
        f'<div class="film{" still" if n == 1 else ""}" role="img" aria-label="{escaped(told)}" style="{style}"></div>'
    )


def card(
    store: Store,
    video: int,
    told: Told | None = None,
    *,
    second: int | None = None,
    seconds: float = 3.0,
    sight: bool = True,
    sound: bool = True,
) -> str:
    """One video: `seconds` of it around `second`. sight, sound: what is shown of it where it is there."""
    if not seconds > 0:
        raise UsageError(f"{seconds} seconds of a video", "more than 0")
    told = told or Told()
    start, length = window(store, video, second, seconds)
    name = told.name if told.name is not None else store.key(video)
    parts = []
    rate = min(FPS, store.spec.fps)
    if sight and store.has_picture[video]:
        n = max(1, int(length * rate))
        clip = store.clip(video, start, n=n, fps=rate, seconds=0)
        assert clip.frames is not None and clip.box is not None
        y, x, h, w = clip.box
        frames = clip.frames[: max(1, clip.valid_frames), y : y + h, x : x + w]
        parts.append(film(frames, len(frames) / rate, f"frames of {name}"))
    elif sight and sound and store.spec.picture:
        parts.append('<div class="none" style="aspect-ratio:4/3">no picture</div>')
    if sound and store.has_sound[video]:
        parts.append(_sound(store, video, start, length, name))
    elif sound:
        parts.append('<div class="none" style="height:58px">no sound</div>')
    meta = []
    if told.rank is not None:
        meta.append(f"<span>{told.rank}</span>")
    if told.label:
        kind = {True: " yes", False: " no", None: ""}[told.match]
        sign = {True: "\N{CHECK MARK} ", False: "\N{MULTIPLICATION X} ", None: ""}[told.match]
        meta.append(f'<span class="badge{kind}">{sign}{escaped(told.label)}</span>')
    if told.score is not None:
        meta.append(f"<span>{told.score:.3f}</span>")
    if second is not None:
        meta.append(f"<span>at {second} s</span>")
    return (
        f'<figure class="card{" asked" if told.asked else ""}">{"".join(parts)}<figcaption>'
        f'<div class="name" title="{escaped(name)}">{escaped(name)}</div><div class="meta">{"".join(meta)}</div>'
        "</figcaption></figure>"
    )


def _sound(store: Store, video: int, start: float, length: float, name: str) -> str:
    """The button with the picture of the sound, and the player behind it."""
    clip = store.clip(video, start, n=0, seconds=length, front_end="crisscross-mel80")
    assert clip.spectrogram is not None
    shown = heard_as(clip.spectrogram) if len(clip.spectrogram) else np.zeros((80, 1, 3), np.uint8)
    data = uri(wav(clip.waveform, clip.sample_rate), "audio/wav")
    return (
        f'<button type="button" class="heard" aria-label="{escaped(f"play the sound of {name}")}">'
        f'<img alt="" src="{jpeg(shown, 80)}"><i></i><u></u></button>'
        f'<audio controls preload="none" src="{data}"></audio>'
    )
