"""`avstore summarize`: which moments of one video a run holds for its summary.

    with as_store(Path("film.mp4"), like=store) as one:
        found = summarise(one, run)                     # scores for each second, segments, what is chosen

A run's embeddings of each second -> segments by KTS -> scores -> the segments that hold most score above the video's
least and fit into 15 % of it (exact knapsack). Scores: DR-DSN trained on this very video, without labels; or
`uniform`, the control that looks at nothing: blocks of two seconds at equal distances.

Declared: one feature for each second (the literature takes two); towers are brought to unit length and joined; the
video's mean is taken off the features and their mean square brought to 1, for a run's vectors of one scene may differ
by little; at most one border for every two seconds; a segment longer than 5 s or than half the summary is cut into
equal parts, or nothing could be chosen in a short video and one long block in a calm one; DR-DSN's learning rate and
epochs are for one video, not for a set of them. The literature, and `bench summarize`, value a segment by its mean
score, whatever its length: the scores of one video lie so close together that then the shortest segments are chosen,
whatever they show (a test has both). Here a segment is worth the sum over its frames, above the least.
Writing the summary is `excerpt.py`, drawing it `strips.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avstore.errors import NotFoundError, UsageError, did_you_mean
from benchmarks import dr_dsn
from benchmarks.kts import change_points, segments_of
from benchmarks.summarize import uniform_summary
from benchmarks.summary import frame_scores, knapsack

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

SHARE = 0.15
LONGEST = 5  # seconds of a segment
SCORES = ("dr-dsn", "uniform")
# of DR-DSN on one video: what the authors' 60 epochs over a set would be; pairs 10 s apart count as different
ALONE = dr_dsn.Config(epochs=100, learning_rate=1e-3, decay_epoch=66, far=10)


@dataclass(frozen=True)
class VideoSummary:
    """scores: float64 (seconds,), for each second; segments: float64 (m, 2), from and to, in seconds, without gaps;
    chosen: bool (m,); intervals: what is kept, ascending, neighbours joined; told: how the scores were made, in words.
    """

    run: str
    told: str
    seconds: Fraction
    scores: NDArray[np.float64]
    segments: NDArray[np.float64]
    chosen: NDArray[np.bool_]
    intervals: list[tuple[Fraction, Fraction]]

    @property
    def kept(self) -> Fraction:
        """Seconds of the summary."""
        return sum((b - a for a, b in self.intervals), Fraction(0))

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "scores_by": self.told,
            "seconds": float(self.seconds),
            "kept": float(self.kept),
            "intervals": [[float(a), float(b)] for a, b in self.intervals],
            "segments": [[*map(float, s), bool(c)] for s, c in zip(self.segments, self.chosen, strict=True)],
            "scores": [round(float(s), 6) for s in self.scores],
        }


def summarise(
    one: Store,
    run: Run,
    *,
    number: int | None = None,
    checkpoint: str | int = "latest",
    towers: Sequence[str] = (),
    by: str = "dr-dsn",
    share: float = SHARE,
    config: dr_dsn.Config = ALONE,
    device: str = "auto",
) -> VideoSummary:
    """The summary of video `number` of a store, by default of its only one. towers: default `video`, or `audio` where
    it has no pictures; several are joined.

    UsageError for unknown scores or towers and for a share outside (0, 1], NotFoundError where the video lacks what a
    tower needs.
    """
    from trainers.embed import embed_videos

    if number is None:
        if len(one) != 1:
            raise UsageError(f"{one.path} holds {len(one)} videos", "a summary is of one")
        number = int(one.numbers[0])
    number = one[number].number
    found = embed_videos(run.load(checkpoint), run, one, np.array([number], np.int64), device=device)
    asked = list(towers) or (["video"] if "video" in found else ["audio"])
    for tower in asked:
        if tower not in found:
            raise NotFoundError(
                f"run {run.name} has no {tower!r} of {one.key(number)}",
                did_you_mean(tower, found),
                "--tower " + next(iter(found), "video"),
            )
    parts = [found[t][0] for t in asked]
    if len({len(p) for p in parts}) != 1:
        raise UsageError(f"the towers {', '.join(asked)} see other seconds of {one.key(number)}", "take one of them")
    unit = [p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12) for p in parts]
    features = np.concatenate(unit, 1) / np.sqrt(len(unit))
    return choose(run.name, features, one.seconds(number), one.spec.fps, by=by, share=share, config=config,
                  seen=" + ".join(asked))  # fmt: skip


def summarise_rows(
    store: Store, number: int, name: str, tower: str, rows: NDArray[np.floating], *, config: dr_dsn.Config = ALONE
) -> VideoSummary:
    """As `summarise`, from embeddings in the store: `rows` is the array (S, D) of a tower (`avstore.index.read_rows`).
    NotFoundError where a second of the video has none."""
    seconds, place = store.seconds(number), int(store.places[number])
    x = np.asarray(rows[place : place + int(-(-seconds // 1))], np.float64)
    if len(x) < seconds or not np.isfinite(x).all():
        raise NotFoundError(
            f"{store.key(number)} has not an embedding by {name} for each second",
            f"{int(np.isfinite(x).all(1).sum())} of {-(-seconds // 1)}",
            f"avstore embed RUN {store.path}",
        )
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return choose(name, unit, seconds, store.spec.fps, config=config, seen=tower)


def choose(
    name: str,
    features: NDArray[np.floating],
    seconds: Fraction,
    fps: int,
    *,
    by: str = "dr-dsn",
    share: float = SHARE,
    config: dr_dsn.Config = ALONE,
    seen: str = "video",
) -> VideoSummary:
    """As `summarise`, of features (ceil(seconds), D). Times lie on the grid of 1 / fps."""
    if by not in SCORES:
        raise UsageError(f"no scores {by!r}", did_you_mean(by, SCORES))
    if not 0 < share <= 1:
        raise UsageError(f"a summary of {share} of the video", "the share lies in (0, 1]")
    x = np.asarray(features, np.float64)
    n = int(seconds * fps)
    if x.ndim != 2 or len(x) != -(-seconds // 1) or int(share * n) < 1:
        raise UsageError(
            f"{len(x)} rows of features for {float(seconds):.2f} s, {int(share * n)} of {n} frames to keep",
            "a row for each begun second, and a frame at least to keep",
            "a longer video, or a greater --share",
        )
    if by == "uniform":
        keep = uniform_summary(n, share, 2 * fps)
        scores = np.full(len(x), 0.5)
        borders = np.concatenate([[0], np.flatnonzero(np.diff(keep)) + 1, [n]])
        segments = np.stack([borders[:-1], borders[1:] - 1], 1)
        told = "uniform: blocks of 2 s at equal distances, the run is not asked"
    else:
        x = centred(x)
        segments = _segments(x, n, fps, max(1, min(int(share * n) // 2, LONGEST * fps)))
        net, history = dr_dsn.train({"video": x}, config)
        scores = dr_dsn.scores(net, x, config.normalise)
        keep = _kept(frame_scores(scores, np.arange(len(x)) * fps, n), segments, int(share * n))
        told = (
            f"DR-DSN trained on this video alone ({config.epochs} epochs, seed {config.seed}; reward "
            f"{_mean(history[:10]):.3f} -> {_mean(history[-10:]):.3f}) on the {seen} features of {name}"
        )
    chosen = keep[segments[:, 0]]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]])))
    intervals = [(Fraction(int(a), fps), Fraction(int(b), fps)) for a, b in edges.reshape(-1, 2)]
    return VideoSummary(name, told, seconds, scores, np.add(segments, (0, 1)) / fps, chosen, intervals)


def _kept(scores: NDArray[np.float64], segments: NDArray[np.int64], room: int) -> NDArray[np.bool_]:
    """bool (frames,): the segments of greatest total score above the least that fit into `room` frames; of equal scores
    the first ones that fill it best."""
    spread = float(np.ptp(scores))
    worth = (scores - scores.min()) / spread if spread > 1e-9 else np.ones_like(scores)
    total = np.concatenate([[0.0], np.cumsum(worth)])
    chosen = knapsack(total[segments[:, 1] + 1] - total[segments[:, 0]], segments[:, 1] - segments[:, 0] + 1, room)
    out = np.zeros(len(scores), np.bool_)
    for first, last in segments[chosen]:
        out[first : last + 1] = True
    return out


def centred(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Features less their mean, of mean square length 1; zeros where all rows are equal."""
    x = np.asarray(features, np.float64)
    x = x - x.mean(0)
    size = float(np.sqrt((x**2).sum(1).mean()))
    return x / size if size > 1e-6 else np.zeros_like(x)


def _segments(features: NDArray[np.float64], n: int, fps: int, longest: int) -> NDArray[np.int64]:
    cuts = change_points(features, most=len(features) // 2, normalise=False)
    out: list[tuple[int, int]] = []
    for first, last in segments_of(cuts, n, fps).tolist():
        length = last - first + 1
        parts = -(-length // longest)  # of floor or ceil(length / parts) frames, so of at most `longest`
        edges = [first + length * k // parts for k in range(parts + 1)]
        out += [(a, b - 1) for a, b in pairwise(edges)]
    return np.array(out, np.int64)


def _mean(history: Sequence[dict[str, float]]) -> float:
    return float(np.mean([h["reward"] for h in history]))


def with_seed(seed: int, epochs: int | None = None) -> dr_dsn.Config:
    """The configuration for one video with another seed or length; the rate falls after two thirds."""
    count = ALONE.epochs if epochs is None else epochs
    return dataclasses.replace(ALONE, seed=seed, epochs=count, decay_epoch=count * 2 // 3)
