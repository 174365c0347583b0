"""Where clips are cut: pure functions from the lengths of videos, the shape of a clip and uniform numbers to windows.

Every position is an integer: a sample of the store's waveform, counted from the video's t = 0, for pictures too. So one
clock serves both, arithmetic is exact, and a window is `[start, start + length)`. Frames become tape rows only in
`frame_rows`. All functions work on a batch of videos at once (NumPy, B videos; scalars broadcast) and draw nothing
themselves: `u` are numbers in [0, 1) from `avstore.draws`. Rules 1, 13, 14 and 19 of the project's protocol notes:
a video shorter than the clip is cut at its start, its pictures loop and its sound is zero-padded by whoever reads;
where several windows do not fit, the distance between them shrinks first, and `shrunk` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avstore.draws import integers
from avstore.errors import UsageError, did_you_mean

Ints = NDArray[np.int64]
Rate = int | Fraction

# Two views of one video (CrissCross, Fig. 2): how far the second lies behind the first.
RELAXATIONS: dict[str, str] = {
    "none": "at the same time",
    "mild": "half a window later (CrissCross' released default)",
    "medium": "a whole window later: adjacent",
    "mixed": "two independent places",
    "extreme": "one in each half of the video",
    "extreme-video": "pictures as in extreme, sound at the time of one of the two",
    "extreme-audio": "sound as in extreme, pictures at the time of one of the two",
}


def to_samples(seconds: float | str | Fraction, sample_rate: int) -> int:
    """Seconds -> samples, rounded half up; a float counts as the decimal number it prints as (0.1 is 1/10)."""
    exact = Fraction(str(seconds)) if isinstance(seconds, float | str) else Fraction(seconds)
    return math.floor(exact * sample_rate + Fraction(1, 2))


def clip_samples(n: int, fps: Rate, sample_rate: int) -> int:
    """Length of n frames at `fps` in samples, rounded up so that no frame's time lies outside."""
    return math.ceil(Fraction(n * sample_rate) / Fraction(fps))


def picture_samples(frames: Any, tape_fps: Rate, sample_rate: int) -> Ints:
    """Length of `frames` tape rows in whole samples (rounded down); int64, shape of `frames`."""
    tape = Fraction(tape_fps)
    return np.asarray(frames, np.int64) * (sample_rate * tape.denominator) // tape.numerator


def frame_rows(offset: Any, n: int, fps: Rate, tape_fps: Rate, sample_rate: int, frames: Any = None) -> Ints:
    """Tape rows of a clip, counted from the video's first: floor((offset / sample_rate + k / fps) * tape_fps), k < n.

    offset: samples, int (...,) >= 0; fps of the clip; tape_fps of the store. With `frames` (true rows of each video,
    broadcast) rows past the end loop from the first; without, they stay as they are. Returns int64 (..., n), exact.
    Raises UsageError for fps above the tape's, n < 1, a negative offset, or numbers beyond int64.
    """
    clip, tape = Fraction(fps), Fraction(tape_fps)
    if n < 1 or clip <= 0 or tape <= 0 or sample_rate < 1:
        raise UsageError(f"a clip of {n} frames at {clip} fps", "it needs 1 frame or more, and rates above 0")
    if clip > tape:
        raise UsageError(
            f"a clip at {clip} fps from a store at {tape} fps",
            "frames that were not kept cannot be read",
            f"ask for at most {tape} fps, or ingest with --fps {math.ceil(clip)}",
        )
    start = np.asarray(offset, np.int64)
    if start.size and int(start.min()) < 0:
        raise UsageError(f"a clip that starts at sample {int(start.min())}", "the first sample is 0")
    # (offset / sr + k / fps) * tape = (offset * per_sample + k * per_frame) / unit, all integers in lowest terms
    per_sample, per_frame = tape / sample_rate, tape / clip
    unit = math.lcm(per_sample.denominator, per_frame.denominator)
    a, b = int(per_sample * unit), int(per_frame * unit)
    if (int(start.max()) if start.size else 0) * a + n * b >= 2**63:
        raise UsageError("a clip too far into a video", f"{tape} fps at {sample_rate} Hz there exceed 64-bit integers")
    rows = (start[..., None] * a + np.arange(n, dtype=np.int64) * b) // unit
    return rows if frames is None else loop(rows, np.asarray(frames, np.int64)[..., None])


def loop(rows: Ints, frames: Any) -> Ints:
    """Rows past a video's end, counted from its first again: rows mod frames; a video without frames gives row 0."""
    return rows % np.maximum(np.asarray(frames, np.int64), 1)


def spectrogram_row(offset: Any, rows_per_second: Rate, sample_rate: int) -> Ints:
    """Sample -> the row of a stored spectrogram that begins its window, rounded down."""
    rate = Fraction(rows_per_second)
    return np.asarray(offset, np.int64) * rate.numerator // (rate.denominator * sample_rate)


def centre_window(length: Any, window: int) -> Ints:
    """Start of the window in the middle of `length` samples; 0 where the video is shorter. int64, shape of `length`."""
    return np.maximum(np.asarray(length, np.int64) - _positive(window), 0) // 2


def uniform_windows(length: Any, window: int, n: int) -> Ints:
    """Starts of n evenly spaced windows, the first at 0, the last at the end; int64 (..., n).

    n = 1 is the centre window. Videos shorter than the window give n times 0: evaluation skips nothing.
    """
    if n < 1:
        raise UsageError(f"{n} windows", "at least 1")
    if n == 1:
        return centre_window(length, window)[..., None]
    free = np.maximum(np.asarray(length, np.int64) - _positive(window), 0)
    return free[..., None] * np.arange(n, dtype=np.int64) // (n - 1)


@dataclass(frozen=True)
class Windows:
    """Starts in samples, int64: `picture` and `sound` (B,), or (B, n) for n windows a video. shrunk: bool (B,)."""

    picture: Ints
    sound: Ints
    shrunk: NDArray[np.bool_]


@dataclass(frozen=True)
class Extents:
    """What the records say of B videos, in samples, int64 (B,): `picture` the length of the pictures (0: none), and
    [sound_start, sound_end) where there is sound (empty: none)."""

    picture: Ints
    sound_start: Ints
    sound_end: Ints

    def __post_init__(self) -> None:
        given = (self.picture, self.sound_start, self.sound_end)
        arrays = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in given))
        picture, start, end = (np.atleast_1d(x) for x in arrays)
        if any(x.size and int(x.min()) < 0 for x in (picture, start, end)):
            raise UsageError("a negative length in a record", "pictures and sound are counted from the video's t = 0")
        silent, blind = end <= start, picture == 0
        # a video without sound is cut where its pictures are, one without pictures where its sound is
        object.__setattr__(self, "sound_start", np.where(silent, 0, start))
        object.__setattr__(self, "sound_end", np.where(silent, picture, end))
        object.__setattr__(self, "picture", np.where(blind, np.where(silent, 0, end), picture))

    def both(self) -> tuple[Ints, Ints]:
        """[start, end) where there is picture and sound; the picture's start where they never meet."""
        start = np.minimum(self.sound_start, self.picture)
        return start, np.maximum(np.minimum(self.sound_end, self.picture), start)


def avid_windows(extents: Extents, u: NDArray[np.float64], picture: int, sound: int, max_offset: int) -> Windows:
    """AVID's pair: the sound window uniform where valid, then the picture within +- max_offset around it.

    picture, sound: lengths in samples; max_offset: samples (paper's code: half a second); u: (B, 2).
    The picture starts uniformly in [sound start - max_offset, sound end + max_offset - picture], cut to the video
    (AVID-CMA's released loader; methods.md 2.4). Sound is drawn where the pictures last, as far as it fits there.
    """
    u = _numbers(u, 2)
    low = extents.sound_start
    high = np.maximum(np.minimum(extents.sound_end, extents.picture) - _positive(sound), low)
    start = integers(u[:, 0], low, high)
    last = np.maximum(extents.picture - _positive(picture), 0)
    ends = np.stack([start - max_offset, start + sound + max_offset - picture])
    view = integers(u[:, 1], np.clip(ends.min(0), 0, last), np.clip(ends.max(0), 0, last))
    return Windows(view, start, np.zeros(len(start), np.bool_))


def two_views(
    extents: Extents, u: NDArray[np.float64], picture: int, sound: int, relaxation: str = "mild", loose: bool = False
) -> Windows:
    """CrissCross' two views of each video, picture and sound (B, 2) of each.

    A view is one window of the video, as long as the longer of its two clips, that both clips are cut from: the shorter
    lies at one random place in it, the same in both views. So its sound and picture always overlap in full, which is
    stricter than the released code; `loose` does as the code does: the clips of a view only share a surrounding
    window of 1, 1.5 or 2 clips (none, mild, medium), pictures move by parts of the *picture's* length, and in `mixed`
    each view places its picture in its sound anew. In the one-sided relaxations the modality that stays has the time of
    view 1 or of view 2, each as often. u: (B, 5). relaxation: one of RELAXATIONS.
    Windows lie where both picture and sound are; `shrunk` marks videos whose two windows had to move closer.
    """
    if relaxation not in RELAXATIONS:
        raise UsageError(f"no relaxation is called {relaxation!r}", did_you_mean(relaxation, RELAXATIONS))
    u = _numbers(u, 5)
    span = max(_positive(picture), _positive(sound))
    low, end = extents.both()
    room = np.maximum(end - low - span, 0)  # how far a view's start can move
    first_at = second_at = integers(u[:, 2], 0, span - picture), integers(u[:, 2], 0, span - sound)
    if relaxation in ("none", "mild", "medium"):
        half_spans = ("none", "mild", "medium").index(relaxation)
        wanted = np.full_like(room, span * half_spans // 2)
        gap = np.minimum(wanted, room)
        first = low + integers(u[:, 0], 0, room - gap)
        second, shrunk = first + gap, gap < wanted
        if loose:
            # the pictures' window of f clips lies anywhere in the sound's of f clips; each is cut at both its ends
            moved = np.minimum(picture * half_spans // 2, gap)
            inner = (span + gap) - np.stack([picture + moved, sound + gap])
            first_at = integers(u[:, 2], 0, np.maximum(inner[0], 0)), integers(u[:, 3], 0, np.maximum(inner[1], 0))
            second_at = first_at[0] + moved - gap, first_at[1]
    elif relaxation == "mixed":
        first, second = low + integers(u[:, 0], 0, room), low + integers(u[:, 1], 0, room)
        shrunk = end - low < span
        if loose:
            second_at = integers(u[:, 3], 0, span - picture), integers(u[:, 3], 0, span - sound)
    else:
        half = (end - low) // 2
        fits = half >= span
        shrunk = ~fits
        slack = np.where(fits, half - span, 0)
        first = low + integers(u[:, 0], 0, slack)
        if loose:  # as coded there: a fixed distance of T / 2 - sound, and one start for both clips of a view
            second = np.where(fits, first + half - span, low + room)
            first_at = second_at = (np.zeros_like(low), np.zeros_like(low))
        else:
            later = low + half + integers(u[:, 1], 0, np.maximum(end - low - half - span, 0))
            second = np.where(fits, later, low + room)
    pictures = np.stack([first + first_at[0], second + second_at[0]], -1)
    sounds = np.stack([first + first_at[1], second + second_at[1]], -1)
    stays = np.where(u[:, 4] < 0.5, 0, 1)[:, None]
    if relaxation == "extreme-video":
        sounds = np.repeat(np.take_along_axis(sounds, stays, 1), 2, 1)
    if relaxation == "extreme-audio":
        pictures = np.repeat(np.take_along_axis(pictures, stays, 1), 2, 1)
    return Windows(_inside(pictures, extents.picture, picture), _inside(sounds, extents.sound_end, sound), shrunk)


def snippets(
    extents: Extents, n: int, hop: int, picture: int, sound: int, u: NDArray[np.float64] | None = None
) -> Windows:
    """n consecutive snippets of each video, `hop` samples apart (the temporal model): starts (B, n).

    The run of snippets starts at a uniform place, u (B, 1), or lies in the middle where u is None. The picture is the
    middle of the longer sound (or the other way round). Where the run is longer than the video its hop shrinks first.
    """
    if n < 1 or hop < 0:
        raise UsageError(f"{n} snippets, {hop} samples apart", "at least 1 snippet, and a hop of 0 or more")
    span = max(_positive(picture), _positive(sound))
    low, end = extents.both()
    room = np.maximum(end - low - span, 0)
    step = np.minimum(hop, room // max(n - 1, 1)) if n > 1 else np.zeros_like(room)
    free = room - step * (n - 1)
    start = low + (free // 2 if u is None else integers(_numbers(u, 1)[:, 0], 0, free))
    views = start[:, None] + step[:, None] * np.arange(n, dtype=np.int64)
    shrunk = step < hop if n > 1 else np.zeros(len(low), np.bool_)
    return Windows(
        _inside(views + (span - picture) // 2, extents.picture, picture),
        _inside(views + (span - sound) // 2, extents.sound_end, sound),
        shrunk,
    )


def valid(start: Any, window: int, end: Any) -> Ints:
    """How much of [start, start + window) lies before `end`; int64. What a clip's `valid_samples` is."""
    return np.clip(np.asarray(end, np.int64) - np.asarray(start, np.int64), 0, window)


def _inside(start: Ints, length: Ints, window: int) -> Ints:
    """Starts moved back as far as needed for the window to end with the video, at most to its start."""
    return np.clip(start, 0, np.maximum(length - window, 0)[:, None])


def _positive(window: int) -> int:
    if window < 1:
        raise UsageError(f"a window of {window} samples", "at least 1")
    return window


def _numbers(u: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    u = np.atleast_2d(np.asarray(u, np.float64))
    if u.ndim != 2 or u.shape[1] < n or (u.size and not (u.min() >= 0 and u.max() < 1)):
        raise UsageError(f"uniform numbers of shape {u.shape}", f"expected (B, {n}) in [0, 1)")
    return u
