"""Kernel temporal segmentation: where a sequence of features changes (Potapov et al., ECCV 2014; method KTS).

The sequence is cut so that the sum over segments of their scatter around their own mean, in the space of the linear
kernel, is least: exact dynamic programming, O(m n^2). How many cuts: the number m that minimises

    J(m) / n + vmax * m / (2 n) * (log(n / m) + 1)         (no penalty for m = 0)

The change points that the public files of SumMe and TVSum carry cannot be had from public code; here they are data.
"""

# legend: n features, D their width, m change points

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avstore.errors import UsageError


def scatters(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """float64 (n + 1, n + 1): at [i, j], i < j, the sum over rows i .. j - 1 of squared distances to their mean, else 0

    Of the kernel matrix K alone: sum of its diagonal less the block's sum / length.
    """
    x = np.asarray(features, np.float64)
    n = len(x)
    kernel = x @ x.T
    diagonal = np.concatenate([[0.0], np.cumsum(np.diag(kernel))])
    block = np.zeros((n + 1, n + 1))
    block[1:, 1:] = kernel.cumsum(0).cumsum(1)
    corner = np.diag(block)
    length = np.arange(n + 1)[None, :] - np.arange(n + 1)[:, None]
    inside = corner[None, :] + corner[:, None] - block - block.T
    out = diagonal[None, :] - diagonal[:, None] - inside / np.maximum(length, 1)
    return np.where(length > 0, np.maximum(out, 0.0), 0.0)


def best_cuts(cost: NDArray[np.float64], most: int) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """Least total cost with exactly m change points, m = 0 .. most, and these points (ascending, of the first rows of
    the segments after them). cost: (n + 1, n + 1), of the segment i .. j - 1 at [i, j]."""
    n = len(cost) - 1
    forbidden = np.where(np.arange(n + 1)[:, None] < np.arange(n + 1)[None, :], cost, np.inf)
    best = forbidden[0].copy()  # best[j]: of the first j rows with m cuts
    totals, back = [float(best[n])], []
    for _ in range(most):
        through = best[:, None] + forbidden
        where = through.argmin(0)
        best = through[where, np.arange(n + 1)]
        back.append(where)
        totals.append(float(best[n]))
    cuts = []
    for m in range(most + 1):
        end, points = n, []
        for step in reversed(back[:m]):
            end = int(step[end])
            points.append(end)
        cuts.append(np.array(points[::-1], np.int64))
    return np.array(totals), cuts


def change_points(
    features: NDArray[np.floating], most: int | None = None, vmax: float = 1.0, normalise: bool = True
) -> NDArray[np.int64]:
    """int64 (m,), ascending: the rows at which a new segment begins, row 0 left out.

    features: (n, D) float, finite, n >= 1. most: largest number of points tried, default n - 1 (O(n^3) in all: for long
    videos give a bound, e.g. one per two seconds). vmax: weight of the penalty. normalise: rows to unit length first,
    as the public users of KTS do; a row of zeros stays so.

    UsageError for features that are not a finite (n, D) array.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise UsageError(f"features of shape {x.shape}", "one row for each sampled frame, (n, D)")
    if not np.isfinite(x).all():
        raise UsageError("features that are not finite", "a segmentation of NaN would look like one of numbers")
    if vmax < 0:
        raise UsageError(f"vmax {vmax}", "the penalty's weight must not be negative")
    n = len(x)
    most = n - 1 if most is None else min(most, n - 1)
    if most < 0:
        raise UsageError(f"at most {most} change points", "0 or more")
    if normalise:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    totals, cuts = best_cuts(scatters(x), most)
    m = np.arange(1, most + 1)
    penalty = np.concatenate([[0.0], vmax * m / (2.0 * n) * (np.log(n / m) + 1)])
    return cuts[int(np.argmin(totals / n + penalty))]


def segments_of(points: NDArray[np.integer], n_frames: int, stride: int = 1) -> NDArray[np.int64]:
    """int64 (m + 1, 2): first and last frame (inclusive, as the eccv16 layout has them) of each segment, when `points`
    are rows of features that stand `stride` frames apart."""
    starts = np.concatenate([[0], np.asarray(points, np.int64) * stride])
    starts = np.unique(starts[starts < n_frames])
    return np.stack([starts, np.concatenate([starts[1:] - 1, [n_frames - 1]])], 1)
