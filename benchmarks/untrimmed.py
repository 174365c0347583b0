"""`avstore bench untrimmed`: which moments of a long video are worth a look, at equal cost.

Listen to Look's question (Gao et al., CVPR 2020): a moment is one second's embedding of a run; a selector names k of a
video's moments; one classifier, the same for every selector, scores them and the scores are averaged. The table gives
top-1 and macro mAP against k for the learned preview (`trainers.preview`, trained on the training part), random
moments, evenly spaced ones, the first ones, and all of them.

Declared, since the protocol is ours (clips-and-protocols.md 3): the classifier is a logistic regression on single
moments of the training videos, standardised, so that no selector is favoured by how it was trained; cost is counted in
moments, the preview's own cheap features not included; random is the mean of several draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from avstore import draws
from avstore.errors import NotFoundError, UsageError
from benchmarks import probing
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store

BUDGETS = (1, 2, 3, 5, 10)
COLUMNS = ("selector", "moments", "top-1", "mAP", "sd of top-1", "of parts", "cost")
Selector = Callable[[np.ndarray, int], np.ndarray]
Progress = Callable[[str, int, int], None]


def uniform(n: int, budget: int) -> np.ndarray:
    """int64: the middles of `budget` equal parts of n moments; all where there are fewer."""
    k = min(n, budget)
    return ((np.arange(k) + 0.5) * n / k).astype(np.int64)


def first(n: int, budget: int) -> np.ndarray:
    """int64: the first ones."""
    return np.arange(min(n, budget))


def drawn(n: int, budget: int, video: int, draw: int, seed: int = 0) -> np.ndarray:
    """int64: distinct random ones, a pure function of (seed, video, draw), nested in the budget."""
    u = draws.uniform(seed, "shuffle", draw, video, np.arange(n))[..., 0]
    return np.argsort(u, kind="stable")[: min(n, budget)]


def evaluate(
    features: Sequence[np.ndarray],
    labels: np.ndarray,
    probed_parts: Sequence[probing.Part],
    select: Callable[[Sequence[np.ndarray], np.ndarray], Selector],
    *,
    classes: int,
    budgets: Sequence[int] = BUDGETS,
    random_draws: int = 10,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> list[dict[str, Any]]:
    """Rows of the table. features: (n_i, D) moments of each video; select(training features, labels) -> a selector."""
    if not budgets or min(budgets) < 1 or random_draws < 1:
        raise UsageError(f"budgets {list(budgets)}, {random_draws} draws", "moments to look at: 1 or more")
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for p, part in enumerate(probed_parts):
        progress("untrimmed", p, len(probed_parts))
        learned = select([features[i] for i in part.train], labels[part.train])
        score = _classifier([features[i] for i in part.train], labels[part.train], classes)
        scored = [score(features[i]) for i in part.test]
        truth = labels[part.test]
        for k in budgets:
            chosen: dict[str, list[list[np.ndarray]]] = {
                "learned preview": [[learned(features[i], k) for i in part.test]],
                "uniform": [[uniform(len(s), k) for s in scored]],
                "first": [[first(len(s), k) for s in scored]],
                "random": [[drawn(len(s), k, int(i), d, seed) for s, i in zip(scored, part.test, strict=True)]
                           for d in range(random_draws)],
            }  # fmt: skip
            for name, tries in chosen.items():
                values = [_measure(scored, picks, truth, classes) for picks in tries]
                found.setdefault((name, k), []).append(tuple(np.mean(values, 0)))  # type: ignore[arg-type]
        everything = [np.arange(len(s)) for s in scored]
        found.setdefault(("all", 0), []).append(_measure(scored, everything, truth, classes))
    return [_row(name, k, values) for (name, k), values in sorted(found.items(), key=lambda x: x[0][1] or 10**9)]


def _classifier(features: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Class probabilities (n, C) of moments, learned on single moments of training videos."""
    x = np.concatenate(features).astype(np.float64)
    y = np.repeat(labels, [len(f) for f in features])
    scale = StandardScaler().fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=0.1, max_iter=300).fit(scale.transform(x), y)

    def score(moments: np.ndarray) -> np.ndarray:
        out = np.zeros((len(moments), classes))
        out[:, model.classes_] = model.predict_proba(scale.transform(moments.astype(np.float64)))
        return out

    return score


def _measure(
    scored: Sequence[np.ndarray], picks: Sequence[np.ndarray], truth: np.ndarray, classes: int
) -> tuple[float, float, float]:
    """(top-1, macro mAP over classes that occur, moments looked at per video)."""
    mean = np.stack([s[p].mean(0) for s, p in zip(scored, picks, strict=True)])
    top1 = float((mean.argmax(1) == truth).mean())
    present = [c for c in range(classes) if (truth == c).any()]
    precision = float(np.mean([average_precision_score(truth == c, mean[:, c]) for c in present]))
    return top1, precision, float(np.mean([len(p) for p in picks]))


def _row(name: str, k: int, values: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    top = [v[0] for v in values]
    return {
        "selector": name,
        "moments": k or "all",
        "top-1": float(np.mean(top)),
        "mAP": float(np.mean([v[1] for v in values])),
        "sd of top-1": float(np.std(top, ddof=1)) if len(top) > 1 else None,
        "of parts": len(top),
        "cost": float(np.mean([v[2] for v in values])),
    }


def bench(
    store: Store,
    run: str,
    *,
    budgets: Sequence[int] = BUDGETS,
    random_draws: int = 10,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
    **choice: Any,
) -> Table:
    """The table of `bench untrimmed` for the embeddings of `run` in the store (avstore embed); parts as the probes'.

    NotFoundError where a video has no moment; UsageError as `probing.choose`.
    """
    from avstore.index import embedded_runs
    from trainers import preview

    towers = [t for t in ("video-trunk", "audio-trunk", "video", "audio") if t in embedded_runs(store).get(run, ())]
    trunks = [t for t in towers if t.endswith("-trunk")] or towers[:2]
    if not trunks:
        raise NotFoundError(f"run {run} has no embeddings in {store.path}", "", f"avstore embed {run} {store.path}")
    modality = "".join(m for m, t in (("v", "video"), ("a", "audio")) if any(x.startswith(t) for x in trunks))
    probed = probing.choose(store, modality=modality, **choice)
    found = preview.moments(store, run, probed.numbers, trunks)
    empty = [int(n) for n in probed.numbers if int(n) not in found or not len(found[int(n)].features)]
    if empty:
        raise NotFoundError(
            f"{len(empty)} videos have no moment in the embeddings of {run}, e.g. {store.key(empty[0])}",
            "they came after the last embed, or lack a modality",
            f"avstore embed {run} {store.path}",
        )
    features = [found[int(n)].features for n in probed.numbers]
    sizes = _widths(store, run, trunks)
    config = preview.PreviewConfig(seed=seed) if epochs is None else preview.PreviewConfig(seed=seed, epochs=epochs)

    def select(train: Sequence[np.ndarray], labels: np.ndarray) -> Selector:
        return preview.fit(train, labels, len(probed.classes), sizes, config=config).choose

    rows = evaluate(features, probed.labels, probed.parts, select, classes=len(probed.classes), budgets=budgets,
                    random_draws=random_draws, seed=seed, progress=progress)  # fmt: skip
    lengths = [len(f) for f in features]
    return Table(
        f"moments of untrimmed videos, {run} in {store.path}",
        COLUMNS,
        rows,
        (
            f"{len(features)} videos of {min(lengths)} to {max(lengths)} moments of a second, {len(probed.classes)} "
            f"classes; {probed.description}; one classifier for all selectors; cost: moments looked at per video",
            "where videos are no longer than the budget every selector sees them whole",
        ),
    )


def _widths(store: Store, run: str, towers: Sequence[str]) -> tuple[int, ...]:
    from avstore.durable import read_json

    return tuple(int(read_json(store.path / "embeddings" / run / tower / "zarr.json")["shape"][1]) for tower in towers)
