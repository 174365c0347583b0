"""What every probe of frozen features shares: who is trained on and who is tested, scores per clip averaged per video,
accuracy over parts, the table with its controls.

A part is one (training, test) division: a fold, an official split (`splits.py`: split1 ... split3 are averaged), or
train / test. Where a part has a validation part, that one chooses the classifier's settings and is then trained on with
the training part; the test part is scored once. Clip scores are averaged per video before the class is chosen.

Not here: the classifiers (`svm.py`, `linear.py`, `knn.py`) and the features (`blocks.py`).
"""

# legend: n videos, K clips of each, D values, C classes

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import UsageError, did_you_mean
from avstore.split_words import part_of
from benchmarks import paired, splits
from benchmarks.rank import folds
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store
    from benchmarks.kept import Kept
    from trainers.run import Run

COLUMNS = ("features", "block", "top-1", "sd", "of parts", "of", "setting")
BEST = "best block, theirs: chosen on the test parts (S4's reporting), optimistic by construction"
Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], tuple[np.ndarray, str]]


@dataclass(frozen=True, eq=False)
class Part:
    """Places into the probed videos, int64; `inner`: the fold of each training video, for choosing a strength, or
    None; `val`: the validation part, or None."""

    name: str
    train: np.ndarray
    test: np.ndarray
    inner: np.ndarray | None = None
    val: np.ndarray | None = None

    def learned_on(self) -> tuple[np.ndarray, np.ndarray | None]:
        """(places, inner folds of them) that a classifier is given: with a validation part, this is fold 0 and the
        training part fold 1, so that what chooses within training chooses on it."""
        if self.val is None:
            return self.train, self.inner
        inner = np.repeat(np.array([1, 0], np.int64), [len(self.train), len(self.val)])
        return np.concatenate([self.train, self.val]), inner


@dataclass(frozen=True, eq=False)
class Probed:
    """The videos of a probe: numbers in the store, class of each as int64 (n,), names of the classes, parts."""

    numbers: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    parts: tuple[Part, ...]
    description: str
    notes: tuple[str, ...] = ()  # what the table has to say of them


def choose(
    store: Store,
    *,
    label: str = "label",
    fold_column: str | None = None,
    fold_count: int | None = None,
    fold_seed: int = 0,
    split_columns: Sequence[str] = (),
    modality: str = "a",
    **selection: Any,
) -> Probed:
    """Who is probed: by `fold_count` stratified folds (as `bench retrieval`), else by the `fold_column` or
    `split_columns` named, else by the official splits split1, split2, ... where the store has them, else by its column
    `fold`, else by `split`. Videos without the modality or label are refused, by name.

    UsageError where there is neither column nor a number of folds, where a class is missing from a training part.
    """
    asked = [n for n, on in (("--folds", fold_count is not None), ("--fold-column", fold_column is not None),
                             ("--split", bool(split_columns))) if on]  # fmt: skip
    if len(asked) > 1:
        raise UsageError(" with ".join(asked), "each of them says by itself who is tested", "give one of them")
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
    lost: tuple[str, ...] = ()
    classes = tuple(sorted({str(v) for v in values}))
    if len(classes) < 2:
        raise UsageError(f"one class only: {classes[0]}", "a probe tells classes apart", "--label COLUMN")
    y = np.array([classes.index(str(v)) for v in values], np.int64)
    keys = [store.key(int(n)) for n in numbers]
    if fold_count is not None:
        which = folds(keys, [str(v) for v in values], fold_count, fold_seed)
        parts, description = _by_fold(which), f"{fold_count} stratified folds, seed {fold_seed}"
    elif fold_column is not None and fold_column not in store.columns:
        raise UsageError(f"{store.path} has no column {fold_column!r}", did_you_mean(fold_column, store.columns),
                         "--fold-column COLUMN, or --folds 5; see avstore ls")  # fmt: skip
    elif fold_column is not None or (
        not split_columns and "fold" in store.columns and not [c for c in splits.columns_of(store) if c != "split"]
    ):
        column = fold_column or "fold"
        given = ["" if v is None else str(v) for v in store.column(column, numbers)]
        names = sorted(set(given))
        if "" in names:
            e = store.key(int(numbers[given.index("")]))
            raise UsageError(f"{given.count('')} of {len(given)} videos have no {column}", f"e.g. {e}",
                             f"--where {column}!= leaves them out")  # fmt: skip
        if {part_of(n) for n in names} & {"train", "test"}:
            raise UsageError(
                f"column {column} divides training from testing: {', '.join(names[:5])}",
                "folds are tested in turn, so its test part would be trained on too",
                f"--split {column}",
            )
        lost = splits.lost(store, [column], folds=True, **selection)
        which = np.array([names.index(v) for v in given], np.int64)
        parts, description = _by_fold(which, names), f"official folds: column {column}"
    else:
        parts, description = _by_split(store, numbers, list(split_columns) or None)
        lost = splits.lost(store, split_columns or splits.columns_of(store), **selection)
    for part in parts:
        missing = sorted(set(y[part.test].tolist()) - set(y[part.train].tolist()))
        if missing:
            raise UsageError(
                f"{part.name}: {len(missing)} classes are tested but not trained on, e.g. {classes[missing[0]]}",
                "no classifier can know them",
                "fewer --folds, or other videos",
            )
        strange = sorted(set(y[part.val].tolist()) - set(y[part.train].tolist())) if part.val is not None else []
        if strange:
            raise UsageError(
                f"{part.name}: {len(strange)} classes of its validation part are not trained on, e.g. "
                f"{classes[strange[0]]}",
                "it chooses settings for the classes of the training part",
                "--where leaves videos out",
            )
    return Probed(numbers, y, classes, tuple(parts), description, lost)


def _by_fold(which: np.ndarray, names: Sequence[str] = ()) -> list[Part]:
    values = sorted(set(which.tolist()))
    if len(values) < 2:
        raise UsageError("one fold only", "each fold is tested by what was learned on the others", "--folds 5")
    parts = []
    for f in values:
        train = np.flatnonzero(which != f)
        parts.append(Part(f"fold {names[f] if names else f + 1}", train, np.flatnonzero(which == f), which[train]))
    return parts


def _by_split(store: Store, numbers: np.ndarray, columns: Sequence[str] | None) -> tuple[list[Part], str]:
    found = splits.official(store, numbers, columns)
    parts = [Part(s.name, s.train, s.test, None, s.val if len(s.val) else None) for s in found]
    names = ", ".join(s.name for s in found)
    if columns is None and found[0].name in ("test split", "validation split"):
        description = "train and test split" if found[0].name == "test split" else "train and validation split"
    else:
        description = f"official splits: {names}"
    return parts, description


@dataclass(frozen=True)
class Outcome:
    """Accuracy of one part, what the classifier says about its setting, and for each test video, in order, whether it
    was right (1 or 0; empty where nobody noted it)."""

    part: str
    accuracy: float
    setting: str
    right: tuple[int, ...] = ()


def scored(part: Part, predicted: np.ndarray, labels: np.ndarray, setting: str = "") -> Outcome:
    """The outcome of predicted classes (m,) of a part's test videos. labels: (n,), of all that are probed."""
    right = predicted == labels[part.test]
    return Outcome(part.name, float(right.mean()), setting, tuple(int(r) for r in right))


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
        rows, inner = part.learned_on()
        scores, setting = classifier(learn[rows], probed.labels[rows], x[part.test], inner)
        out.append(scored(part, scores.mean(1).argmax(1), probed.labels, setting))
    return out


def few_shot(probed: Probed, shots: int, seed: int = 0) -> Probed:
    """The same with `shots` training videos of each class, drawn by `seed`; test parts as they are, validation parts
    gone: more labels than the shots would choose the settings.

    UsageError where a class has fewer.
    """
    from avstore import draws

    if shots < 1:
        raise UsageError(f"{shots} shots", "at least one training video of each class", "--shots 1")

    u = draws.uniform(seed, "probe", 1, probed.numbers, 0)[..., 0]
    parts = []
    for part in probed.parts:
        kept = []
        for c in range(len(probed.classes)):
            mine = part.train[probed.labels[part.train] == c]
            if len(mine) < shots:
                raise UsageError(
                    f"{part.name}: {probed.classes[c]} has {len(mine)} training videos",
                    f"{shots} shots were asked",
                    f"--shots {len(mine)} or fewer",
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


def digest(probed: Probed) -> str:
    """16 hex digits of who is learned from and who is tested in each part, with what label, for `kept.py`."""
    h = hashlib.sha256(np.ascontiguousarray(probed.labels, "<i8").tobytes())
    for part in probed.parts:
        h.update(part.name.encode())
        for x in (*part.learned_on(), part.test):
            h.update(b"none" if x is None else np.ascontiguousarray(x, "<i8").tobytes())
    return h.hexdigest()[:16]


def kept_outcomes(kept: Kept, key: Mapping[str, Any], make: Callable[[], list[Outcome]]) -> list[Outcome]:
    """The outcomes kept under `key`, else make()'s, kept from now on."""
    found = kept.value(key, lambda: [dataclasses.astuple(o) for o in make()])
    return [Outcome(part, accuracy, setting, tuple(*right)) for part, accuracy, setting, *right in found]


def row(features: str, block: str, outcomes: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """A row of the table: outcomes of each run, seed or draw, each a list over parts. `sd`: over parts and these. With
    one part alone `right` holds how often each of its videos was right, for `differences`; `table` takes it off."""
    each = [[o.accuracy for o in one] for one in outcomes]
    flat = [a for one in each for a in one]
    per_part = [float(np.mean([one[i].accuracy for one in outcomes])) for i in range(len(outcomes[0]))]
    settings = list(dict.fromkeys(o.setting for one in outcomes for o in one if o.setting))
    only = [one[0].right for one in outcomes if len(one) == 1 and one[0].right]
    right = np.mean(only, 0).tolist() if len(only) == len(outcomes) else None
    return {
        **({"right": right} if right else {}),
        "features": features,
        "block": block,
        "top-1": float(np.mean(flat)),
        "sd": float(np.std(flat, ddof=1)) if len(flat) > 1 else None,
        "of parts": tuple(round(p, 3) for p in per_part),
        "of": len(flat),
        "setting": ", ".join(settings),
        "values": per_part,
        "each": each,
    }


def best_blocks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each features of several blocks the row of that with the highest top-1 over all parts, the earliest of
    equals, as S4's Table 1 prints it: chosen on the test parts, and labelled so (`BEST`)."""
    out = []
    for features in dict.fromkeys(r["features"] for r in rows):
        mine = [r for r in rows if r["features"] == features and r["block"]]
        if len(mine) > 1:
            best = max(mine, key=lambda r: r["top-1"])
            setting = ", ".join(s for s in (best["block"], best["setting"]) if s)
            row = {**best, "features": f"{features}, best block, theirs", "block": "best", "setting": setting}
            out.append({k: v for k, v in row.items() if k != "right"})
    return out


def held_out(labels: np.ndarray, inner: np.ndarray | None, parts: int, seed: int = 0) -> np.ndarray | None:
    """bool (t,): the training videos that choose a setting. The first of the inner folds whose classes the others have
    too (a validation part is fold 0), else a seeded `parts`-th of each class; None where a class has one video only, so
    that nothing can be spared."""
    if inner is not None and len(set(inner.tolist())) > 1:
        for fold in sorted(set(inner.tolist())):
            held = inner == fold
            if set(labels[held].tolist()) <= set(labels[~held].tolist()):
                return held
    smallest = int(np.bincount(labels)[np.unique(labels)].min())
    if smallest < 2:
        return None
    return folds([str(i) for i in range(len(labels))], labels.tolist(), min(parts, smallest), seed) == 0


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with training's mean 0 and deviation 1 in each value (constant values: 0). (t, K, D), (m, K, D)."""
    flat = train.reshape(-1, train.shape[-1]).astype(np.float64)
    mean, sd = flat.mean(0), flat.std(0)
    sd[sd < 1e-12] = 1.0
    return ((train - mean) / sd).astype(np.float32), ((test - mean) / sd).astype(np.float32)


def table(
    title: str, rows: list[dict[str, Any]], probed: Probed, notes: Sequence[str] = (), compared: Sequence[str] = ()
) -> Table:
    """The table of a probe. compared: features whose rows of one block are tested against each other (`differences`).
    `right` of the rows goes into the tests alone."""
    tests = differences(rows, compared)
    counts = ", ".join(f"{len(p.train)}/{len(p.test)}" for p in probed.parts[:3])
    chosen = [len(p.val) for p in probed.parts if p.val is not None]
    return Table(
        title,
        COLUMNS,
        [{k: v for k, v in r.items() if k != "right"} for r in rows],
        (
            f"{len(probed.numbers)} videos, {len(probed.classes)} classes; {probed.description}; trained on / tested "
            f"on {counts}{' ...' if len(probed.parts) > 3 else ''}. sd: over parts and repetitions",
            *(
                [f"settings chosen on the validation part ({_few(chosen)} videos), which is then trained on too"]
                if chosen
                else []
            ),
            *notes,
            *tests,
        ),
    )


def _few(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts[:3])) + (" ..." if len(counts) > 3 else "")


def differences(rows: Sequence[dict[str, Any]], compared: Sequence[str]) -> list[str]:
    """A line with a paired test for each two of the `compared` features in each block (`paired.py`): over parts, and
    over repetitions (runs, draws) as well where both have as many, in order. Of one part and one repetition: over its
    test videos, which says whether these videos tell the two apart, and nothing of other seeds."""
    out = []
    for block in dict.fromkeys(r.get("block") for r in rows):
        mine = {r["features"]: r for r in rows if r.get("block") == block and r["features"] in compared}
        for one, other in itertools.combinations(mine, 2):
            a, b = (mine[n].get("each") or [mine[n]["values"]] for n in (one, other))
            many = len(a) == len(b) and len(a) > 1
            told = "parts and repetitions" if many else "parts"
            pair = {n: [v for x in e for v in x] if many else mine[n]["values"] for n, e in ((one, a), (other, b))}
            found = paired.lines(pair, told)
            if len(pair[one]) < 2 and mine[one].get("right") and mine[other].get("right"):
                found = paired.over_videos({n: mine[n]["right"] for n in (one, other)})
            out += [f"{block}, {line}" if block else line for line in found]
    return out


def names(runs: Sequence[Run]) -> list[str]:
    """What each run is called in a table. Runs of one method that differ in nothing but their seed are repetitions of
    each other and share the method's name: a row with their mean and spread. Else their folders name them, so that two
    settings of one method, or one setting trained on two stores, are two rows, and compared."""
    kinds = [(r.config.name, r.config.replace(seed=0).digest, r.snapshot.fingerprint) for r in runs]
    out = []
    for run, kind in zip(runs, kinds, strict=True):
        if all(k == kind for k in kinds if k[0] == kind[0]):
            out.append(run.config.name)
        elif sum(r.name == run.name for r in runs) > 1:
            out.append(str(run.path))
        else:
            out.append(run.name)
    return out
