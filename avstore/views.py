"""Views: what one (video, draw) pair becomes: one clip or several, cut where a policy says.

A policy is a small frozen dataclass that turns the lengths of B videos and uniform numbers into window starts, with the
functions of `avstore.windows`. The loader calls it in the reader process, so a policy of your own must be importable
(defined in a module, not in the script that runs), and must be a pure function of its arguments:

    views: int        clips of one pair
    numbers: int      uniform numbers per pair that `starts` wants (stream "window" of `avstore.draws`)
    starts(extents, u, draw, picture, sound) -> Windows
        extents of B videos; u float64 (B, numbers); draw int64 (B,); picture, sound: lengths in samples.
        Windows with starts (B,) when views is 1, else (B, views).

Not here: the arithmetic of windows, and which pairs come when (`avstore.sampler`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from avstore.draws import integers
from avstore.errors import UsageError, did_you_mean
from avstore.windows import RELAXATIONS, Extents, Windows, avid_windows, snippets, two_views, uniform_windows


class Views(Protocol):
    """See the top of this file."""

    @property
    def views(self) -> int: ...
    @property
    def numbers(self) -> int: ...
    def starts(
        self, extents: Extents, u: NDArray[np.float64], draw: NDArray[np.int64], picture: int, sound: int
    ) -> Windows: ...


@dataclass(frozen=True)
class AvidView:
    """One clip: sound uniform where valid, pictures within +- `max_offset` samples around it (AVID, AVID-CMA)."""

    max_offset: int = 0
    views: int = 1
    numbers: int = 2

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        return avid_windows(extents, u, picture, sound, self.max_offset)


@dataclass(frozen=True)
class RandomView:
    """One clip at a uniform place where picture and sound are; both start there (AVCL, SimCLR and the other rivals).

    `whole_sound`: the sound window starts with the video instead, for methods that hear all of it.
    """

    whole_sound: bool = False
    views: int = 1
    numbers: int = 1

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        low, end = extents.both()
        span = picture if self.whole_sound else max(picture, sound)
        start = integers(u[:, 0], low, np.maximum(end - span, low))
        return Windows(start, np.zeros_like(start) if self.whole_sound else start, np.zeros(len(start), np.bool_))


@dataclass(frozen=True)
class TwoViews:
    """Two clips of each video, at a distance that `relaxation` names (CrissCross)."""

    relaxation: str = "mild"
    loose: bool = False
    views: int = 2
    numbers: int = 5  # the last came later: a new one goes to the end, the others keep theirs

    def __post_init__(self) -> None:
        if self.relaxation not in RELAXATIONS:
            raise UsageError(f"no relaxation is called {self.relaxation!r}", did_you_mean(self.relaxation, RELAXATIONS))

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        return two_views(extents, u, picture, sound, self.relaxation, self.loose)


@dataclass(frozen=True)
class ShiftedSound:
    """Two views of one picture window: with its own sound, and with sound from elsewhere in the video (AVTS).

    The first sound starts with the pictures. The second starts at least `gap` samples away from it (0: the length of
    the sound window, so that the two never overlap), uniform over all such places; where the video has none, it lies
    as far away as the video allows, and `shrunk` says so.
    """

    gap: int = 0
    views: int = 2
    numbers: int = 2

    def __post_init__(self) -> None:
        if self.gap < 0:
            raise UsageError(f"sound shifted by at least {self.gap} samples", "the gap is 0 (a window) or more")

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        low, end = extents.both()
        start = integers(u[:, 0], low, np.maximum(end - max(picture, sound), low))
        gap = self.gap or sound
        first, last = extents.sound_start, np.maximum(extents.sound_end - sound, extents.sound_start)
        later = np.maximum(start + gap, first)
        before = np.maximum(np.minimum(start - gap, last) - first + 1, 0)  # places on either side
        after = np.maximum(last - later + 1, 0)
        some = before + after > 0
        place = integers(u[:, 1], 0, np.maximum(before + after, 1) - 1)
        there = np.where(place < before, first + place, later + place - before)
        farthest = np.where(start - first >= last - start, first, last)
        shifted = np.where(some, there, farthest)
        pictures = np.minimum(start, np.maximum(extents.picture - picture, 0))
        return Windows(np.stack([pictures, pictures], -1), np.stack([start, shifted], -1), ~some)


@dataclass(frozen=True)
class Snippets:
    """`views` consecutive snippets of each video, `hop` samples apart (the temporal model); `centred`: in the middle of
    the video instead of at a random place."""

    views: int
    hop: int
    centred: bool = False

    @property
    def numbers(self) -> int:
        return 0 if self.centred else 1

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        out = snippets(extents, self.views, self.hop, picture, sound, None if self.centred else u)
        if self.views == 1:
            return Windows(out.picture[:, 0], out.sound[:, 0], out.shrunk)
        return out


@dataclass(frozen=True)
class UniformView:
    """Clip number `draw` of `n` evenly spaced ones, the first at the start, the last at the end; n = 1: the middle.

    Evaluation: n is the order's `draws`. Pictures and sound start together where `together` (then the longer of the two
    is spaced), else each is spaced by itself over its own length.
    """

    n: int
    together: bool = True
    views: int = 1
    numbers: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"{self.n} clips of a video", "at least 1")

    def starts(self, extents: Extents, u: Any, draw: Any, picture: int, sound: int) -> Windows:
        draw = np.asarray(draw, np.int64)
        if draw.size and int(draw.max()) >= self.n:
            raise UsageError(
                f"clip {int(draw.max())} of {self.n} evenly spaced ones",
                "the order has more draws than the views have clips",
                f"give the order draws={self.n}",
            )
        rows = np.arange(len(draw))
        none = np.zeros(len(draw), np.bool_)
        if self.together:
            length = np.maximum(extents.picture, extents.sound_end)
            start = uniform_windows(length, max(picture, sound), self.n)[rows, draw]
            last = np.maximum(extents.picture - picture, 0), np.maximum(extents.sound_end - sound, 0)
            return Windows(np.minimum(start, last[0]), np.minimum(start, last[1]), none)
        return Windows(
            uniform_windows(extents.picture, picture, self.n)[rows, draw],
            uniform_windows(extents.sound_end, sound, self.n)[rows, draw],
            none,
        )
