"""Whether two rows of a table differ: paired tests over their parts (official splits, folds) and seeds.

    compare(a, b).p_flip

The sign-flip permutation test asks how often differences as large as these come about when each may as well have had
the other sign: exact up to 16 pairs, else 100,000 seeded draws. Its smallest possible value is 2 / 2^n: three splits
cannot give less than 0.25. Beside it, the paired t-test (scipy). Parts of one set share training videos, so that
neither is exact evidence beyond this set; both are printed because S0 claims p < 0.05 without saying of how many runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avstore.errors import UsageError

EXACT = 16  # pairs up to which all sign patterns are tried
DRAWS = 100_000


@dataclass(frozen=True)
class Paired:
    """n pairs; mean and sd of a - b; two-sided p of the sign-flip test and of the t-test (None: all differences are
    equal, the statistic has no spread)."""

    n: int
    mean: float
    sd: float
    p_flip: float
    p_t: float | None


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the mean of `differences` under random signs; exact up to EXACT of them."""
    d = np.asarray(differences, np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise UsageError(f"differences of shape {d.shape}", "a paired test wants finite numbers, at least one")
    seen = abs(d.sum())
    slack = 1e-9 * max(1.0, np.abs(d).sum())  # sums in another order
    if len(d) <= EXACT:
        places = np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1
        return float((np.abs((1 - 2 * places) @ d) >= seen - slack).mean())
    signs = np.random.default_rng(seed).integers(0, 2, (DRAWS, len(d)), np.int8)
    return float((1 + (np.abs((1 - 2 * signs) @ d) >= seen - slack).sum()) / (DRAWS + 1))


def compare(a: Sequence[float], b: Sequence[float]) -> Paired:
    """a and b: one value for each pair, in the same order. UsageError for other lengths or fewer than 2."""
    if len(a) != len(b) or len(a) < 2:
        raise UsageError(f"{len(a)} and {len(b)} values", "a paired test wants as many of both, at least 2")
    from scipy.stats import ttest_rel

    d = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    sd = float(d.std(ddof=1))
    p_t = float(ttest_rel(a, b).pvalue) if sd > 1e-12 else None
    return Paired(len(d), float(d.mean()), sd, sign_flip(d.tolist()), p_t)


def lines(values: Mapping[str, Sequence[float]], what: str, against: Sequence[str] = ()) -> list[str]:
    """A line for each two of the rows, and for each of them against the rows `against` (names in `values`). Rows of
    other lengths are not paired; nothing is said of one pair."""
    first = [n for n in values if n not in against]
    out = []
    for one, other in (*itertools.combinations(first, 2), *itertools.product(first, against)):
        a, b = values[one], values[other]
        if len(a) != len(b) or len(a) < 2:
            continue
        found = compare(a, b)
        t = "no spread" if found.p_t is None else f"t-test p {found.p_t:.3g}"
        out.append(
            f"{one} - {other}: {found.mean:+.3f} (sd {found.sd:.3f}) over {found.n} {what}; sign-flip p "
            f"{found.p_flip:.3g}, {t}"
        )
    return out


def over_videos(values: Mapping[str, Sequence[float]], against: Sequence[str] = ()) -> list[str]:
    """`lines` over the test videos of one part and one seed: whether each was right, or how often."""
    told = " (of these videos; it says nothing of other seeds)"
    return [line + told for line in lines(values, "test videos", against)]
