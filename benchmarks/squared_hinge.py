"""One-vs-rest linear SVMs with squared hinge, to their optimum: one matrix of inner products for all classes and
strengths.

    machines = OneVsRest(x, labels)           # x (n, D) standardised, labels (n,)
    for c in (1e-4, 1e-3):                    # each starts from the one before
        scores = machines.fit(c).decide(test) # (m, C)

Machine k, of class k against all others, y = +-1, minimises 1/2 |(w, b)|^2 + C sum_i max(0, 1 - y_i (w . x_i + b))^2:
what scikit-learn's LinearSVC(loss="squared_hinge") does, its intercept within the penalty as there, but without its
limit of iterations. The solution is (w, b) = sum_i beta_i (x_i, 1), and depends on x only through K = x x' + 1, which
is computed once. Where there are at least twice as many examples as values, (w, b) itself is solved for.

Solver: the finite Newton method (Keerthi and DeCoste, JMLR 6, 2005; its dual form: Chapelle, Neural Computation 19,
2007). Among the examples S within the margin the objective is a quadratic, with the minimum (K_SS + I / 2C) beta_S =
y_S; beta is 0 elsewhere; then an exact line search; it ends when S no longer changes. Where S is more than half of all,
the same beta comes from the inverse of K + I / 2C, shared by the classes, and a system of those outside of S. In terms
of v = (w, b) and z = (x, 1) the minimum is (z_S' z_S + I / 2C) v = z_S' y_S.

Not here: which strength (`svm.py`). Memory (`needed`): three matrices (n, n) of float64, 250 MB for n = 3,200 (ESC-10,
ten clips), or z and three matrices (D, D).
"""

# legend: n examples, D values, C classes, m tested

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.linalg import cho_solve, lapack

from avstore.errors import AvstoreError, UsageError

STEPS = 200  # Newton steps of one machine; below 20 everywhere we looked
CLOSE = 1e-8  # a step that moves no output of a training example further ends it too: one on the margin may flicker


def direct(n: int, d: int) -> bool:
    """Whether (w, b) is solved for, rather than beta."""
    return n >= 2 * (d + 1)


def needed(n: int, d: int) -> int:
    """Bytes that the machines of n examples of d values take, beside the examples."""
    return 8 * (n * (d + 1) + 3 * (d + 1) ** 2) if direct(n, d) else 8 * (n * d + 3 * n * n)


def available() -> int | None:
    """Bytes of memory that are free for the taking; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def fits(n: int, d: int) -> bool:
    """Whether the machines find room, with a fifth of the memory to spare; True where nobody can tell."""
    free = available()
    return free is None or needed(n, d) <= 0.8 * free


class OneVsRest:
    """One machine for each class that occurs. UsageError for shapes, numbers or labels that cannot be."""

    def __init__(self, x: np.ndarray, labels: np.ndarray) -> None:
        """x: float (n, D); labels: int (n,), at least two different ones."""
        if x.ndim != 2 or labels.shape != (len(x),):
            raise UsageError(f"features {x.shape} and labels {labels.shape}", "(n, D) and (n,)")
        if not np.isfinite(x).all():
            raise UsageError("features that are not finite", "no machine can be fitted to them")
        self.classes = np.unique(labels)
        if len(self.classes) < 2:
            raise UsageError("one class only", "a machine tells a class from the others")
        self.x = x.astype(np.float64)
        self.y = np.where(labels[:, None] == self.classes, 1.0, -1.0)
        self.direct = direct(*x.shape)
        try:
            if self.direct:
                self.z = np.concatenate([self.x, np.ones((len(x), 1))], 1)
                self.cross = self.z.T @ self.z
            else:
                self.gram = self.x @ self.x.T + 1.0
        except MemoryError as error:
            raise UsageError(
                f"{len(x)} training clips need {needed(*x.shape) / 2**30:.1f} GiB", "the machine has less",
                "fewer --clips",
            ) from error  # fmt: skip
        self.beta = np.zeros((self.z.shape[1] if self.direct else len(x), len(self.classes)))  # direct: v itself
        self.outputs = np.zeros_like(self.y)  # of the training examples: K beta
        self.c: float | None = None

    def fit(self, c: float) -> OneVsRest:
        """The machines of strength c > 0, themselves for chaining. AvstoreError where Newton's steps do not end."""
        if not (np.isfinite(c) and c > 0):
            raise UsageError(f"C = {c}", "it must be above 0")
        ridge = 1 / (2 * c)
        inverse: list[np.ndarray] = []  # made when first needed
        for k in range(len(self.classes)):
            self._one(k, ridge, inverse)
        self.c = c
        return self

    def decide(self, test: np.ndarray) -> np.ndarray:
        """float64 (m, C): decision values of test (m, D), a column for each of `classes`."""
        if self.c is None:
            raise UsageError("the machines are not fitted", "", "fit(c) first")
        if self.direct:
            return test.astype(np.float64) @ self.beta[:-1] + self.beta[-1]
        return test.astype(np.float64) @ (self.x.T @ self.beta) + self.beta.sum(0)

    def _one(self, k: int, ridge: float, inverse: list[np.ndarray]) -> None:
        y, beta, f = self.y[:, k], self.beta[:, k], self.outputs[:, k]
        for _ in range(STEPS):
            inside = y * f < 1
            target, g = (
                self._direct_minimum(inside, y, ridge) if self.direct else self._minimum(inside, y, ridge, inverse)
            )
            if ((y * g < 1) == inside).all() or np.abs(g - f).max() <= CLOSE:
                beta, f = target, g
                break
            to = target - beta
            by = to if self.direct else g - f  # what the penalty's slope is an inner product with
            t = _step(y, f, g - f, float(by @ beta), float(by @ to), ridge)
            beta, f = beta + t * (target - beta), f + t * (g - f)
        else:
            raise AvstoreError(
                f"the SVM of class {self.classes[k]} did not end in {STEPS} steps",
                "the features are too far from standardised for float64",
                "standardise them, or take a smaller C",
            )
        self.beta[:, k], self.outputs[:, k] = beta, f

    def _direct_minimum(self, inside: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """(w, b) (D + 1,) of the minimum if exactly those inside counted, and the outputs (n,) they give."""
        few = ~inside if inside.sum() * 2 > len(y) else inside
        z = self.z[few]
        a = z.T @ z
        a = self.cross - a if few is not inside else a
        a[np.diag_indices_from(a)] += ridge
        v = _solve(a, self.z.T @ np.where(inside, y, 0.0))
        return v, self.z @ v

    def _minimum(
        self, inside: np.ndarray, y: np.ndarray, ridge: float, inverse: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (n,) of the minimum if exactly those inside counted, and the outputs (n,) they give."""
        s, o = np.flatnonzero(inside), np.flatnonzero(~inside)
        beta = np.zeros(len(y))
        if len(s) <= len(o):
            a = self.gram[np.ix_(s, s)]
            a[np.diag_indices_from(a)] += ridge
            beta[s] = _solve(a, y[s])
            return beta, self.gram @ beta
        if not inverse:
            a = self.gram.copy()
            a[np.diag_indices_from(a)] += ridge
            full, _ = lapack.dpotri(_cholesky(a), lower=True, overwrite_c=True)
            lower = np.tril(full)
            inverse.append(lower + np.tril(lower, -1).T)
        p = inverse[0]
        beta = p @ y  # of everybody; then forces u on those outside hold their beta at 0
        u = np.zeros(len(y))
        if len(o):
            rows = p[o]
            u[o] = _solve(rows[:, o], -beta[o])
            beta += u[o] @ rows
            beta[o] = 0
        return beta, y + u - ridge * beta


def _solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return cho_solve((_cholesky(a), True), b, check_finite=False)


def _cholesky(a: np.ndarray) -> np.ndarray:
    """The lower factor, in place of a (symmetric: its transpose is what LAPACK reads without a copy)."""
    factor, info = lapack.dpotrf(a.T, lower=True, clean=False, overwrite_a=True)
    if info:
        raise AvstoreError(
            "the SVM's matrix of inner products is not positive definite",
            "the features are too far from standardised for float64",
            "standardise them, or take a smaller C",
        )
    return factor


def _step(y: np.ndarray, f: np.ndarray, g: np.ndarray, across: float, along: float, ridge: float) -> float:
    """The t >= 0 that minimises the objective along outputs f + t g, where half of |(w, b)|^2 has the slope across +
    t along: the objective's slope is piecewise linear and rises, so the root of the piece where it changes sign is
    exact."""

    def slope(t: float) -> float:
        short = np.maximum(0, 1 - y * (f + t * g))
        return float(ridge * (across + t * along) - (y * g) @ short)

    with np.errstate(divide="ignore", invalid="ignore"):
        breaks = (1 - y * f) / (y * g)
    breaks = np.sort(breaks[np.isfinite(breaks) & (breaks > 0)])
    low, high = 0, len(breaks)  # the first break at which the slope is above 0
    while low < high:
        middle = (low + high) // 2
        if slope(breaks[middle]) > 0:
            high = middle
        else:
            low = middle + 1
    left = float(breaks[low - 1]) if low else 0.0
    right = float(breaks[low]) if low < len(breaks) else left + 1
    a, b = slope(left), slope(right)
    return left if b <= a else max(left, left - a * (right - left) / (b - a))
