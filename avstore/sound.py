"""Sound on a video's clock: decoded audio frames in, consecutive int16 mono samples from t = 0 out.

Mono is the plain mean of the channels. Each unbroken run of frames is mixed and resampled by one FFmpeg filter graph
and placed by its first timestamp; gaps between runs are zeros, overlaps are dropped. Samples of a decoded frame are
never touched here, only those of the graph: reading the frames of some surround decoders from Python kills the process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph

TOLERANCE = Fraction(1, 50)  # seconds by which timestamps may wander (containers round them) without being a gap
BLOCK = 1 << 20


class Sound:
    """Collects sound and hands it out once the clock's zero is known.

    `origin`: seconds of t = 0 on the file's clock, None until known. `out`: takes int16 (n,) arrays. `most`: samples
    beyond which nothing is kept (end of the slot or of the segment).
    """

    def __init__(self, rate: int, out: Callable[[np.ndarray], None], most: int) -> None:
        self.rate, self.out, self.most = rate, out, most
        self.origin: Fraction | None = None
        self.at = 0  # samples handed out
        self.first_seen: Fraction | None = None  # time of the first sample
        self.last_seen: Fraction | None = None  # end of the last one
        self.start = self.end = 0  # what came from the file, in samples of the tape
        self.before = self.beyond = 0  # samples dropped before t = 0, beyond the end
        self.silent = True
        self._graph: Graph | None = None
        self._kind: tuple[str, str, int, int, int] | None = None
        self._base = (0, 0)  # timestamp and samples of the current run
        self._runs: deque[tuple[Fraction | None, np.ndarray]] = deque()  # (time of a run's first sample, samples)
        self._gap = 0  # zeros to hand out (positive) or samples to drop (negative) before the next ones

    def push(self, frame: av.AudioFrame) -> None:
        """Takes a decoded frame; a frame without a time continues the run."""
        samples, rate, base = frame.samples, frame.sample_rate, frame.time_base
        if not samples or not rate or base is None:
            return
        form: Any = frame.format
        layout: Any = frame.layout
        kind = (form.name, layout.name, rate, base.numerator, base.denominator)
        begin, had = self._base
        if self._graph is not None and kind == self._kind:
            drift = 0  # in samples of the source
            if frame.pts is not None:
                drift = (frame.pts - begin) * base.numerator * rate // base.denominator - had
            if abs(drift) * TOLERANCE.denominator <= rate * TOLERANCE.numerator:
                self._base = (begin, had + samples)
                self._feed(frame)
                return
        time = frame.pts * base if frame.pts is not None else (self._ends() or Fraction(0))
        self._flush()
        if self.first_seen is None:
            self.first_seen = time
        self._kind, self._base = kind, (frame.pts if frame.pts is not None else round(time / base), samples)
        self._graph = mixer(frame, self.rate)
        self._runs.append((time, np.empty(0, np.int16)))
        self._feed(frame)

    def finish(self) -> None:
        """The last frame is in: what the resampler still holds comes out."""
        self.last_seen = self._ends()
        self._flush()

    def known(self) -> Fraction | None:
        """How far sound is known, in seconds of the file's clock."""
        return self._ends()

    def hand_out(self, limit: int) -> None:
        """Hands out what is placed before sample `limit` of the clock, zeros in gaps; needs `origin`."""
        assert self.origin is not None
        limit = min(limit, self.most)
        while self._runs and self.at < limit:
            time, chunk = self._runs[0]
            if time is not None:
                place = ((time - self.origin) * self.rate + Fraction(1, 2)).__floor__()
                self._gap = place - self.at
                self._runs[0] = (None, chunk)
            if self._gap > 0:
                n = min(self._gap, limit - self.at, BLOCK)
                self._emit(np.zeros(n, np.int16))
                self._gap -= n
                continue
            self._runs.popleft()
            if self._gap < 0 and len(chunk):
                n = min(-self._gap, len(chunk))
                if self.end == 0:
                    self.before += n
                chunk = chunk[n:]
                self._gap += n
            if len(chunk) > limit - self.at:
                self._runs.appendleft((None, chunk[limit - self.at :]))
                chunk = chunk[: limit - self.at]
            if len(chunk):
                if self.end == 0:
                    self.start = self.at
                self.silent = self.silent and not chunk.any()
                self._emit(chunk)
                self.end = self.at

    def close(self, samples: int) -> None:
        """The clock ends at `samples`: hands out the rest, zeros up to there, and counts what lies beyond."""
        if self.origin is not None:
            self.hand_out(samples)
        self.beyond += sum(len(chunk) for _, chunk in self._runs)
        self._runs.clear()
        while self.at < samples:
            self._emit(np.zeros(min(samples - self.at, BLOCK), np.int16))

    def _emit(self, chunk: np.ndarray) -> None:
        self.at += len(chunk)
        self.out(chunk)

    def _ends(self) -> Fraction | None:
        if self._kind is None:
            return self.last_seen
        begin, had = self._base
        return begin * Fraction(self._kind[3], self._kind[4]) + Fraction(had, self._kind[2])

    def _feed(self, frame: av.AudioFrame | None) -> None:
        assert self._graph is not None
        self._graph.push(frame)
        while True:
            try:
                done: Any = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            chunk = np.frombuffer(done.planes[0], np.int16, done.samples).copy()
            if self.origin is not None and self.at >= self.most:
                self.beyond += len(chunk)
            else:
                self._runs.append((None, chunk))

    def _flush(self) -> None:
        if self._graph is not None:
            self._feed(None)
            self._graph = self._kind = None


def mixer(frame: av.AudioFrame, rate: int) -> Graph:
    """A filter graph from frames like `frame` to int16 mono at `rate`: float, channel mean, resample, round."""
    layout: Any = frame.layout
    form: Any = frame.format
    channels = layout.nb_channels
    graph = Graph()
    graph.threads = 1
    nodes = [
        graph.add(
            "abuffer",
            sample_rate=str(frame.sample_rate),
            sample_fmt=form.name,
            channel_layout=layout.name,
            time_base=f"1/{frame.sample_rate}",
        ),
        graph.add("aformat", sample_fmts="fltp"),
    ]
    if channels > 1:
        nodes.append(graph.add("pan", "mono|c0=" + "+".join(f"{1 / channels:.9f}*c{i}" for i in range(channels))))
    nodes.append(graph.add("aresample", str(rate)))
    nodes.append(graph.add("aformat", sample_fmts="s16", channel_layouts="mono"))
    nodes.append(graph.add("abuffersink"))
    graph.link_nodes(*nodes).configure()
    return graph
