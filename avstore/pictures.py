"""Pictures on a video's clock: decoded frames in, fitted RGB pictures with the number of rows that each fills out.

Row k shows the newest source frame with pts <= k / fps, compared in integers. Colours: the matrix is the one that the
stream names (BT.709, FCC, BT.601 in its spellings, SMPTE 240M, BT.2020), else BT.709 from 720 lines on and BT.601
below; range as named, else full for `yuvj` and grey, limited for the rest; no tone mapping, alpha is left out.
swscale works bilinear into planar RGB: its packed RGB is about 1.5 levels too dark (measured), and slower.
"""

from __future__ import annotations

from array import array
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from avstore.facts import Sink
from avstore.fit import Fit, fit, turn_of
from avstore.probe import DecodeFailed, check_size
from avstore.spec import Spec

SCALER = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # AVColorSpace -> swscale's matrix


class SeekMissed(Exception):
    """A seek did not arrive at the keyframe that the packets showed."""


class Pictures:
    """From decoded frames to rows of the tape."""

    def __init__(
        self,
        stream: Any,
        spec: Spec,
        sink: Sink,
        start: Fraction | None,
        length: Fraction | None,
        slot_seconds: int,
        packed: bool,
    ) -> None:
        self.stream, self.spec, self.sink, self.start = stream, spec, sink, start
        self.base: Fraction = stream.time_base
        self.rows_asked = None if length is None else ceil(length * spec.fps)
        self.rows_slot = slot_seconds * spec.fps
        self.origin: Fraction | None = None
        self.ordinal = 0  # of the next frame in the file
        self.seek_to: int | None = None  # timestamp of the keyframe that decoding begins with
        self.seen = array("q")  # timestamps of the frames, rising
        self.backwards = 0
        self.rows = 0  # handed out
        self.overrun = False
        self.done = False
        self.errors = 0
        self.box: tuple[int, int, int, int] | None = None
        self.display: tuple[int, int] | None = None
        self.first_fit: Fit | None = None
        self._pending: tuple[Any, int, int] | None = None  # frame, ordinal, row
        self._duration = 0
        self._last_pts: int | None = None
        self._last_dts: int | None = None
        self._faults = 1 if packed else 0  # timestamps that ran backwards, less times of decoding that did
        self._fits: dict[tuple[int, int], Fit] = {}
        self._scaler = VideoReformatter()

    def set_origin(self, seconds: Fraction) -> None:
        self.origin = seconds
        unit = self.base.denominator * seconds.denominator
        self._a = self.base.numerator * seconds.denominator * self.spec.fps
        self._b = seconds.numerator * self.base.denominator * self.spec.fps
        self._c = unit

    def row(self, pts: int) -> int:
        """The first row that may show a frame with this timestamp, at least 0."""
        return max(0, self.raw_row(pts))

    def raw_row(self, pts: int) -> int:
        """ceil((pts * base - origin) * fps), in integers."""
        return -((self._b - pts * self._a) // self._c)

    def push(self, frame: Any) -> None:
        """Takes the next frame in the decoder's order."""
        pts = self._time(frame)
        if self.seek_to is not None:
            if pts < self.seek_to:
                return  # before the keyframe: its references are not there
            if pts > self.seek_to:
                raise SeekMissed
            self.seek_to = None
        ordinal = self.ordinal
        self.ordinal += 1
        if self.seen and pts <= self.seen[-1]:
            self.backwards += 1
            return
        if self.origin is None:
            self.set_origin(pts * self.base)
        self.errors += frame.is_corrupt
        row = self.row(pts)
        if self._pending is not None:
            self._show(row)
        self.seen.append(pts)
        self._pending = (frame, ordinal, row)
        self._duration = frame.duration or 0
        if self.rows_asked is not None and row >= self.rows_asked:
            self.done = True

    def _time(self, frame: Any) -> int:
        """When to show a frame, in ticks. Where timestamps run backwards more often than the times of decoding do, the
        latter count (the rule of FFmpeg's `best_effort_timestamp`, which PyAV does not expose); in AVI with MPEG-4,
        which holds no other times and whose packed B-frames are given wrong ones, from the first frame on."""
        pts, dts = frame.pts, frame.dts
        if pts is not None:
            self._faults += self._last_pts is not None and pts <= self._last_pts
            self._last_pts = pts
        if dts is not None:
            self._faults -= self._last_dts is not None and dts <= self._last_dts
            self._last_dts = dts
            if pts is None or self._faults > 0:
                return dts
        elif self._faults > 0 and self.seen:
            return self.seen[-1] + self._step()
        if pts is not None:
            return pts
        return self.seen[-1] + self._step() if self.seen else 0

    def end_pts(self) -> int:
        """When the last frame ends, in ticks: its duration, else the median step, else a 25th of a second."""
        step = self._duration if self._duration > 0 else self._step()
        return self.seen[-1] + step

    def finish(self, end: Fraction | None = None) -> None:
        """Shows the last frame to its end, or to `end` on the file's clock (a single picture with sound)."""
        if self._pending is None:
            return
        if self.done:
            self._show(self.rows_asked or 0)
        elif end is not None:
            assert self.origin is not None
            self._show(max(ceil((end - self.origin) * self.spec.fps), self._pending[2]), hold=False)
        else:
            self._show(self.row(self.end_pts()))
        self._pending = None

    def rate(self) -> Fraction | None:
        """Frames per second by the timestamps: their median step; where all steps agree within a tick that is small
        beside them, their mean, which the container's rounding does not bias."""
        if len(self.seen) < 2:
            return None
        steps = np.diff(np.frombuffer(self.seen, np.int64))
        if steps.max() - steps.min() <= 1 and steps.min() > 8:
            rate = (len(self.seen) - 1) / ((self.seen[-1] - self.seen[0]) * self.base)
        else:
            rate = 1 / (Fraction(float(np.median(steps))) * self.base)
        return rate.limit_denominator(1001)

    def _step(self) -> int:
        if len(self.seen) > 1:
            return max(1, int(np.median(np.diff(np.frombuffer(self.seen, np.int64)))))
        rate = self.stream.guessed_rate or self.stream.average_rate or 25
        return max(1, round(1 / (rate * self.base)))

    def _show(self, until: int, hold: bool = True) -> None:
        """Hands out the pending frame for the rows before `until`."""
        assert self._pending is not None
        frame, ordinal, row = self._pending
        if self.rows_asked is not None:
            until = min(until, self.rows_asked)
        if until <= row:
            return
        if hold and until - row > self.spec.max_hold * self.spec.fps:
            seconds = (until - row) // self.spec.fps
            raise DecodeFailed(
                "bad_timestamps", f"one picture would be shown for {seconds} s, {self.spec.max_hold} s are allowed"
            )
        if until > self.rows_slot:
            self.overrun = True
            return
        self.sink.frame(self._picture(frame), ordinal, until - row)
        self.rows = until

    def _picture(self, frame: Any) -> np.ndarray:
        width, height = frame.width, frame.height
        how = self._fits.get((width, height))
        if how is None:
            how = self._fits[width, height] = self._fit(frame)
        name = frame.format.name
        if frame.format.is_rgb or name.startswith(("pal", "mono")):
            space, reach = None, None
        else:
            space = MATRICES.get(int(frame.colorspace), 1 if height >= 720 else 5)
            named = int(frame.color_range)
            reach = named if named in (1, 2) else 2 if name.startswith(("yuvj", "gray", "ya")) else 1
        small = self._scaler.reformat(
            frame,
            how.scale[0],
            how.scale[1],
            "gbrp",
            src_colorspace=space,
            src_color_range=reach,
            interpolation=SCALER,
            threads=1,
        )
        w, h = how.scale
        planes: Any = small.planes  # they are buffers
        green, blue, red = (np.ndarray((h, w), np.uint8, p, strides=(p.line_size, 1)) for p in planes)
        return how.lay((red, green, blue))

    def _fit(self, frame: Any) -> Fit:
        check_size(frame.width, frame.height, self.spec)
        matrix = frame.side_data["DISPLAYMATRIX"] if "DISPLAYMATRIX" in _names(frame) else None
        aspect = self.stream.sample_aspect_ratio or Fraction(1)
        how = fit(
            frame.width,
            frame.height,
            (self.spec.height, self.spec.width),
            aspect=aspect if aspect > 0 else Fraction(1),
            turn=turn_of(bytes(matrix) if matrix is not None else None),
            mode=self.spec.fit,
        )
        check_size(*how.scale, self.spec)
        if self.box is None:
            self.box, self.display = how.box, how.display
        else:  # pictures of several sizes: the box that all of them fill
            top, left = max(self.box[0], how.box[0]), max(self.box[1], how.box[1])
            bottom = min(self.box[0] + self.box[2], how.box[0] + how.box[2])
            right = min(self.box[1] + self.box[3], how.box[1] + how.box[3])
            self.box = (top, left, bottom - top, right - left)
        return how


def _names(frame: Any) -> set[str]:
    return {data.type.name for data in frame.side_data}
