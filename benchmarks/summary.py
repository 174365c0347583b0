"""From scores of sampled frames to a summary of the video, and how far it agrees with people.

A summary is a bool per frame. Scores hold until the next sampled frame; a segment's value is the mean of its frames;
the segments of greatest value that fit into 15 % of the video are taken: a 0/1 knapsack, exact. Agreement is the
F-score of chosen frames against each person (SumMe: the best over persons, TVSum: the mean), and the rank correlation
of scores, which a random summary cannot win by short segments (Otani et al., CVPR 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from avstore.errors import UsageError


@dataclass(frozen=True)
class Agreement:
    """F-scores of a summary against each person: `best` of SumMe, `mean` of TVSum."""

    best: float
    mean: float


def knapsack(values: NDArray[np.floating], lengths: NDArray[np.integer], capacity: int) -> NDArray[np.bool_]:
    """bool (n,): the items of greatest total value with total length <= capacity. Exact: O(n * capacity).

    Values finite and not negative, lengths whole and above 0, else UsageError. Of equal totals: the choice that leaves
    out the later items.
    """
    v, w = np.asarray(values, np.float64), np.asarray(lengths)
    if v.shape != w.shape or v.ndim != 1:
        raise UsageError(f"values {v.shape} and lengths {w.shape}", "one of each for every item")
    if not np.isfinite(v).all() or (v < 0).any():
        raise UsageError("a value that is negative or not finite", "segment values are means of scores >= 0")
    if not np.issubdtype(w.dtype, np.integer) or (w < 1).any() or capacity < 0:
        raise UsageError("lengths must be whole and above 0, the capacity not negative", f"capacity {capacity}")
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(v), capacity + 1), np.bool_)
    for i in range(len(v)):
        length = int(w[i])
        if length > capacity:
            continue
        with_it = best[: capacity + 1 - length] + v[i]
        better = with_it > best[length:]
        taken[i, length:] = better
        best[length:] = np.where(better, with_it, best[length:])
    chosen = np.zeros(len(v), np.bool_)
    left = capacity
    for i in range(len(v) - 1, -1, -1):
        if taken[i, left]:
            chosen[i] = True
            left -= int(w[i])
    return chosen


def frame_scores(scores: NDArray[np.floating], picks: NDArray[np.integer], n_frames: int) -> NDArray[np.float64]:
    """float64 (n_frames,): the score of each pick held until the next one; the first is held backwards to frame 0.

    picks: ascending frame indices, one for each score. UsageError where they are not.
    """
    s, p = np.asarray(scores, np.float64).reshape(-1), np.asarray(picks, np.int64).reshape(-1)
    if len(s) != len(p) or not len(p):
        raise UsageError(f"{len(s)} scores for {len(p)} picks", "one for each sampled frame, at least one")
    if not np.isfinite(s).all():
        raise UsageError("scores that are not finite", "a summary of NaN would look like one of numbers")
    if (np.diff(p) <= 0).any() or p[0] < 0 or p[-1] >= n_frames:
        raise UsageError(
            f"picks {p[0]} .. {p[-1]} of a video of {n_frames} frames", "they must ascend and lie inside the video"
        )
    return s[np.maximum(np.searchsorted(p, np.arange(n_frames), side="right") - 1, 0)]


def summary_of(
    scores: NDArray[np.floating], segments: NDArray[np.integer], share: float = 0.15, capacity: int | None = None
) -> NDArray[np.bool_]:
    """bool (n_frames,): the segments that the knapsack takes. scores: (n_frames,), >= 0; segments: (m, 2), first and
    last frame, inclusive, ascending and not overlapping. capacity: frames; default floor(share * n_frames)."""
    s, seg = np.asarray(scores, np.float64), np.asarray(segments, np.int64)
    n = len(s)
    _require_segments(seg, n)
    if not 0 < share <= 1:
        raise UsageError(f"a summary of {share} of the video", "the share lies in (0, 1]")
    room = int(np.floor(share * n)) if capacity is None else capacity
    total = np.concatenate([[0.0], np.cumsum(s)])
    lengths = seg[:, 1] - seg[:, 0] + 1
    chosen = knapsack((total[seg[:, 1] + 1] - total[seg[:, 0]]) / lengths, lengths, room)
    out = np.zeros(n, np.bool_)
    for first, last in seg[chosen]:
        out[first : last + 1] = True
    return out


def _require_segments(segments: NDArray[np.int64], n: int) -> None:
    if segments.ndim != 2 or segments.shape[1:] != (2,) or not len(segments):
        raise UsageError(f"segments of shape {segments.shape}", "(m, 2): first and last frame of each")
    ends = segments.reshape(-1)
    if (segments[:, 1] < segments[:, 0]).any() or (segments[1:, 0] <= segments[:-1, 1]).any():
        raise UsageError("segments that overlap or run backwards", "they must ascend")
    if ends[0] < 0 or ends[-1] >= n:
        raise UsageError(f"segments up to frame {ends[-1]} of a video of {n} frames", "they must lie inside the video")


def f_score(summary: NDArray[np.bool_], person: NDArray[np.bool_]) -> float:
    """2PR / (P + R) of chosen frames; 0 where they share none."""
    a, b = _chosen(summary), _chosen(person)
    if a.shape != b.shape or a.ndim != 1:
        raise UsageError(f"summaries of {a.shape} and {b.shape} frames", "they must be of one video")
    both = int((a & b).sum())
    return 0.0 if both == 0 else 2.0 * both / (int(a.sum()) + int(b.sum()))


def _chosen(summary: NDArray[np.bool_]) -> NDArray[np.bool_]:
    x = np.asarray(summary)
    if x.dtype == np.bool_:
        return x
    if not np.isin(x, (0, 1)).all():
        raise UsageError("a summary holds 0 and 1", "scores become one through summary_of")
    return x.astype(np.bool_)


def agreement(summary: NDArray[np.bool_], people: NDArray[np.bool_]) -> Agreement:
    """F-scores against people (U, n_frames)."""
    p = np.asarray(people)
    if p.ndim != 2 or not len(p):
        raise UsageError(f"summaries of people of shape {p.shape}", "(people, frames)")
    each = [f_score(summary, one) for one in p]
    return Agreement(max(each), float(np.mean(each)))


def rank_correlation(scores: NDArray[np.floating], people: NDArray[np.floating]) -> tuple[float, float]:
    """Kendall's tau-b and Spearman's rho of scores (n,) with those of each person (U, n), averaged over the people.

    A constant side orders nothing: it counts 0.
    """
    s, p = np.asarray(scores, np.float64), np.asarray(people, np.float64)
    if p.ndim != 2 or s.shape != p.shape[1:] or s.size < 2:
        raise UsageError(f"scores of shape {s.shape} against people of {p.shape}", "(n,) and (U, n), n >= 2")
    taus, rhos = [], []
    for one in p:
        if np.ptp(one) == 0 or np.ptp(s) == 0:
            taus.append(0.0)
            rhos.append(0.0)
            continue
        taus.append(float(kendalltau(s, one).statistic))
        rhos.append(float(spearmanr(s, one).statistic))
    return float(np.mean(taus)), float(np.mean(rhos))
