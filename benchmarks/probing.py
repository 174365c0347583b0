"""What every probe of frozen features shares: who is trained on and who is tested, scores per clip averaged per video,
accuracy over parts, the table with its controls.

A part is one (training, test) division: a fold, an official split, or train / test. Clip scores are averaged per video
before the class is chosen. Not here: the classifiers (`svm.py`, `linear.py`, `knn.py`) and the features (`blocks.py`).
"""

# legend: n videos, K clips of each, D values, C classes

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import UsageError, did_you_mean
from benchmarks import paired
from benchmarks.rank import folds
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store

COLUMNS = ("features", "block", "top-1", "sd", "of parts", "of", "setting")
Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], tuple[np.ndarray, str]]


@dataclass(frozen=True, eq=False)
class Part:
    """Places into the probed videos, int64; `inner`: the fold of each training video, for choosing a strength, or
    None."""

    name: str
    train: np.ndarray
    test: np.ndarray
    inner: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Probed:
    """The videos of a probe: numbers in the store, class of each as int64 (n,), names of the classes, parts."""

    numbers: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    parts: tuple[Part, ...]
    description: str


def choose(
    store: Store,
    *,
    label: str = "label",
    fold_column: str | None = None,
    fold_count: int | None = None,
    fold_seed: int = 0,
    modality: str = "a",
    **selection: Any,
) -> Probed:
    """Who is probed: by the store's `fold` column where it has one, else by `split`, else by `fold_count` stratified
    folds (as `bench retrieval`). Videos without the modality or label are refused, by name.

    UsageError where there is neither column nor a number of folds, where a class is missing from a training part.
    """
    numbers = store.select(**selection).numbers
    if not len(numbers):
        raise UsageError("no video is selected", "a probe needs videos with labels", "see avstore ls")
    if label not in store.columns:
        raise UsageError(f"{store.path} has no column {label!r}", did_you_mean(label, store.columns), "--label COLUMN")
    values = store.column(label, numbers)
    empty = [int(n) for n, v in zip(numbers, values, strict=True) if v in (None, "")]
    if empty:
        raise UsageError(
            f"{len(empty)} of {len(numbers)} videos have no {label}",
            f"e.g. {store.key(empty[0])}",
            f"--where {label}!= leaves them out; --label names another column",
        )
    for m, have, word in (("a", store.has_sound, "sound"), ("v", store.has_picture, "pictures")):
        lacking = numbers[~have[numbers]] if m in modality else numbers[:0]
        if len(lacking):
            raise UsageError(
                f"{len(lacking)} of {len(numbers)} videos have no {word}", f"e.g. {store.key(int(lacking[0]))}",
                f"--where has_{'sound' if m == 'a' else 'picture'}=true leaves them out",
            )  # fmt: skip
    classes = tuple(sorted({str(v) for v in values}))
    if len(classes) < 2:
        raise UsageError(f"one class only: {classes[0]}", "a probe tells classes apart", "--label COLUMN")
    y = np.array([classes.index(str(v)) for v in values], np.int64)
    keys = [store.key(int(n)) for n in numbers]
    if fold_count is not None:
        which = folds(keys, [str(v) for v in values], fold_count, fold_seed)
        parts, description = _by_fold(which), f"{fold_count} stratified folds, seed {fold_seed}"
    elif (fold_column or "fold") in store.columns:
        column = fold_column or "fold"
        given = [str(v) for v in store.column(column, numbers)]
        names = sorted(set(given))
        if {"train", "training", "test", "testing"} & set(names):
            raise UsageError(
                f"column {column} divides training from testing: {', '.join(names[:5])}",
                "folds are tested in turn, so its test part would be trained on too",
                "leave --fold-column away where it is called split; bench finetune reads split1, split2, ...",
            )
        which = np.array([names.index(v) for v in given], np.int64)
        parts, description = _by_fold(which, names), f"official folds: column {column}"
    elif fold_column is not None:
        raise UsageError(f"{store.path} has no column {fold_column!r}", did_you_mean(fold_column, store.columns))
    else:
        parts, description = _by_split(store, numbers), "train and test split"
    for part in parts:
        missing = sorted(set(y[part.test].tolist()) - set(y[part.train].tolist()))
        if missing:
            raise UsageError(
                f"{part.name}: {len(missing)} classes are tested but not trained on, e.g. {classes[missing[0]]}",
                "no classifier can know them",
                "fewer --folds, or other videos",
            )
    return Probed(numbers, y, classes, tuple(parts), description)


def _by_fold(which: np.ndarray, names: Sequence[str] = ()) -> list[Part]:
    values = sorted(set(which.tolist()))
    if len(values) < 2:
        raise UsageError("one fold only", "each fold is tested by what was learned on the others", "--folds 5")
    parts = []
    for f in values:
        train = np.flatnonzero(which != f)
        parts.append(Part(f"fold {names[f] if names else f + 1}", train, np.flatnonzero(which == f), which[train]))
    return parts


def _by_split(store: Store, numbers: np.ndarray) -> list[Part]:
    given = [str(v) for v in store.column("split", numbers)] if "split" in store.columns else []
    train = np.array([i for i, s in enumerate(given) if s in ("train", "training")], np.int64)
    test = np.array([i for i, s in enumerate(given) if s in ("test", "testing")], np.int64)
    if not len(train) or not len(test):
        raise UsageError(
            f"{store.path} has no folds and no train and test split",
            f"its splits: {', '.join(sorted(set(given))) or 'none'}",
            "--folds 5, or ingest with a list that has a column fold or split",
        )
    return [Part("test split", train, test, None)]


@dataclass(frozen=True)
class Outcome:
    """Accuracy of one part, and what the classifier says about its setting."""

    part: str
    accuracy: float
    setting: str


def probe(x: np.ndarray, probed: Probed, classifier: Classifier, train_x: np.ndarray | None = None) -> list[Outcome]:
    """Each part's accuracy. x: float32 (n, K, D), the clips of testing; train_x: (n, K', D), those of training where
    they differ.

    classifier(train (t, K', D), labels (t,), test (m, K, D), inner folds (t,) or None) -> clip scores (m, K, C), text.
    """
    if x.ndim != 3 or len(x) != len(probed.labels):
        raise UsageError(f"features of shape {x.shape}", f"(videos, clips, values) of {len(probed.labels)} videos")
    learn = x if train_x is None else train_x
    out = []
    for part in probed.parts:
        scores, setting = classifier(learn[part.train], probed.labels[part.train], x[part.test], part.inner)
        predicted = scores.mean(1).argmax(1)
        out.append(Outcome(part.name, float((predicted == probed.labels[part.test]).mean()), setting))
    return out


def few_shot(probed: Probed, shots: int, seed: int = 0) -> Probed:
    """The same with `shots` training videos of each class, drawn by `seed`; test parts as they are.

    UsageError where a class has fewer.
    """
    from avstore import draws

    u = draws.uniform(seed, "probe", 1, probed.numbers, 0)[..., 0]
    parts = []
    for part in probed.parts:
        kept = []
        for c in range(len(probed.classes)):
            mine = part.train[probed.labels[part.train] == c]
            if len(mine) < shots:
                raise UsageError(
                    f"{part.name}: {probed.classes[c]} has {len(mine)} training videos", f"{shots} shots were asked"
                )
            kept.append(mine[np.argsort(u[mine], kind="stable")[:shots]])
        train = np.sort(np.concatenate(kept))
        inner = None if part.inner is None else part.inner[np.searchsorted(part.train, train)]
        parts.append(Part(part.name, train, part.test, inner))
    return Probed(probed.numbers, probed.labels, probed.classes, tuple(parts), f"{probed.description}, {shots} shots")


def chance(probed: Probed) -> list[Outcome]:
    """The share of the commonest training class in each test part: the best that can be had without looking."""
    out = []
    for part in probed.parts:
        common = np.bincount(probed.labels[part.train], minlength=len(probed.classes)).argmax()
        out.append(Outcome(part.name, float((probed.labels[part.test] == common).mean()), ""))
    return out


def row(features: str, block: str, outcomes: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """A row of the table: outcomes of each run or seed, each a list over parts. `sd`: over parts and runs."""
    flat = [o.accuracy for one in outcomes for o in one]
    per_part = [float(np.mean([one[i].accuracy for one in outcomes])) for i in range(len(outcomes[0]))]
    settings = list(dict.fromkeys(o.setting for one in outcomes for o in one if o.setting))
    return {
        "features": features,
        "block": block,
        "top-1": float(np.mean(flat)),
        "sd": float(np.std(flat, ddof=1)) if len(flat) > 1 else None,
        "of parts": tuple(round(p, 3) for p in per_part),
        "of": len(flat),
        "setting": ", ".join(settings),
        "values": per_part,
    }


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with training's mean 0 and deviation 1 in each value (constant values: 0). (t, K, D), (m, K, D)."""
    flat = train.reshape(-1, train.shape[-1]).astype(np.float64)
    mean, sd = flat.mean(0), flat.std(0)
    sd[sd < 1e-12] = 1.0
    return ((train - mean) / sd).astype(np.float32), ((test - mean) / sd).astype(np.float32)


def table(
    title: str, rows: list[dict[str, Any]], probed: Probed, notes: Sequence[str] = (), compared: Sequence[str] = ()
) -> Table:
    """The table of a probe. compared: features whose rows of one block are tested against each other, over parts."""
    counts = ", ".join(f"{len(p.train)}/{len(p.test)}" for p in probed.parts[:3])
    return Table(
        title,
        COLUMNS,
        rows,
        (
            f"{len(probed.numbers)} videos, {len(probed.classes)} classes; {probed.description}; trained on / tested "
            f"on {counts}{' ...' if len(probed.parts) > 3 else ''}. sd: over parts and runs",
            *notes,
            *differences(rows, compared),
        ),
    )


def differences(rows: Sequence[dict[str, Any]], compared: Sequence[str]) -> list[str]:
    """A line with a paired test over parts for each two of the `compared` features in each block (`paired.py`)."""
    out = []
    for block in dict.fromkeys(r.get("block") for r in rows):
        mine = {r["features"]: r["values"] for r in rows if r.get("block") == block and r["features"] in compared}
        out += [f"{block}, {line}" if block else line for line in paired.lines(mine, "parts")]
    return out


def by_name(published: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of published figures, labelled as theirs."""
    return [{"features": f"published: {name}", "top-1": value} for name, value in published.items()]
