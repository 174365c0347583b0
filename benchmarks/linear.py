"""`avstore bench linear`: linear probes on frozen features of sight, sound and both.

For one modality, AVID's probe: each of conv2x ... conv5x pooled by maximum to 12, 8, 6, 4 cells a side (sound: by
mean), batch normalisation, one linear layer, Adam. The backbone stays in eval mode; AVID's code leaves it in train
mode, where its statistics move with the probe's training videos: `--train-mode` (`train_mode.py`) shows what that is
worth. Declared: the layer learns on the evenly spaced centre crops of testing, the same in each epoch; AVID draws
random augmented clips. `--schedule ablation` is that of AVID's ablations (20 epochs, 25 clips).

`--modality av` (Kinetics-Sound of the CrissCross poster, its code is not public): pooled features of sight and sound
side by side, each standardised on training; L2 logistic regression, its strength chosen on an inner fold, a validation
part or a held-out tenth of training; the same for a and v alone, so that the three numbers compare (declared: the paper
does not say). `--classifier svm --frames 8` (UCF101, HMDB51 of the poster): one-vs-rest linear SVMs on the same pooled
features, averaged over clips.

`--shots k`: k training videos of each class, several draws of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from avstore.errors import UsageError, did_you_mean
from benchmarks import blocks, probing, unseen
from benchmarks import published as published_figures
from benchmarks.classifiers import SCHEDULES, STRENGTHS, Schedule, adam, averaged, logistic
from benchmarks.kept import Kept
from benchmarks.probing import Classifier, Outcome, Part, Probed
from benchmarks.svm import STRENGTHS as SVM_STRENGTHS
from benchmarks.svm import svm
from benchmarks.table import Table
from benchmarks.train_mode import moved_features

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

POOLED = {"conv5x": 1}
CLASSIFIERS = ("adam", "logistic", "svm")
SHOT_DRAWS = 5
PUBLISHED = published_figures.names("linear")
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `bench` is asked to do. classifier: "" is the modality's own (adam, with av logistic). clips, epochs, rate:
    None is the schedule's. frames: of a clip of pictures, None is the run's. UsageError for what does not go together.
    """

    modality: Literal["a", "v", "av"] = "v"
    classifier: str = ""
    schedule: str = "kinetics"
    clips: int | None = None
    epochs: int | None = None
    rate: float | None = None
    frames: int | None = None
    only: tuple[str, ...] = ()
    shots: int | None = None
    shot_draws: int = SHOT_DRAWS
    repeats: int = 1
    train_mode: bool = False

    def __post_init__(self) -> None:
        for value, there, option in (
            (self.modality, ("a", "v", "av"), "modality"),
            (self.classifier, ("", *CLASSIFIERS), "classifier"),
            (self.schedule, tuple(SCHEDULES), "schedule"),
            *((name, tuple(blocks.PICTURE_GRIDS), "block") for name in self.only),
        ):
            if value not in there:
                known = [t for t in there if t]
                raise UsageError(f"no {option} {value!r}", did_you_mean(value, known), f"--{option} {known[-1]}")
        for number, what in ((self.clips, "clips"), (self.frames, "frames"), (self.shot_draws, "shot-draws"),
                             (self.repeats, "repeats")):  # fmt: skip
            if number is not None and number < 1:
                raise UsageError(f"{number} {what}", "at least 1", f"--{what} 1")
        if self.frames is not None and "v" not in self.modality:
            raise UsageError("--frames of sound", "it is the length of a clip of pictures", "--modality v")
        if self.named == "adam" and self.modality == "av":
            raise UsageError("--classifier adam of sight and sound together", "it learns one map", "--modality a or v")
        if self.named != "adam":
            wrong = [o for o, on in (("--repeats", self.repeats > 1), ("--train-mode", self.train_mode),
                                     ("--epochs", self.epochs is not None), ("--rate", self.rate is not None),
                                     ("--schedule", self.schedule != "kinetics"),
                                     ("--block", bool(set(self.only) - set(POOLED)))) if on]  # fmt: skip
            if wrong:
                raise UsageError(f"{wrong[0]} with {self.named}", "it belongs to the layer that Adam trains",
                                 "--classifier adam")  # fmt: skip
        if self.train_mode and self.modality != "v":
            raise UsageError("--train-mode of sound", "what was published so are probes of pictures", "--modality v")
        _ = self.adam  # its own numbers

    @property
    def named(self) -> str:
        return self.classifier or ("logistic" if self.modality == "av" else "adam")

    @property
    def adam(self) -> Schedule:
        of = SCHEDULES[self.schedule]
        of = of if self.epochs is None else of.shortened(self.epochs)
        rate = of.rate if self.rate is None else self.rate
        return dataclasses.replace(of, rate=rate, clips=self.clips or of.clips)

    @property
    def grids(self) -> Mapping[str, int]:
        if self.named != "adam":
            return POOLED
        return {k: v for k, v in blocks.PICTURE_GRIDS.items() if not self.only or k in self.only}

    def classifiers(self) -> list[Classifier]:
        """One for each repetition."""
        if self.named == "svm":
            return [averaged(svm())]
        return [logistic()] if self.named == "logistic" else [adam(self.adam, s) for s in range(self.repeats)]

    def learned(self) -> dict[str, Any]:
        """All that decides what is learned from given features, but for the seed of a repetition."""
        if self.named == "adam":
            return {"classifier": "adam", **dataclasses.asdict(self.adam)}
        return {"classifier": self.named, "strengths": list(STRENGTHS if self.named == "logistic" else SVM_STRENGTHS)}

    def pooling(self, modality: str) -> Literal["avg", "max"]:
        return "max" if self.named == "adam" and modality == "v" else "avg"

    def told(self) -> list[str]:
        """How it was done, for the table."""
        of = self.adam
        layer = {
            "adam": f"BatchNorm and Linear, Adam {of.rate:g} x {of.decay:g} after epochs "
                    f"{', '.join(map(str, of.milestones))} of {of.epochs}; it learns on the same evenly spaced centre "
                    "crops (AVID: random augmented clips)",
            "logistic": "L2 logistic regression on the mean over clips of conv5x averaged, standardised",
            "svm": "one-vs-rest linear SVM on the mean over clips of conv5x averaged, standardised",
        }[self.named]  # fmt: skip
        frames = f" of {self.frames} frames" if self.frames else ""
        out = [f"{of.clips} clips{frames} of a video; {layer}; raw features: logistic regression"]
        if self.named == "adam":
            out.append("class probabilities averaged over clips")
        if self.train_mode:
            out.append("backbone in train mode, as published: its statistics move with the probe's training videos")
        if self.shots is not None:
            out.append(f"{self.shot_draws} draws of {self.shots} training videos of each class")
        return out


def bench(
    store: Store,
    runs: Sequence[Run],
    *,
    seeds: int = 1,
    checkpoint: str | int = "latest",
    controls: bool = True,
    published: str | None = None,
    work: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    modality: Literal["a", "v", "av"] = "v",
    classifier: str = "",
    schedule: str = "kinetics",
    clips: int | None = None,
    epochs: int | None = None,
    rate: float | None = None,
    frames: int | None = None,
    only: Sequence[str] = (),
    shots: int | None = None,
    shot_draws: int = SHOT_DRAWS,
    repeats: int = 1,
    train_mode: bool = False,
    **choice: Any,
) -> Table:
    """The table of `bench linear`. One row for each method and block (av: for a, v and both), beside random networks of
    `seeds` seeds, raw pixels or spectrograms, and the commonest class. Runs of one method that differ in their seed
    alone are one row; each is asked the parts that it was not pre-trained on (`unseen.py`). work: a folder in which
    features (for other labels too) and accuracies are kept, so that a repeated command goes on where it stopped. The
    rest: see `Asked`."""
    asked = Asked(modality, classifier, schedule, clips, epochs, rate, frames, tuple(only), shots, shot_draws, repeats,
                  train_mode)  # fmt: skip
    if seeds < 0:
        raise UsageError(f"{seeds} seeds", "0 or more", "--seeds 1")
    theirs: list[dict[str, Any]] = []
    if published is not None:
        theirs = published_figures.rows("linear", published, classifier=asked.named, frames=frames, modality=modality)
    names = probing.names(runs)
    probed, parts_of, notes = unseen.plan(store, runs, names, probing.choose(store, modality=modality, **choice))
    draws = [probed] if shots is None else [probing.few_shot(probed, shots, d) for d in range(shot_draws)]
    found: dict[tuple[str, str], list[list[Outcome]]] = {}
    kept = Kept(work)
    features = _Features(store, probed, asked, kept, device, progress)

    def add(name: str, method: nn.Module, run: Run, parts: Sequence[Part]) -> None:
        key = {**features.key(method, run), "learned": asked.learned()}
        for drawn in draws:
            mine = [p for p in drawn.parts if p.name in {q.name for q in parts}]
            for block, sets in features.of(name, method, run, drawn, mine):
                for repeat, learner in enumerate(asked.classifiers()):
                    one = []
                    for part, (x, learn) in zip(mine, sets, strict=True):
                        alone = dataclasses.replace(drawn, parts=(part,))
                        at = {**key, "block": block, "repeat": repeat, "part": probing.digest(alone)}
                        one += probing.kept_outcomes(kept, at, partial(probing.probe, x, alone, learner, learn))
                    found.setdefault((name, block), []).append(one)

    for run, name, parts in zip(runs, names, parts_of, strict=True):
        add(name, blocks.with_weights(run, checkpoint), run, parts)
    for run in {blocks.same_networks(r, modality): r for r in reversed(runs)}.values():
        for seed in range(seeds):
            add("random weights", blocks.with_weights(run, "random", seed), run, probed.parts)
    rows = [probing.row(name, block, unseen.whole(o, probed)) for (name, block), o in found.items()]
    most = probing.best_blocks(rows) if modality != "av" else []  # its blocks are a, v, a + v
    rows += most
    if controls:
        raw = {}
        if "a" in modality:
            raw["raw spectrogram"] = blocks.raw_sound(store, probed.numbers, clips=asked.adam.clips)
        if "v" in modality:
            raw["raw pixels and their change"] = blocks.raw_pictures(store, probed.numbers, clips=asked.adam.clips)
        rows += [probing.row(n, "", [probing.probe(x, d, logistic()) for d in draws]) for n, x in raw.items()]
    rows.append(probing.row("commonest class", "", [probing.chance(d) for d in draws]))
    title = f"linear probes of {modality}, {store.path}"
    told = (*asked.told(), *([probing.BEST] if most else []), *notes)
    return probing.table(title, [*rows, *theirs], probed, told, list(dict.fromkeys(names)))


class _Features:
    """The features of networks, kept by what decides them."""

    def __init__(self, store: Store, probed: Probed, asked: Asked, kept: Kept, device: str, progress: Progress) -> None:
        self.store, self.numbers, self.asked, self.kept = store, probed.numbers, asked, kept
        self.device, self.progress = device, progress
        self.seen: tuple[object, dict[str, np.ndarray]] | None = None  # the last networks' features

    def key(self, method: nn.Module, run: Run) -> dict[str, Any]:
        """What decides the features of a network, for accuracies that are kept."""
        asked = self.asked
        moved = asked.adam.epochs if asked.train_mode else 0
        how = {m: {**self._how(m), "grids": dict(asked.grids)} for m in asked.modality}
        return blocks.key_of(method, run, self.store, self.numbers, modality=asked.modality, moved=moved, how=how)

    def of(
        self, name: str, method: nn.Module, run: Run, probed: Probed, parts: Sequence[Part]
    ) -> list[tuple[str, list[tuple[np.ndarray, np.ndarray | None]]]]:
        """(block, for each part (features, those to train on where they differ)), float32 (n, K, D)."""
        if self.asked.train_mode:
            moved = [self._moved(name, method, run, p) for p in parts]
            return [(b, [(asked[b], learn[b]) for learn, asked in moved]) for b in self.asked.grids]
        if self.seen is None or self.seen[0] is not method:
            self.seen = (method, self._still(name, method, run))
        return [(b, [(x, None)] * len(parts)) for b, x in self.seen[1].items()]

    def _still(self, name: str, method: nn.Module, run: Run) -> dict[str, np.ndarray]:
        asked, x = self.asked, dict[str, dict[str, np.ndarray]]()
        each: tuple[tuple[Literal["a", "v"], Any], ...] = (("a", blocks.sound_blocks), ("v", blocks.picture_blocks))
        for m, make in each:
            if m in asked.modality:
                how = self._how(m)
                key = blocks.key_of(method, run, self.store, self.numbers, modality=m, train_mode=False, **how)

                def computed(m: str = m, make: Any = make, how: dict[str, Any] = how) -> Mapping[str, np.ndarray]:
                    return make(method, run, self.store, self.numbers, device=self.device,
                                progress=self._say(f"{name} {m}"), **how)  # fmt: skip

                x[m] = self.kept.arrays(key, computed)
        if asked.modality != "av":
            return x[asked.modality]
        alone: dict[str, np.ndarray] = {m: found["conv5x"] for m, found in x.items()}
        return {**alone, "a + v": np.concatenate([alone["v"], alone["a"]], 2)}

    def _moved(self, name: str, method: nn.Module, run: Run, part: Part) -> tuple[dict[str, np.ndarray], ...]:
        asked, how = self.asked, self._how("v")
        order = np.concatenate([part.learned_on()[0], [-1], part.test]).astype("<i8")
        key = blocks.key_of(method, run, self.store, self.numbers, modality="v", train_mode=asked.adam.epochs,
                            part=hashlib.sha256(order.tobytes()).hexdigest()[:16], **how)  # fmt: skip

        def computed() -> Mapping[str, np.ndarray]:
            learn, test = moved_features(
                method, run, self.store, self.numbers, part, epochs=asked.adam.epochs, device=self.device,
                progress=self._say(f"{name} {part.name}"), **how,
            )  # fmt: skip
            return {f"{kind} {b}": x for kind, found in (("learn", learn), ("test", test)) for b, x in found.items()}

        found = self.kept.arrays(key, computed)
        return tuple({b: found[f"{kind} {b}"] for b in asked.grids} for kind in ("learn", "test"))

    def _how(self, modality: str) -> dict[str, Any]:
        asked = self.asked
        how: dict[str, Any] = {"clips": asked.adam.clips, "grids": asked.grids, "how": asked.pooling(modality)}
        return how | ({"frames": asked.frames} if modality == "v" and asked.frames else {})

    def _say(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total)


__all__ = ["CLASSIFIERS", "PUBLISHED", "SCHEDULES", "SHOT_DRAWS", "STRENGTHS", "Asked", "adam", "bench", "logistic"]
