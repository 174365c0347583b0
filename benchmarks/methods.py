"""`bench methods`: every method at one budget, with the same small encoders: retrieval, and probes of the sound side.

Budget: a row has been shown `steps` batches in all. A method with a stage before it (avid-cma after avid) shares them:
half for the first stage, the rest in equal parts; a method with a teacher gives the teacher, an AVID run, half. What a
step costs differs (views, momentum copies), so seconds stand beside. Encoders, clip and batch are COMMON's wherever
the method has the setting; KEPT says where its idea needs another.

Every training is a run under `folder` and resumes; every measured run leaves measured.json there, keyed by its weights
and by what it was asked, so that a repeated command only does what is missing. Nothing is written into the stores.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.durable import canonical_json, read_json, write_atomic
from avstore.errors import ConflictError, UsageError, did_you_mean
from avstore.identity import identity
from avstore.index import normalised
from benchmarks import blocks, probing
from benchmarks.finetune import weights_digest
from benchmarks.linear import logistic
from benchmarks.rank import rank
from benchmarks.retrieval import HEADS, PAIRS, TRUNKS, Features, Sides, choose_sides, retrieval
from benchmarks.svm import svm
from benchmarks.table import Table
from trainers.config import RunConfig, resolve
from trainers.embed import embed_videos
from trainers.events import Event
from trainers.loop import train
from trainers.methods import METHODS
from trainers.run import Run

if TYPE_CHECKING:
    from avstore.store import Store

COMMON: dict[str, Any] = {
    "width": 8, "size": 32, "frames": 4, "fps": 4, "seconds": 1.0, "front_end": "avid-linear129", "batch": 24,
    "checkpoint_every": 100_000,
}  # fmt: skip
KEPT = {"avcl": ("seconds",)}  # it hears the whole sound
TEACHERS = {"teacher": "dim", "audio_teacher": "audio_dim", "image_teacher": "image_dim"}  # a run; its vectors' length
CLIPS = 5  # of a recording, for the probes

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Stage:
    """One training on the way to a row: a method's name, its steps, its folder."""

    method: str
    steps: int
    path: Path


def stages(method: str, steps: int, seed: int, folder: Path) -> list[Stage]:
    """The trainings of a row, first to last: the chain of METHODS' stages, or a teacher and its student.

    UsageError for an unknown method, and for fewer steps than there are stages.
    """
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", did_you_mean(method, METHODS), "avstore train --list")
    chain = [method]
    while (before := METHODS[chain[0]].stage) is not None:
        chain.insert(0, before)
    if len(chain) == 1 and teachers(method):
        chain.insert(0, "avid")
    if steps < 2 ** (len(chain) - 1):
        raise UsageError(f"{steps} steps for {' and '.join(chain)}", "each has at least one", "more --steps")
    first = steps if len(chain) == 1 else steps // 2
    rest = [] if len(chain) == 1 else _shares(steps - first, len(chain) - 1)
    out: list[Stage] = []
    for i, (name, n) in enumerate(zip(chain, [first, *rest], strict=True)):
        last = i == len(chain) - 1
        behind = "" if i == 0 else f"-after-{'-'.join(str(s.steps) for s in out)}"
        out.append(Stage(name, n, folder / (f"{name}-s{seed}" if last else f"stages/{name}-{n}{behind}-s{seed}")))
    return out


def _shares(steps: int, parts: int) -> list[int]:
    return [steps // parts + (i < steps % parts) for i in range(parts)]


def teachers(method: str) -> list[str]:
    """The settings of a method that name a teacher's run."""
    return [k for k in TEACHERS if k in resolve(method, preset="tiny").values()]


def configuration(
    method: str, steps: int, seed: int, sets: Sequence[str] = (), teacher: Path | None = None
) -> RunConfig:
    """Preset tiny with COMMON's values and the user's wherever the method has the setting, `steps` and `seed`."""
    known = resolve(method, preset="tiny").values()
    given = {k: v for k, v in COMMON.items() if k not in KEPT.get(method, ())}
    given |= {k: v for k, _, v in (text.partition("=") for text in sets)}
    given |= {"steps": steps, "seed": seed}
    if teacher is not None:
        net = blocks.trunk(blocks.with_weights(Run(teacher)), "v")
        for key in teachers(method):
            given |= {key: teacher, TEACHERS[key]: net.out_channels}
    return resolve(method, preset="tiny", sets=[f"{k}={v}" for k, v in given.items() if k in known])


def bench(
    store: Store,
    folder: str | Path,
    *,
    methods: Sequence[str] = (),
    steps: int = 200,
    seeds: int = 3,
    sets: Sequence[str] = (),
    label: str = "label",
    fold_count: int | None = None,
    fold_seed: int = 0,
    sound: Store | None = None,
    raw: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Table:
    """The table: a row for each method, (mean, standard deviation over seeds) of R@1 by pair and of the probes.

    methods: default all. fold_count: seed s leaves fold s mod n of the stratified folds by `label` out of training and
    asks it; without, the train split is trained on and the test split asked. sound: a store with folds (or a split)
    and a label, on whose recordings the sound encoders are probed. UsageError for unknown methods and settings that no
    method has; what training and the probes raise.
    """
    if steps < 1 or seeds < 1:
        raise UsageError(f"{steps} steps, {seeds} seeds", "both are whole numbers from 1")
    if label not in store.columns:
        raise UsageError(f"{store.path} has no column {label!r}", did_you_mean(label, store.columns), "--label COLUMN")
    names = list(dict.fromkeys(methods)) or list(METHODS)
    plans = {(m, s): stages(m, steps, s, Path(folder)) for s in range(seeds) for m in names}
    _require_known(names, sets)
    sides = choose_sides(store, fold_count=fold_count, fold_seed=fold_seed, label=label)
    probed = None if sound is None else probing.choose(sound, modality="a")
    asked = [sides[s % len(sides)] for s in range(seeds)]
    media = [identity(store, np.union1d(s.queries, s.gallery)) for s in sides]  # other media is another case
    case = [
        label, fold_count, fold_seed, media,
        None if sound is None or probed is None else identity(sound, probed.numbers),
    ]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for done, ((method, seed), plan) in enumerate(plans.items()):
        progress(f"{method}, seed {seed}", done, len(plans))
        run, seconds = _trained(store, plan, seed, sets, asked[seed] if fold_count else None)
        found.setdefault(method, []).append(
            _measured(run, store, asked[seed], label, sound, probed, case) | {"s a step": seconds}
        )
    any_run = Run(plans[names[0], 0][-1].path)
    for seed in range(seeds):
        progress("random weights", seed, seeds)
        found.setdefault(f"random weights of {names[0]}", []).append(
            _measured(any_run, store, asked[seed], label, sound, probed, case, random=seed)
        )
    rows = [_row(name, each) for name, each in found.items()]
    rows += _controls(store, label, fold_count, fold_seed, raw, progress)
    if sound is not None and probed is not None:
        rows += _sound_controls(sound, probed, raw)
    counts = ", ".join(sorted({f"{len(s.queries)} queries, gallery {len(s.gallery)}" for s in asked}))
    columns = (
        "method", "v-v", "v-v trunks", "a-a", "a-a trunks", "v-a", "a-v", *(("SVM", "logistic") if sound else ()),
        "s a step", "of",
    )  # fmt: skip
    notes = [
        f"R@1 by {label}, mean ± sd over {seeds} seeds" + (f", each with a fold of {fold_count}" if fold_count else "")
        + f"; {counts}; budget {steps} steps of {COMMON['batch']} clips, stages and teachers included",
        "trunks: conv5x pooled; the other columns: heads. s a step: the last stage's, whatever else the machine did",
    ]  # fmt: skip
    if sound is not None and probed is not None:
        notes.append(
            f"SVM, logistic regression: sound encoders on {sound.path.name}, {probed.description}; conv5x pooled,"
            f" {CLIPS} clips of a recording averaged, C chosen within the training part"
        )
    return Table(f"every method at one budget, {store.path.name}", columns, rows, tuple(notes), spreads=columns[1:-2])


def _require_known(names: Sequence[str], sets: Sequence[str]) -> None:
    known = set().union(*(resolve(m, preset="tiny").values() for m in names))
    for text in sets:
        key, sign, _ = text.partition("=")
        if not sign or key not in known:
            raise UsageError(f"no method has a setting {key!r}", did_you_mean(key, known), "--set key=value")
        if key in ("steps", "seed", *TEACHERS):
            raise UsageError(f"{key} is set for each run", "it is part of the budget", "--steps and --seeds")


def _trained(
    store: Store, plan: list[Stage], seed: int, sets: Sequence[str], without: Sides | None
) -> tuple[Run, float | None]:
    """The last run of a plan, trained or resumed, and its seconds a step (None: it was there already)."""
    run, seconds = None, None
    selection = {} if without is None else {"list": [store.key(int(n)) for n in without.gallery]}
    for stage in plan:
        teacher = run.path if run is not None and teachers(stage.method) else None
        config = configuration(stage.method, stage.steps, seed, sets, teacher)
        init = None if run is None or METHODS[stage.method].stage is None else run.path
        marks: list[tuple[int, float]] = []

        def mark(event: Event, marks: list[tuple[int, float]] = marks) -> None:
            marks.append((event.step, time.perf_counter()))

        result = train(stage.method, store, config, stage.path, init=init, on_event=mark, **selection)
        run, seconds = result.run, None
        steps = [m for m in marks if m[0]]
        if not result.repeated and len(steps) > 1 and steps[-1][0] > steps[0][0]:
            seconds = (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0])
            write_atomic(stage.path / "seconds.json", canonical_json({"a step": seconds}))
    assert run is not None
    file = run.path / "seconds.json"
    return run, read_json(file)["a step"] if seconds is None and file.is_file() else seconds


def _measured(
    run: Run,
    store: Store,
    sides: Sides,
    label: str,
    sound: Store | None,
    probed: probing.Probed | None,
    case: Sequence[Any],
    random: int | None = None,
) -> dict[str, Any]:
    """{column: value} of one run, or of its networks with random weights; from its folder where it was measured."""
    method = blocks.with_weights(run, "latest" if random is None else "random", random or 0)
    asked = hashlib.sha256(canonical_json([weights_digest(method), *case, sides.description])).hexdigest()[:16]
    file = run.path / ("measured.json" if random is None else f"measured-random-{random}.json")
    if file.is_file() and (kept := read_json(file)).get("asked") == asked:
        return dict(kept["values"])
    everyone = np.unique(np.concatenate([sides.queries, sides.gallery]))
    towers = {t: _means(x, who) for t, (x, who, _) in embed_videos(method, run, store, everyone).items()}
    labels = dict(zip(everyone.tolist(), store.column(label, everyone), strict=True))
    values: dict[str, Any] = {}
    for suffix, names in (("", HEADS), (" trunks", TRUNKS)):
        there = {m: towers[t] for m, t in names.items() if t in towers}
        features = Features({m: v for m, (v, _) in there.items()}, {m: n for m, (_, n) in there.items()})
        for pair in PAIRS if not suffix else ("v-v", "a-a"):
            q, g = pair.split("-")
            if q not in there or g not in there:
                continue
            (qv, qn), (gv, gn) = features.of(q, sides.queries), features.of(g, sides.gallery)
            if qv.shape[1] != gv.shape[1]:
                continue  # no common space
            found = rank(qv, gv, [labels[int(n)] for n in qn], [labels[int(n)] for n in gn])
            values[f"{pair}{suffix}"] = found.recall[1]
            values[f"{pair}{suffix} mAP"] = found.map
    if sound is not None and probed is not None:
        try:
            blocks.trunk(method, "a")
        except ConflictError:
            pass  # no network of sound: its cells stay empty
        else:
            x = blocks.sound_blocks(method, run, sound, probed.numbers, clips=CLIPS, grids={"conv5x": 1})["conv5x"]
            for name, classifier in (("SVM", svm()), ("logistic", logistic())):
                values[name] = float(np.mean([o.accuracy for o in probing.probe(x, probed, classifier)]))
    write_atomic(file, canonical_json({"asked": asked, "values": values}))
    return values


def _means(x: np.ndarray, who: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(unit means of each video's seconds (m, D + 1), video numbers (m,)). Rectified features of a small network may be
    all zero: such a second gets the added dimension for its direction, so that it resembles nothing but its like."""
    x = np.concatenate([x, np.zeros((len(x), 1), x.dtype)], axis=1)
    x[~x.any(axis=1), -1] = 1.0
    videos, at = np.unique(who, return_inverse=True)
    total = np.zeros((len(videos), x.shape[1]))
    np.add.at(total, at, normalised(x))
    return normalised(total), videos


def _row(name: str, each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of what all runs have; `values` keeps each."""
    row: dict[str, Any] = {"method": name, "of": len(each), "values": [dict(e) for e in each]}
    for key in each[0]:
        values = [e[key] for e in each if e.get(key) is not None]
        if len(values) == len(each):
            row[key] = (float(np.mean(values)), float(np.std(values, ddof=1))) if len(values) > 1 else values[0]
    if "s a step" in row and isinstance(row["s a step"], tuple):
        row["s a step"] = round(row["s a step"][0], 2)
    return row


def _controls(
    store: Store, label: str, fold_count: int | None, fold_seed: int, raw: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Raw features and chance, over all folds, in the columns of heads."""
    table = retrieval(store, [], label=label, levels=("class",), fold_count=fold_count, fold_seed=fold_seed, seeds=0,
                      raw=raw, ks=(1,), progress=progress)  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for r in table.rows:
        spread = r.get("sd R@1")
        value = r["R@1"] if spread is None else (r["R@1"], spread)
        rows.setdefault(r["features"], {"method": r["features"], "of": r["of"]})[r["pair"]] = value
    return list(rows.values())


def _sound_controls(sound: Store, probed: probing.Probed, raw: bool) -> list[dict[str, Any]]:
    rows = []
    if raw:
        x = blocks.raw_sound(sound, probed.numbers, clips=CLIPS, seconds=COMMON["seconds"])
        row: dict[str, Any] = {"method": f"raw spectrogram of {sound.path.name}", "of": 1}
        for name, classifier in (("SVM", svm()), ("logistic", logistic())):
            row[name] = float(np.mean([o.accuracy for o in probing.probe(x, probed, classifier)]))
        rows.append(row)
    common = float(np.mean([o.accuracy for o in probing.chance(probed)]))
    rows.append({"method": f"commonest class of {sound.path.name}", "of": 1, "SVM": common, "logistic": common})
    return rows
