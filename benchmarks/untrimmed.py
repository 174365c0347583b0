"""`avstore bench untrimmed`: which moments of a long video are worth a look, at equal cost.

Listen to Look's question (Gao et al., CVPR 2020): a moment is one second's embedding of a run; a selector names k of a
video's moments; one classifier, the same for every selector, scores them and the scores are averaged. The table gives
top-1 and macro mAP against k for the learned preview (`trainers.preview`, trained on the training part), random
moments, evenly spaced ones, the first ones, and all of them.

Several runs, or checkpoints of one, stand in one table; paired tests compare the learned preview with every other
selector of its run, and with the preview of every other run: over parts and seeds where there are some, and, at one
part and one seed, over test videos (right or wrong). Of a student of Listen to Look the preview uses Psi and the
classifier, and all selectors are scored on moments fused by Psi (`moments.py`).

Declared, since the protocol is ours (clips-and-protocols.md 3): the classifier is a logistic regression on single
moments of the training videos, standardised, so that no selector is favoured by how it was trained; cost is counted in
moments, the preview's own cheap features not included; random is the mean of several draws. The report's Table 7.1 is
no row of this table: it is said beside it, for it states neither split nor metric.

With a work folder, each (run or checkpoint, seed, part) that is finished is kept there, by all that decides it: the
moments themselves, classes, Psi, the preview's settings. A repeated command goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
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
from avstore.errors import UsageError, did_you_mean
from benchmarks import look, moments, paired, probing
from benchmarks.kept import Kept
from benchmarks.table import Table
from trainers.preview import PRESETS, Preview, PreviewConfig, fit

if TYPE_CHECKING:
    from avstore.store import Store

BUDGETS = (1, 2, 3, 5, 10)
COLUMNS = ("run", "selector", "moments", "top-1", "mAP", "sd of top-1", "of", "cost")
LEARNED = "learned preview"
# methods.md 5.5; S2 gives neither split nor metric, and neither row is the headline figure of the original
PUBLISHED = (
    "published, as printed in the report's Table 7.1 (UCF101 / ActivityNet, neither split nor metric given): Listen to "
    'Look, "ResNet-152" 73.5 / 35.5, "R(2+1)D-152" 82.5 / 47.0; Table 7.4 (UCF51 / ActivityNet): CCL, sound 64.9 / '
    "36.5, image 69.1 / 46.3, both 70.0 / 47.3"
)
Selector = Callable[[np.ndarray, int], np.ndarray]
_Values = tuple[float, float, float, list[float]]  # top-1, mAP, moments looked at, how often each test video was right
Measured = list[tuple[str, int, _Values]]  # of one part: selector, budget (0: all), values
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
    fused: Sequence[np.ndarray] | None = None,
    progress: Progress = lambda stage, done, total: None,
    kept: Callable[[probing.Part, Callable[[], Measured]], Measured] = lambda part, make: make(),
) -> list[dict[str, Any]]:
    """Rows of the table. features: (n_i, D) moments of each video; select(training features, labels) -> a selector;
    fused: what the classifier of all selectors sees of them, if something else; kept: gives a part's values, make()'s
    where they are not known yet."""
    seen = features if fused is None else fused
    if not budgets or min(budgets) < 1 or random_draws < 1:
        raise UsageError(f"budgets {list(budgets)}, {random_draws} draws", "moments to look at: 1 or more")

    def measured(part: probing.Part) -> Measured:
        learned = select([features[i] for i in part.train], labels[part.train])
        score = _classifier([seen[i] for i in part.train], labels[part.train], classes)
        scored = [score(seen[i]) for i in part.test]
        truth, out = labels[part.test], list[tuple[str, int, _Values]]()
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
                top, precision, cost, right = (np.mean(v, 0).tolist() for v in zip(*values, strict=True))
                out.append((name, k, (top, precision, cost, right)))
        out.append(("all", 0, _measure(scored, [np.arange(len(s)) for s in scored], truth, classes)))
        return out

    found: dict[tuple[str, int], list[_Values]] = {}
    for p, part in enumerate(probed_parts):
        progress("untrimmed", p, len(probed_parts))
        for name, k, values in kept(part, functools.partial(measured, part)):
            found.setdefault((name, k), []).append(values)
    return [_row(name, k, each) for (name, k), each in sorted(found.items(), key=lambda x: x[0][1] or 10**9)]


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


def _measure(scored: Sequence[np.ndarray], picks: Sequence[np.ndarray], truth: np.ndarray, classes: int) -> _Values:
    """(top-1, macro mAP over classes that occur, moments looked at per video, whether each video is right)."""
    mean = np.stack([s[p].mean(0) for s, p in zip(scored, picks, strict=True)])
    right = (mean.argmax(1) == truth).astype(np.float64)
    present = [c for c in range(classes) if (truth == c).any()]
    precision = float(np.mean([average_precision_score(truth == c, mean[:, c]) for c in present]))
    return float(right.mean()), precision, float(np.mean([len(p) for p in picks])), right.tolist()


def _row(name: str, k: int, values: Sequence[_Values]) -> dict[str, Any]:
    top = [float(v[0]) for v in values]
    return {
        "selector": name,
        "moments": k or "all",
        "top-1": float(np.mean(top)),
        "mAP": float(np.mean([v[1] for v in values])),
        "sd of top-1": float(np.std(top, ddof=1)) if len(top) > 1 else None,
        "of": len(top),
        "cost": float(np.mean([v[2] for v in values])),
        "values": top,
        "right": [round(float(r), 6) for v in values for r in v[3]],  # of each test video, part by part
    }


def together(tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several seeds as rows over parts and seeds."""
    out = []
    for rows in zip(*tables, strict=True):
        top = [v for r in rows for v in r["values"]]
        right = np.mean([r["right"] for r in rows], 0).round(6).tolist()
        mean = {c: float(np.mean([r[c] for r in rows])) for c in ("top-1", "mAP", "cost")}
        sd = float(np.std(top, ddof=1)) if len(top) > 1 else None
        out.append({**rows[0], **mean, "sd of top-1": sd, "of": len(top), "values": top, "right": right})
    return out


def differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Paired tests of top-1 over parts and seeds, of one part and seed over its test videos: each run's preview with
    its other selectors at each cost, and with the other runs' previews."""
    out = []
    runs = list(dict.fromkeys(r.get("run") for r in rows))
    alone = all(len(r["values"]) == 1 for r in rows)
    over = "right" if alone else "values"

    def tests(values: dict[str, Any]) -> list[str]:
        return paired.over_videos(values) if alone else paired.lines(values, "parts and seeds")

    for k in dict.fromkeys(r["moments"] for r in rows if r["selector"] == LEARNED):
        at = {(r.get("run"), r["selector"]): r[over] for r in rows if r["moments"] == k}
        for run in runs:
            others = [s for (of, s) in at if of == run and s != LEARNED]
            values = {LEARNED: at[run, LEARNED], **{s: at[run, s] for s in others}}
            told = f"{run}, {k} moments" if len(runs) > 1 else f"{k} moments"
            out += [f"{told}: {line}" for s in others
                    for line in tests({n: values[n] for n in (LEARNED, s)})]  # fmt: skip
        if len(runs) > 1:
            previews = {str(run): at[run, LEARNED] for run in runs}
            out += [f"{k} moments, {LEARNED}: {line}" for line in tests(previews)]
    return out


def bench(
    store: Store,
    run: str | Sequence[str],
    *,
    budgets: Sequence[int] = BUDGETS,
    random_draws: int = 10,
    preset: str = "paper",
    epochs: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    checkpoints: Sequence[str | int] = (),
    run_paths: dict[str, Path] | None = None,
    keep: Path | None = None,
    work: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    **choice: Any,
) -> Table:
    """The table of `bench untrimmed` for the embeddings of one or several runs in the store (avstore embed), or, with
    `checkpoints`, for what their networks give now; parts as the probes'. preset, epochs: of the preview; seeds:
    previews of each part, from `seed` on; keep: the file that gets the first preview of the last run or checkpoint;
    work: a folder in which checkpoints' moments and finished values are kept: repeating goes on from there.

    NotFoundError where a video has no moment; UsageError as `probing.choose`; CorruptError for a damaged kept file.
    """
    names = [run] if isinstance(run, str) else list(dict.fromkeys(run))
    if not names or seeds < 1:
        raise UsageError(f"{len(names)} runs, {seeds} seeds", "at least one of each")
    configs = [_preview_config(preset, s, epochs) for s in range(seed, seed + seeds)]
    finished = Kept(work)
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    notes: list[str] = []
    for name in names:
        for which in checkpoints or (None,):
            if which is None:
                given = moments.of_store(store, name, choice)
                more: dict[str, Any] = {"run": name}
            else:
                from benchmarks.curve import place_of
                from trainers.run import Run

                opened = Run((run_paths or {}).get(name, Path("runs") / name))
                given = moments.of_checkpoint(store, opened, which, device, choice, finished)
                step, epoch = place_of(opened, which)
                more = {"run": f"{name} step {step}", "step": step, "epoch": epoch, "of run": name}
            of_seeds, previews = [], []
            for config in configs:
                found, fitted = _evaluated(given, config, budgets, random_draws, finished, progress)
                of_seeds.append(found)
                previews.append(fitted)
            mine = [{**r, **more} for r in together(of_seeds)]
            rows += mine
            compared += mine if which is None or which == checkpoints[-1] else []
            notes += [n for n in (*given.probed.notes, *given.told) if n not in notes]
    if keep is not None:
        part = given.probed.parts[0]
        at = part.learned_on()[0]
        looks = previews[0] or _fitted(given, [given.features[i] for i in at], given.probed.labels[at], configs[0])
        look.keep(looks, given, f"{part.name}, seed {seed}", keep)
    lengths = [len(f) for f in given.features]
    told = (f"{len(lengths)} videos of {min(lengths)} to {max(lengths)} moments of a second, "
            f"{len(given.probed.classes)} classes; {given.probed.description}; one classifier for all selectors; cost: "
            "moments looked at per video; sd: over parts and seeds")  # fmt: skip
    return Table(
        f"moments of untrimmed videos, {', '.join(names)} in {store.path}",
        COLUMNS if len(names) > 1 or checkpoints else COLUMNS[1:],
        rows,
        (told, "where videos are no longer than the budget every selector sees them whole", *notes,
         *differences(compared), PUBLISHED),
    )  # fmt: skip


def _preview_config(preset: str, seed: int, epochs: int | None) -> PreviewConfig:
    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r} of the preview", did_you_mean(preset, PRESETS), "--preset tiny")
    chosen = dataclasses.replace(PRESETS[preset], seed=seed)
    return chosen if epochs is None else dataclasses.replace(chosen, epochs=epochs)


def _evaluated(
    given: moments.Given,
    config: PreviewConfig,
    budgets: Sequence[int],
    random_draws: int,
    finished: Kept,
    progress: Progress,
) -> tuple[list[dict[str, Any]], Preview | None]:
    """(rows, the preview of the first part, if it was not finished before)."""
    import torch

    fused = None
    if given.fusion is not None:
        with torch.no_grad():
            fused = [given.fusion.eval()(torch.from_numpy(x)).numpy() for x in given.features]
    parts = [dataclasses.replace(p, train=p.learned_on()[0], val=None) for p in given.probed.parts]
    key = {"bench": "untrimmed", "moments": given.digest(), "preview": dataclasses.asdict(config),
           "budgets": list(budgets), "random draws": random_draws}  # fmt: skip

    def kept(part: probing.Part, make: Callable[[], Measured]) -> Measured:
        one = {**key, "part": probing.digest(dataclasses.replace(given.probed, parts=(part,)))}
        out = [(name, k, tuple(values)) for name, k, values in finished.value(one, make)]
        first.extend(fitted if part is parts[0] else [])
        return out

    def select(train: Sequence[np.ndarray], labels: np.ndarray) -> Selector:
        fitted.append(_fitted(given, train, labels, config))
        return fitted[-1].choose

    fitted, first = list[Preview](), list[Preview]()
    rows = evaluate(given.features, given.probed.labels, parts, select, classes=len(given.probed.classes),
                    budgets=budgets, random_draws=random_draws, seed=config.seed, fused=fused, progress=progress,
                    kept=kept)  # fmt: skip
    return rows, first[0] if first else None


def _fitted(given: moments.Given, train: Sequence[np.ndarray], labels: np.ndarray, config: PreviewConfig) -> Preview:
    """The preview of a part: of equal moments, on a CPU, the same to the bit each time."""
    return fit(train, labels, len(given.probed.classes), given.widths, fusion=given.fusion,
               classifier=given.classifier, config=config)  # fmt: skip
