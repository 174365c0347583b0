"""`avstore bench untrimmed`: which moments of a long video are worth a look, at equal cost.

Listen to Look's question (Gao et al., CVPR 2020): a moment is one second's embedding of a run; a selector names k of a
video's moments; one classifier, the same for every selector, scores them and the scores are averaged. The table gives
top-1 and macro mAP against k for the learned preview (`trainers.preview`, trained on the training part), random
moments, evenly spaced ones, the first ones, and all of them.

Several runs, or checkpoints of one, stand in one table; paired tests over parts and seeds compare the learned preview
with every other selector of its run, and with the preview of every other run.

Declared, since the protocol is ours (clips-and-protocols.md 3): the classifier is a logistic regression on single
moments of the training videos, standardised, so that no selector is favoured by how it was trained; cost is counted in
moments, the preview's own cheap features not included; random is the mean of several draws.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from avstore import draws
from avstore.errors import NotFoundError, UsageError
from benchmarks import paired, probing
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

BUDGETS = (1, 2, 3, 5, 10)
COLUMNS = ("run", "selector", "moments", "top-1", "mAP", "sd of top-1", "of", "cost")
LEARNED = "learned preview"
TOWERS = ("video-trunk", "audio-trunk", "video", "audio")
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
                LEARNED: [[learned(features[i], k) for i in part.test]],
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
        "of": len(top),
        "cost": float(np.mean([v[2] for v in values])),
        "values": top,
    }


def together(tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several seeds as rows over parts and seeds."""
    out = []
    for rows in zip(*tables, strict=True):
        top = [v for r in rows for v in r["values"]]
        mean = {c: float(np.mean([r[c] for r in rows])) for c in ("top-1", "mAP", "cost")}
        sd = float(np.std(top, ddof=1)) if len(top) > 1 else None
        out.append({**rows[0], **mean, "sd of top-1": sd, "of": len(top), "values": top})
    return out


def differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Paired tests of top-1 over parts and seeds: each run's preview with its other selectors at each cost, and with
    the other runs' previews."""
    out = []
    runs = list(dict.fromkeys(r.get("run") for r in rows))
    for k in dict.fromkeys(r["moments"] for r in rows if r["selector"] == LEARNED):
        at = {(r.get("run"), r["selector"]): r["values"] for r in rows if r["moments"] == k}
        for run in runs:
            others = [s for (of, s) in at if of == run and s != LEARNED]
            values = {LEARNED: at[run, LEARNED], **{s: at[run, s] for s in others}}
            told = f"{run}, {k} moments" if len(runs) > 1 else f"{k} moments"
            out += [f"{told}: {line}" for s in others
                    for line in paired.lines({n: values[n] for n in (LEARNED, s)}, "parts and seeds")]  # fmt: skip
        if len(runs) > 1:
            previews = {str(run): at[run, LEARNED] for run in runs}
            out += [f"{k} moments, {LEARNED}: {line}" for line in paired.lines(previews, "parts and seeds")]
    return out


def bench(
    store: Store,
    run: str | Sequence[str],
    *,
    budgets: Sequence[int] = BUDGETS,
    random_draws: int = 10,
    epochs: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    checkpoints: Sequence[str | int] = (),
    run_paths: dict[str, Path] | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    **choice: Any,
) -> Table:
    """The table of `bench untrimmed` for the embeddings of one or several runs in the store (avstore embed), or, with
    `checkpoints`, for what their networks give now; parts as the probes'. seeds: previews of each part, from `seed` on.

    NotFoundError where a video has no moment; UsageError as `probing.choose`.
    """
    names = [run] if isinstance(run, str) else list(dict.fromkeys(run))
    if not names or seeds < 1:
        raise UsageError(f"{len(names)} runs, {seeds} seeds", "at least one of each")
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    told = ""
    for name in names:
        for which in checkpoints or (None,):
            if which is None:
                from avstore.index import embedded_runs

                towers = _towers(embedded_runs(store).get(name, ()))
                if not towers:
                    raise NotFoundError(f"run {name} has no embeddings in {store.path}", "",
                                        f"avstore embed {name} {store.path}")  # fmt: skip
                probed = probing.choose(store, modality=_modality(towers), **choice)
                features, sizes = _stored(store, name, probed.numbers, towers)
                more: dict[str, Any] = {"run": name}
            else:
                from benchmarks.curve import place_of
                from trainers.run import Run

                opened = Run((run_paths or {}).get(name, Path("runs") / name))
                probed, features, sizes = _computed(store, opened, which, device, choice)
                step, epoch = place_of(opened, which)
                more = {"run": f"{name} step {step}", "step": step, "epoch": epoch, "of run": name}
            of_seeds = []
            for s in range(seed, seed + seeds):
                config = _preview_config(s, epochs)
                of_seeds.append(_evaluated(features, probed, sizes, config, budgets, random_draws, s, progress))
            mine = [{**r, **more} for r in together(of_seeds)]
            rows += mine
            compared += mine if which is None or which == checkpoints[-1] else []
            lengths = [len(f) for f in features]
            told = (f"{len(features)} videos of {min(lengths)} to {max(lengths)} moments of a second, "
                    f"{len(probed.classes)} classes; {probed.description}; one classifier for all selectors; cost: "
                    "moments looked at per video; sd: over parts and seeds")  # fmt: skip
    return Table(
        f"moments of untrimmed videos, {', '.join(names)} in {store.path}",
        COLUMNS if len(names) > 1 or checkpoints else COLUMNS[1:],
        rows,
        (told, "where videos are no longer than the budget every selector sees them whole", *differences(compared)),
    )


def _preview_config(seed: int, epochs: int | None) -> Any:
    from trainers import preview

    return preview.PreviewConfig(seed=seed) if epochs is None else preview.PreviewConfig(seed=seed, epochs=epochs)


def _evaluated(
    features: Sequence[np.ndarray],
    probed: probing.Probed,
    sizes: tuple[int, ...],
    config: Any,
    budgets: Sequence[int],
    random_draws: int,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    from trainers import preview

    def select(train: Sequence[np.ndarray], labels: np.ndarray) -> Selector:
        return preview.fit(train, labels, len(probed.classes), sizes, config=config).choose

    parts = [dataclasses.replace(p, train=p.learned_on()[0], val=None) for p in probed.parts]
    return evaluate(features, probed.labels, parts, select, classes=len(probed.classes), budgets=budgets,
                    random_draws=random_draws, seed=seed, progress=progress)  # fmt: skip


def _towers(there: Sequence[str]) -> list[str]:
    """Trunks where there are some, else heads."""
    towers = [t for t in TOWERS if t in there]
    return [t for t in towers if t.endswith("-trunk")] or towers[:2]


def _modality(towers: Sequence[str]) -> str:
    return "".join(m for m, t in (("v", "video"), ("a", "audio")) if any(x.startswith(t) for x in towers))


def _stored(
    store: Store, run: str, numbers: np.ndarray, towers: Sequence[str]
) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """(moments of each video, width of each tower), from the embeddings in the store."""
    from trainers import preview

    found = preview.moments(store, run, numbers, towers)
    empty = [int(n) for n in numbers if int(n) not in found or not len(found[int(n)].features)]
    if empty:
        raise NotFoundError(
            f"{len(empty)} videos have no moment in the embeddings of {run}, e.g. {store.key(empty[0])}",
            "they came after the last embed, or lack a modality",
            f"avstore embed {run} {store.path}",
        )
    return [found[int(n)].features for n in numbers], _widths(store, run, towers)


def _computed(
    store: Store, run: Run, which: str | int, device: str, choice: dict[str, Any]
) -> tuple[probing.Probed, list[np.ndarray], tuple[int, ...]]:
    """(who is probed, moments of each video, width of each tower), of a checkpoint's networks; nothing is written."""
    from trainers.embed import Embedder, embed_videos

    method = run.load(which)
    sizes = Embedder(method, run, store.spec.sample_rate, device).sizes()
    towers = _towers(list(sizes))
    if not towers:
        raise NotFoundError(f"{run.path} has no towers of pictures or sound", f"it has {', '.join(sizes)}")
    probed = probing.choose(store, modality=_modality(towers), **choice)
    found = embed_videos(method, run, store, probed.numbers, device=device)
    return probed, joined([found[t] for t in towers], probed.numbers), tuple(sizes[t] for t in towers)


def joined(towers: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], numbers: np.ndarray) -> list[np.ndarray]:
    """Moments (n_i, D) of each video, D = the towers' widths together: every second of the first tower, with that of
    the others beside it, zeros where they have none. towers: (vectors, video numbers, seconds) of each."""
    places = [{(int(n), int(s)): i for i, (n, s) in enumerate(zip(video, second, strict=True))}
              for _, video, second in towers]  # fmt: skip
    seconds_of: dict[int, list[int]] = {}
    for n, s in sorted(places[0]):
        seconds_of.setdefault(n, []).append(s)
    out = []
    for n in numbers.tolist():
        seconds = seconds_of[n]
        parts = [np.stack([x[at[n, s]] if (n, s) in at else np.zeros(x.shape[1], x.dtype) for s in seconds])
                 for (x, _, _), at in zip(towers, places, strict=True)]  # fmt: skip
        out.append(np.concatenate(parts, 1).astype(np.float32))
    return out


def _widths(store: Store, run: str, towers: Sequence[str]) -> tuple[int, ...]:
    from avstore.durable import read_json

    return tuple(int(read_json(store.path / "embeddings" / run / tower / "zarr.json")["shape"][1]) for tower in towers)
