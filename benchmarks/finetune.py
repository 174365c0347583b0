"""`avstore bench finetune`: fine-tuned networks against networks from scratch (UCF101, HMDB51, Kinetics-Sounds).

The protocol of `tuning.py` on each official division, averaged: columns split1, split2, ... (UCF101, HMDB51), else
`fold`, else `split`. The last epoch counts; `select=best` adds a row with the best epoch on the test part, as
CrissCross reports it, labelled; `select=validation` takes the best epoch on the validation part where there is one,
else on a tenth of training (S1). Paired tests over parts and seeds compare methods with each other and with scratch
(`paired.py`), of one part and one seed over its test videos; of several checkpoints the last. Runs of folds are asked
the parts that they have not seen in pre-training (`unseen.py`).

Controls: the same networks from random weights with as many epochs, all of which train everything; the commonest class.
Each (weights, part, seed) is kept as JSON in a work folder and not done again, and each epoch of one that is under way;
another configuration there is refused. `keep` leaves the fine-tuned networks there too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from avstore.durable import canonical_json, machine_errors, read_json, write_atomic
from avstore.errors import ConflictError, CorruptError, UsageError, did_you_mean
from avstore.identity import identity
from benchmarks import blocks, paired, probing, unseen
from benchmarks.curve import place_of
from benchmarks.head import Head, write_head
from benchmarks.probing import Outcome, Part, Probed
from benchmarks.recipe import Recipe
from benchmarks.table import Table
from benchmarks.tuning import Classifier, Tuned, needs_for, tune

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.needs import Needs
    from trainers.run import Run

WORK = Path("bench-finetune")
COLUMNS = ("features", "modality", "frames", "top-1", "clip top-1", "sd", "of parts", "of", "setting")
Progress = Callable[[str, int, int], None]
# top-1 as the papers print it, mean of 3 splits: (pre-training set, method, frames) -> UCF101, HMDB51 (methods.md 5.1)
_TABLE: tuple[tuple[str, str, int, float | None, float | None], ...] = (
    ("Kinetics-Sound", "CM-ACC", 32, 77.2, 40.6),
    ("Kinetics-Sound", "CrissCross", 32, 88.3, 60.5),
    ("Kinetics-Sound", "supervised", 32, 86.9, 53.1),
    ("Kinetics-400", "DPC", 25, 75.7, 35.7),
    ("Kinetics-400", "CBT", 16, 79.5, 44.6),
    ("Kinetics-400", "AVTS", 25, 85.8, 56.9),
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
    ("Kinetics-400", "GDT", 30, 90.9, 62.3),
    ("Kinetics-400", "supervised", 32, 95.0, 74.0),
    ("VGG-Sound", "SeLaVi", 32, 86.1, 55.1),
    ("AudioSet", "XDC", 8, 84.9, 48.8),
    ("AudioSet", "AVID (Cross)", 8, 88.3, 57.5),
    ("AudioSet", "AVID, as CrissCross prints it", 8, 88.6, 57.6),
    ("AudioSet", "CrissCross", 8, 89.4, 58.3),
    ("AudioSet", "L3*", 16, 82.3, 51.6),
    ("AudioSet", "Multisensory", 64, 82.1, None),
    ("AudioSet", "AVTS", 25, 89.0, 61.6),
    ("AudioSet", "XDC, as AVID prints it", 32, 91.2, 61.0),
    ("AudioSet", "XDC, as CrissCross prints it", 32, 93.0, 63.7),
    ("AudioSet", "AVID (Cross)", 32, 91.0, 64.1),
    ("AudioSet", "AVID-CMA", 32, 91.5, 64.7),
    ("AudioSet", "CrissCross", 32, 92.4, 67.4),
    ("AudioSet", "temporally cognizant", 32, None, 66.2),
    ("AudioSet", "supervised", 32, 96.8, 75.9),
    ("HowTo100M", "GDT", 30, 94.1, 67.4),
    ("IG65M", "GDT", 30, 95.2, 72.8),
    ("IG-Random 65M", "XDC", 32, 94.6, 66.5),
    ("IG-Kinetics 65M", "XDC", 32, 95.5, 68.9),
    ("none told", "SSCL, stage I, 112 pixels", 16, 81.4, 47.7),
    ("none told", "SSCL, stage II, 112 pixels", 16, 82.6, 49.9),
    ("none told", "SSCL, stage II, 224 pixels", 16, 84.3, 54.1),
    ("none told", "SSCL, stage II, 224 pixels", 32, 87.1, 57.6),
)
# S1 Table 4, best validation epoch: (method, modality) -> Kinetics-Sounds of 32 classes, Kinetics-100 (methods.md 5.4)
_S1: tuple[tuple[str, str, float, float], ...] = (
    ("Baseline-R", "v", 60.4, 53.6),
    ("Baseline-A", "a", 52.9, 40.9),
    ("Baseline-R+A", "av", 73.9, 61.3),
    ("IIC", "av", 60.5, 46.4),
    ("SimCLR", "av", 69.7, 59.1),
    ("MoCo", "av", 68.2, 58.2),
    ("BYOL", "av", 73.3, 61.4),
    ("SimSiam", "av", 72.9, 60.8),
    ("Barlow Twins", "av", 69.6, 59.3),
    ("AVCL, R3D", "av", 75.6, 64.4),
    ("AVCL, C3D", "av", 74.0, 61.3),
    ("AVCL, R(2+1)D", "av", 77.2, 67.1),
)
PUBLISHED = ("UCF101", "HMDB51", "K32", "K100")
_EPOCH = {"CrissCross": "theirs: best test epoch", "AVID": "theirs: last epoch", "temporally": "theirs: as AVID"}


def published_rows(name: str, frames: int) -> list[dict[str, Any]]:
    """The papers' figures on a set, labelled: those of so many frames, then those of others, fewest frames first.
    setting: which epoch counts there, where a paper or its code tells. K32 and K100: S1's. UsageError for another set.
    """
    if name not in PUBLISHED:
        raise UsageError(f"no published figures of {name!r}", did_you_mean(name, PUBLISHED))
    if name in ("K32", "K100"):
        return [{"features": f"published: {method}, {name}", "modality": modality, "setting": "theirs: best validation",
                 "frames": 16 if "v" in modality else None, "top-1": round((k32 if name == "K32" else k100) / 100, 4)}
                for method, modality, k32, k100 in _S1]  # fmt: skip
    out: list[dict[str, Any]] = []
    for data, method, of, *both in _TABLE:
        percent = both[PUBLISHED.index(name)]
        if percent is not None:
            setting = next((text for word, text in _EPOCH.items() if method.startswith(word)), "")
            out.append({"features": f"published: {method}, {data}", "frames": of, "top-1": round(percent / 100, 4),
                        "setting": "theirs" if method.startswith("AVID, as") else setting})  # fmt: skip
    return sorted(out, key=lambda r: (r["frames"] != frames, r["frames"]))


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
            more = {"epochs": tuple(value["epochs"]), "right": tuple(value.get("right", ()))}
            return Tuned(**{**value, **more})
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


def configuration(
    store: Store, probed: Probed, recipe: Recipe, label: str, rates: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What must be equal for results to be comparable, as JSON. videos: a digest of who is trained on, tested and, for
    select=validation, chosen by, in each part, with their classes. What a run decides is in a result's name (`told`).
    """
    h = hashlib.sha256(canonical_json(list(probed.classes)))
    for part in probed.parts:
        chosen_by = [part.val] if part.val is not None and recipe.select == "validation" else []
        for rows in (part.train, part.test, *chosen_by):
            for x in (probed.numbers, probed.labels):
                h.update(f"{len(rows)}:".encode() + np.ascontiguousarray(x[rows], "<i8").tobytes())
    return {"format": 2, "store": store.fingerprint, "label": label, "parts": probed.description,
            "videos": h.hexdigest()[:16], "rates": dict(rates or {}), **recipe.to_json()}  # fmt: skip


def told(run: Run, method: nn.Module, media: str) -> str:
    """12 hex digits of all that a run decides of a fine-tuning: weights, configuration (clip, crop, colours, front-end)
    and the statistics of its bins; and of which media it is fine-tuned on (`avstore/identity.py`)."""
    value = [weights_digest(method), run.config.digest, run.snapshot.statistics, media]
    return hashlib.sha256(canonical_json(value)).hexdigest()[:12]


def from_scratch(store: Store, runs: Sequence[Run], names: Sequence[str], recipe: Recipe) -> dict[str, Run]:
    """The rows from scratch: one for each different network and clip that it is shown, with the first run of them.
    names: the row of each run."""
    found: dict[tuple[str, Needs], Run] = {}
    rows: dict[str, Run] = {}
    for run, name in zip(runs, names, strict=True):
        shape = weights_digest(blocks.with_weights(run, "random", 0)), needs_for(run, store, recipe)
        if shape not in found:
            found[shape] = run
            rows["from scratch" if not rows else f"from scratch, networks of {name}"] = run
    return rows


def bench(
    store: Store,
    runs: Sequence[Run],
    *,
    recipe: Recipe,
    rates: Mapping[str, float] | None = None,
    seeds: int = 1,
    scratch: bool = True,
    checkpoints: Sequence[str | int] = ("latest",),
    published: str | None = None,
    work: Path | None = None,
    keep: bool = False,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    label: str = "label",
    **choice: Any,
) -> Table:
    """The table of `bench finetune`: a row for each method (several checkpoints: for each of those, with its `step` and
    `epoch`, for `curve.draw`), from scratch for each different network and clip, the commonest class.

    rates: of parts by name, in place of the recipe's (CrissCross' files have one for each). seeds: fine-tunings of
    each part with seeds 0 ... seeds - 1. keep: the fine-tuned networks of runs stay in the work folder
    (NAME.safetensors), for `avstore explain --head`; results that are there without theirs are made again. UsageError
    for what cannot be asked, ConflictError where a run or the store cannot give it."""
    if seeds < 1:
        raise UsageError(f"{seeds} seeds", "at least 1")
    if not runs:
        raise UsageError("no run is named", "fine-tuning starts from a run's networks", "--run runs/avid-cma")
    given = published_rows(published, recipe.frames) if published is not None else []
    names = probing.names(runs)
    chosen = probing.choose(store, label=label, modality=recipe.modality, **choice)
    probed, asked, seen = unseen.plan(store, runs, names, chosen)
    for run in runs:
        needs_for(run, store, recipe)
    rates = dict(rates or {})
    for unknown in sorted(set(rates) - {p.name for p in chosen.parts}):
        why = did_you_mean(unknown, [p.name for p in chosen.parts])
        raise UsageError(f"no part {unknown!r} to give a rate to", why, "--fold-rate split1=0.0005")
    recipes = {p.name: dataclasses.replace(recipe, rate=rates.get(p.name, recipe.rate)) for p in probed.parts}
    config = configuration(store, probed, recipe, label, rates)
    if work is None:
        work = WORK / hashlib.sha256(canonical_json(config)).hexdigest()[:10]
    folder, media = Work(work, config), identity(store, probed.numbers)
    found: dict[str, dict[tuple[str, int], list[Tuned]]] = {}

    def add(name: str, make: Callable[[int], nn.Module], run: Run, parts: Sequence[Part], is_scratch: bool) -> None:
        for seed in range(seeds):
            for part in parts:
                method = make(seed)
                file = f"{'scratch' if is_scratch else run.name}-{told(run, method, media)}-{_safe(part.name)}-{seed}"
                head = folder.path / f"{file}.safetensors" if keep and not is_scratch else None
                tuned = folder.find(file)
                if tuned is None or (head is not None and not head.is_file()):

                    def say(done: int, total: int, stage: str = f"{name}, {part.name}, seed {seed}") -> None:
                        progress(stage, done, total)

                    pair = [(probed.numbers[i], probed.labels[i]) for i in (part.train, part.test)]
                    val = None if part.val is None else (probed.numbers[part.val], probed.labels[part.val])

                    def write(net: Classifier, head: Path | None = head, seed: int = seed, part: Part = part) -> None:
                        if head is not None:
                            about = Head(str(run.path), list(probed.classes), recipes[part.name], seed, part.name,
                                         store.fingerprint, label)  # fmt: skip
                            write_head(head, net, about)

                    tuned = tune(method, run, store, pair[0], pair[1], len(probed.classes), recipes[part.name],
                                 seed=seed,
                                 scratch=is_scratch, device=device, progress=say, keep=write, val=val,
                                 state=folder.path / f"{file}.epoch.pt")  # fmt: skip
                    folder.keep(file, tuned)
                found.setdefault(name, {}).setdefault((part.name, seed), []).append(tuned)

    places: dict[str, dict[str, Any]] = {}  # of a row on a curve over checkpoints
    for run, called, parts in zip(runs, names, asked, strict=True):
        for which in checkpoints:
            name = called
            if len(checkpoints) > 1:
                step, epoch = place_of(run, which)
                name += f" step {step}"
                places[name] = {"step": step, "epoch": epoch, "of run": called}
            add(name, lambda seed, run=run, which=which: blocks.with_weights(run, which), run, parts, False)  # type: ignore[misc]
    for called, run in from_scratch(store, runs, names, recipe).items() if scratch else ():
        add(called,
            lambda seed, run=run: blocks.with_weights(run, "random", seed), run, probed.parts, True)  # type: ignore[misc]  # fmt: skip
    rows = []
    for name, results in found.items():
        place = places.get(name, {})
        rows.append(_row(name, results, probed, recipe, seeds, best=False) | place)
        if recipe.select == "best":
            place = place and {**place, "of run": f"{place['of run']}, best test epoch"}
            rows.append(_row(name, results, probed, recipe, seeds, best=True) | place)
    rows.append({**probing.row("commonest class", "", [probing.chance(probed)]), "modality": ""})
    counts = ", ".join(f"{len(p.train)}/{len(p.test)}" for p in probed.parts[:3])
    notes = [
        f"{len(probed.numbers)} videos, {len(probed.classes)} classes; {probed.description}; trained on / tested on "
        f"{counts}{' ...' if len(probed.parts) > 3 else ''}. sd: over parts, seeds and runs",
        f"preset {recipe.preset}: {recipe.optimiser} {recipe.rate:g}"
        f"{''.join(f', {r:g} on {n}' for n, r in rates.items())}, {recipe.warm_up} epochs of the classifier alone, "
        f"then {recipe.epochs} of everything, rate x {recipe.decay:g} after {_list(recipe.milestones)}; batch "
        f"{recipe.batch}, {recipe.draws} training clips of each video in an epoch{_pictures(recipe)}; softmax averaged "
        f"over {recipe.clips} {'centre-cropped ' if 'v' in recipe.modality else ''}clips; clip top-1: of "
        f"{f'{recipe.alone} clips' if recipe.alone else 'the same clips'}",
        *([f"from scratch: the same networks and schedule from random weights, everything trained in all "
           f"{recipe.warm_up + recipe.epochs} epochs"] if scratch else []),
        *seen,
    ]
    held = [len(p.val) for p in probed.parts if p.val is not None]
    last = max((p["step"] for p in places.values()), default=None)
    notes += _compared({n: r for n, r in found.items() if places.get(n, {}).get("step") == last or n not in places})
    if recipe.select == "best":
        notes.append("best test epoch: chosen on the test part (CrissCross' reporting), optimistic by construction")
    if recipe.select == "validation":
        by = f"the validation part ({held[0]} videos)" if held else "a held-out tenth of training"
        notes.append(f"epoch chosen on {by}, tested once")
    elif held:
        notes.append(f"the validation part ({held[0]} videos) is left out: nothing is chosen by it")
    if published is not None:
        notes.append("published: theirs, on that set in full, with their pre-training and as many frames as their row "
                     "says; not measured here")  # fmt: skip
    return Table(f"fine-tuning in {store.path}", COLUMNS, rows + given, tuple(notes))


def _compared(found: Mapping[str, Mapping[tuple[str, int], Sequence[Tuned]]]) -> list[str]:
    """Paired tests of rows {name: {(part, seed): results of its runs}}: over parts and seeds; of one part and one seed
    over its test videos, or, where kept results do not say which of them were right, what would give a test."""
    against = [n for n in found if n.startswith("from scratch")]
    pairs = {n: [float(np.mean([t.video for t in parts[at]])) for at in sorted(parts)] for n, parts in found.items()}
    if any(len(p) > 1 for p in pairs.values()):
        return paired.lines(pairs, "parts and seeds", against)
    right = {n: [t.right for results in parts.values() for t in results] for n, parts in found.items()}
    silent = [n for n, each in right.items() if not all(each)]
    if not silent:
        return paired.over_videos({n: np.mean(each, 0).tolist() for n, each in right.items()}, against)
    if len(found) < 2 or len(against) == len(found):
        return []
    told = f"no paired test: one part and one seed make one pair, and what is kept of {', '.join(silent)} does not say "
    return [f"{told}which videos were right; --seeds 3 or --folds 5 makes pairs, another --work a test over videos"]


def _pictures(recipe: Recipe) -> str:
    """What a clip's pictures are, for the notes; "" of sound alone."""
    if "v" not in recipe.modality:
        return ""
    return f", {recipe.frames} frames at {recipe.fps} fps{f', {recipe.size} pixels' if recipe.size else ''}"


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


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)
