"""`avstore bench finetune`: fine-tuned networks against networks from scratch (UCF101, HMDB51, Kinetics-Sounds).

The protocol of `tuning.py` on each official division, averaged: columns split1, split2, ... (UCF101, HMDB51), else
`fold`, else `split`. The last epoch counts; `select=best` adds a row with the best epoch on the test part, as
CrissCross reports it, labelled; `select=validation` takes the best epoch on a tenth of training (S1). Paired tests over
parts and seeds compare methods with each other and with scratch (`paired.py`).

Controls: the same networks from random weights with as many epochs, all of which train everything; the commonest class.
Each (weights, part, seed) is kept as JSON in a work folder and not done again; another configuration there is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from avstore.durable import canonical_json, machine_errors, read_json, write_atomic
from avstore.errors import ConflictError, CorruptError, UsageError, did_you_mean
from benchmarks import blocks, paired, probing
from benchmarks.probing import Outcome, Part, Probed
from benchmarks.recipe import Recipe
from benchmarks.table import Table
from benchmarks.tuning import Tuned, needs_for, tune

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

WORK = Path("bench-finetune")
COLUMNS = ("features", "modality", "frames", "top-1", "clip top-1", "sd", "of parts", "of", "setting")
TRAIN, TEST = ("train", "training"), ("test", "testing")
Progress = Callable[[str, int, int], None]
# top-1 as the papers print it, mean of 3 splits: (pre-training set, method, frames) -> UCF101, HMDB51 (methods.md 5.1)
_TABLE: tuple[tuple[str, str, int, float | None, float | None], ...] = (
    ("Kinetics-Sound", "CM-ACC", 32, 77.2, 40.6),
    ("Kinetics-Sound", "CrissCross", 32, 88.3, 60.5),
    ("Kinetics-400", "XDC", 8, 74.2, 39.0),
    ("Kinetics-400", "AVID (Cross)", 8, 82.3, 49.1),
    ("Kinetics-400", "AVID, as CrissCross prints it", 8, 83.7, 49.5),
    ("Kinetics-400", "CrissCross", 8, 86.9, 54.3),
    ("Kinetics-400", "L3*", 16, 74.4, 47.8),
    ("Kinetics-400", "XDC, as AVID prints it", 32, 84.2, 47.1),
    ("Kinetics-400", "XDC, as CrissCross prints it", 32, 86.8, 52.6),
    ("Kinetics-400", "AVID (Cross)", 32, 86.9, 59.9),
    ("Kinetics-400", "AVID-CMA", 32, 87.5, 60.8),
    ("Kinetics-400", "CrissCross", 32, 91.5, 64.7),
    ("Kinetics-400", "supervised", 32, 95.0, 74.0),
    ("AudioSet", "XDC", 8, 84.9, 48.8),
    ("AudioSet", "AVID (Cross)", 8, 88.3, 57.5),
    ("AudioSet", "CrissCross", 8, 89.4, 58.3),
    ("AudioSet", "L3*", 16, 82.3, 51.6),
    ("AudioSet", "AVID (Cross)", 32, 91.0, 64.1),
    ("AudioSet", "AVID-CMA", 32, 91.5, 64.7),
    ("AudioSet", "CrissCross", 32, 92.4, 67.4),
    ("AudioSet", "temporally cognizant", 32, None, 66.2),
    ("AudioSet", "supervised", 32, 96.8, 75.9),
    ("none told", "SSCL, stage II, 112 pixels", 16, 82.6, 49.9),
    ("none told", "SSCL, stage II, 224 pixels", 32, 87.1, 57.6),
)
PUBLISHED = ("UCF101", "HMDB51")


def published_rows(name: str, frames: int) -> list[dict[str, Any]]:
    """The papers' figures on a set with so many frames (16: those of 16), labelled. UsageError for another set."""
    if name not in PUBLISHED:
        raise UsageError(f"no published figures of {name!r}", did_you_mean(name, PUBLISHED))
    out = []
    for data, method, of, *both in _TABLE:
        percent = both[PUBLISHED.index(name)]
        if of == frames and percent is not None:
            out.append({"features": f"published: {method}, {data}", "frames": of, "top-1": round(percent / 100, 4)})
    return out


def choose(store: Store, **choice: Any) -> Probed:
    """As `probing.choose`, with one part for each of the columns split1, split2, ... where the store has them."""
    probed = probing.choose(store, **choice)
    columns = sorted((c for c in store.columns if re.fullmatch(r"split\d+", c)), key=lambda c: int(c[5:]))
    if not columns or choice.get("fold_count") is not None or choice.get("fold_column") is not None:
        return probed
    parts = []
    for column in columns:
        given = [str(v) for v in store.column(column, probed.numbers)]
        train = np.array([i for i, s in enumerate(given) if s in TRAIN], np.int64)
        test = np.array([i for i, s in enumerate(given) if s in TEST], np.int64)
        if not len(train) or not len(test):
            raise UsageError(f"column {column} has {len(train)} training and {len(test)} test videos",
                             "each official split needs both", "see avstore ls; --where, or --fold-column")  # fmt: skip
        unknown = sorted(set(probed.labels[test].tolist()) - set(probed.labels[train].tolist()))
        if unknown:
            raise UsageError(f"{column}: {len(unknown)} classes are tested but not trained on",
                             f"e.g. {probed.classes[unknown[0]]}", "select other videos")  # fmt: skip
        parts.append(Part(column, train, test))
    return dataclasses.replace(probed, parts=tuple(parts), description=f"official splits: {', '.join(columns)}")


class Work:
    """The folder in which finished results lie: config.json, and one file for each (weights, part, seed).

    ConflictError naming what differs where it holds results of another configuration.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        file = path / "config.json"
        config = _plain(config)
        if file.is_file():
            there = read_json(file)
            if not isinstance(there, dict):
                raise CorruptError(f"{file} is damaged", "it holds no JSON object", "remove the folder")
            differing = [f"{k} is {there.get(k)} there, {config.get(k)} was asked"
                         for k in sorted({*there, *config}) if there.get(k) != config.get(k)]  # fmt: skip
            if differing:
                raise ConflictError(f"{path} holds results of another configuration", "; ".join(differing),
                                    "give the same options again, or name another folder with --work")  # fmt: skip
        else:
            with machine_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            write_atomic(file, canonical_json(config))

    def find(self, name: str) -> Tuned | None:
        """A finished result; CorruptError where its file cannot be read as one."""
        file = self.path / f"{name}.json"
        if not file.is_file():
            return None
        try:
            value = read_json(file)
            return Tuned(**{**value, "epochs": tuple(value["epochs"])})
        except (TypeError, KeyError) as e:
            raise CorruptError(f"{file} is damaged", str(e), "remove it: it is then done again") from e

    def keep(self, name: str, tuned: Tuned) -> None:
        write_atomic(self.path / f"{name}.json", canonical_json(tuned.to_json()))


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    import json

    plain: dict[str, Any] = json.loads(canonical_json(value))
    return plain


def weights_digest(method: nn.Module) -> str:
    """12 hex digits over a network's weights: equal for equal tensors, whatever the method calls them."""
    each = []
    for x in method.state_dict().values():
        data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        each.append(hashlib.sha256(f"{tuple(x.shape)} {x.dtype}:".encode() + data).digest())
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()[:12]


def configuration(store: Store, probed: Probed, recipe: Recipe, label: str) -> dict[str, Any]:
    """What must be equal for results to be comparable, as JSON."""
    h = hashlib.sha256()
    for part in probed.parts:
        for x in (probed.numbers[part.train], probed.numbers[part.test], probed.labels[part.train]):
            h.update(np.ascontiguousarray(x, "<i8").tobytes())
    return {"format": 1, "store": store.fingerprint, "label": label, "parts": probed.description,
            "videos": h.hexdigest()[:16], **recipe.to_json()}  # fmt: skip


def bench(
    store: Store,
    runs: Sequence[Run],
    *,
    recipe: Recipe,
    seeds: int = 1,
    scratch: bool = True,
    checkpoints: Sequence[str | int] = ("latest",),
    published: str | None = None,
    work: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    label: str = "label",
    **choice: Any,
) -> Table:
    """The table of `bench finetune`: a row for each method (several checkpoints: for each of those), from scratch for
    each different network, the commonest class. `seeds`: fine-tunings of each part with seeds 0 ... seeds - 1."""
    if seeds < 1:
        raise UsageError(f"{seeds} seeds", "at least 1")
    if not runs:
        raise UsageError("no run is named", "fine-tuning starts from a run's networks", "--run runs/avid-cma")
    given = published_rows(published, recipe.frames) if published is not None else []
    probed = choose(store, label=label, modality=recipe.modality, **choice)
    for run in runs:
        needs_for(run, store, recipe)
    config = configuration(store, probed, recipe, label)
    if work is None:
        work = WORK / hashlib.sha256(canonical_json(config)).hexdigest()[:10]
    folder = Work(work, config)
    found: dict[str, dict[tuple[str, int], list[Tuned]]] = {}

    def add(name: str, make: Callable[[int], nn.Module], run: Run, is_scratch: bool) -> None:
        for seed in range(seeds):
            for part in probed.parts:
                method = make(seed)
                file = f"{'scratch' if is_scratch else run.name}-{weights_digest(method)}-{_safe(part.name)}-{seed}"
                tuned = folder.find(file)
                if tuned is None:

                    def say(done: int, total: int, stage: str = f"{name}, {part.name}, seed {seed}") -> None:
                        progress(stage, done, total)

                    pair = [(probed.numbers[i], probed.labels[i]) for i in (part.train, part.test)]
                    tuned = tune(method, run, store, pair[0], pair[1], len(probed.classes), recipe, seed=seed,
                                 scratch=is_scratch, device=device, progress=say)  # fmt: skip
                    folder.keep(file, tuned)
                found.setdefault(name, {}).setdefault((part.name, seed), []).append(tuned)

    for run in runs:
        for which in checkpoints:
            name = run.config.name + (f" step {which}" if len(checkpoints) > 1 else "")
            add(name, lambda seed, run=run, which=which: blocks.with_weights(run, which), run, False)  # type: ignore[misc]
    shapes: dict[str, str] = {}
    for run in runs if scratch else ():
        shape = weights_digest(blocks.with_weights(run, "random", 0))
        if shape in shapes:
            continue
        shapes[shape] = run.config.name
        add("from scratch" if len(shapes) == 1 else f"from scratch, networks of {run.config.name}",
            lambda seed, run=run: blocks.with_weights(run, "random", seed), run, True)  # type: ignore[misc]  # fmt: skip
    rows = []
    for name, results in found.items():
        rows.append(_row(name, results, probed, recipe, seeds, best=False))
        if recipe.select == "best":
            rows.append(_row(name, results, probed, recipe, seeds, best=True))
    rows.append({**probing.row("commonest class", "", [probing.chance(probed)]), "modality": ""})
    counts = ", ".join(f"{len(p.train)}/{len(p.test)}" for p in probed.parts[:3])
    notes = [
        f"{len(probed.numbers)} videos, {len(probed.classes)} classes; {probed.description}; trained on / tested on "
        f"{counts}{' ...' if len(probed.parts) > 3 else ''}. sd: over parts, seeds and runs",
        f"preset {recipe.preset}: {recipe.optimiser} {recipe.rate:g}, {recipe.warm_up} epochs of the classifier alone, "
        f"then {recipe.epochs} of everything, rate x {recipe.decay:g} after {_list(recipe.milestones)}; batch "
        f"{recipe.batch}, {recipe.draws} training clips of each video in an epoch, {recipe.frames} frames at "
        f"{recipe.fps} fps; softmax averaged over {recipe.clips} centre-cropped clips; clip top-1: of the same clips",
        f"from scratch: the same networks and schedule from random weights, everything trained in all "
        f"{recipe.warm_up + recipe.epochs} epochs",
        *_seen(store, runs, probed),
    ]
    methods = [n for n in found if not n.startswith("from scratch")]
    pairs = {n: [float(np.mean([t.video for t in results[p.name, s]])) for p in probed.parts for s in range(seeds)]
             for n, results in found.items()}  # fmt: skip
    notes += paired.lines(pairs, "parts and seeds", [n for n in found if n not in methods])
    if recipe.select == "best":
        notes.append("best test epoch: chosen on the test part (CrissCross' reporting), optimistic by construction")
    if recipe.select == "validation":
        notes.append("epoch chosen on a held-out tenth of training, tested once")
    if published is not None:
        notes.append("published: theirs, on that set in full, with their pre-training; not measured here")
    return Table(f"fine-tuning in {store.path}", COLUMNS, rows + given, tuple(notes))


def _row(
    name: str, results: dict[tuple[str, int], list[Tuned]], probed: Probed, recipe: Recipe, seeds: int, best: bool
) -> dict[str, Any]:
    runs = len(next(iter(results.values())))

    def value(t: Tuned) -> float:
        return t.best if best and t.best is not None else t.video

    outcomes = [[Outcome(p.name, value(results[p.name, s][r]), "") for p in probed.parts]
                for r in range(runs) for s in range(seeds)]  # fmt: skip
    every = [t for ts in results.values() for t in ts]
    setting = {"last": f"last of {recipe.epochs} epochs",
               "best": f"best test epoch of {recipe.epochs}" if best else f"last of {recipe.epochs} epochs",
               "validation": f"best validation epoch of {recipe.epochs}"}[recipe.select]  # fmt: skip
    return {
        **probing.row(name + (", best test epoch" if best else ""), "", outcomes),
        "modality": recipe.modality,
        "frames": recipe.frames if "v" in recipe.modality else None,
        "clip top-1": None if best else float(np.mean([t.clip for t in every])),
        "setting": setting,
        "values": [o.accuracy for one in outcomes for o in one],
        "seconds": round(sum(t.seconds for t in every), 1),
    }


def _seen(store: Store, runs: Sequence[Run], probed: Probed) -> list[str]:
    """A line for each run that was pre-trained on videos it is tested on."""
    from benchmarks.retrieval import trained_on

    tested = np.unique(np.concatenate([probed.numbers[p.test] for p in probed.parts]))
    out = []
    for run in runs:
        trained = trained_on(run.path, store)
        count = 0 if trained is None else int(np.isin(tested, trained).sum())
        if count:
            out.append(f"{run.name} saw {count} of {len(tested)} test videos in pre-training, without labels")
    return out


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)
