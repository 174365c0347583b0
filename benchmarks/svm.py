"""`avstore bench svm`: one-vs-rest linear SVMs on frozen sound features (ESC-50, ESC-10, DCASE).

AVID's protocol as recovered from its authors' history (methods.md 6.4): maps conv2x ... conv5x averaged to 12, 8, 6, 4
cells a side, standardised, linear SVM with squared hinge, decision values of 10 clips averaged, official folds (one
split for DCASE). Recordings are tiled, as there. AVID stops its SVMs (LinearSVC) after 200 iterations; here they are
solved to their optimum (`squared_hinge.py`), which is faster than those iterations.

C: chosen on an inner fold of the training part, the same for all blocks of one grid of C (default). `--oracle` adds the
C that is best on the test part, labelled, which is how CrissCross' code picks it; AVID fixes C = 10 (ESC), 1 (DCASE).
Declared: training clips are the evenly spaced ones of testing; `--augment` takes as many at random places with random
loudness instead. AVID also changes the speed of training recordings; that is left out here.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from avstore.errors import UsageError, did_you_mean
from benchmarks import blocks, probing, unseen
from benchmarks import published as published_figures
from benchmarks.kept import Kept
from benchmarks.probing import Classifier, Outcome, Probed
from benchmarks.squared_hinge import OneVsRest, fits, needed
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FIFTH = 5  # 1 / share of training that chooses C where no fold is marked
UNCHOSEN = 1e-2  # where a class has one training video, so that none can be spared to choose with
FORESTS = 3
PUBLISHED = published_figures.names("svm")
Progress = Callable[[str, int, int], None]


def decide(train: np.ndarray, labels: np.ndarray, test: np.ndarray, strengths: Sequence[float]) -> list[np.ndarray]:
    """Decision values (m, K, C) of one-vs-rest linear SVMs, for each strength. Inputs standardised: (t, K', D), labels
    (t,), (m, K, D); classes that training lacks: -inf. Where the memory is too small for the exact machines: those of
    `LinearSVC` within AVID's 200 iterations (`told_of` says so)."""
    x, y = train.reshape(-1, train.shape[-1]), np.repeat(labels, train.shape[1])
    machines: Any = OneVsRest(x, y) if fits(*x.shape) else _Iterated(x, y)
    out: dict[float, np.ndarray] = {}
    for c in sorted(set(strengths)):  # rising: each starts from the one before
        scores = machines.fit(c).decide(test.reshape(-1, test.shape[-1]))
        full = np.full((len(scores), int(labels.max()) + 1), -np.inf)
        full[:, machines.classes] = scores
        out[c] = full.reshape(*test.shape[:2], -1)
    return [out[c] for c in strengths]


def told_of(train: np.ndarray) -> str:
    """What the setting says of the solver, beside C. train: (t, K', D)."""
    n, d = train.shape[0] * train.shape[1], train.shape[2]
    return "" if fits(n, d) else f", LinearSVC of 200 iterations: exact ones need {needed(n, d) / 2**30:.1f} GiB"


class _Iterated:
    """scikit-learn's LinearSVC behind the methods of `OneVsRest`, with AVID's limit of iterations."""

    def __init__(self, x: np.ndarray, labels: np.ndarray) -> None:
        self.x, self.labels, self.classes = x, labels, np.unique(labels)

    def fit(self, c: float) -> _Iterated:
        model = LinearSVC(C=c, loss="squared_hinge", dual="auto", max_iter=200, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model = model.fit(self.x, self.labels)
        return self

    def decide(self, test: np.ndarray) -> np.ndarray:
        scores = self.model.decision_function(test)
        return scores if scores.ndim == 2 else np.stack([-scores, scores], 1)


def svm(strengths: Sequence[float] = STRENGTHS, fixed: float | None = None, seed: int = 0) -> Classifier:
    """The classifier of `probing.probe`: standardise, choose C by an inner part of training (`probing.held_out`: a
    training fold, a validation part, or a seeded fifth of each class), fit on all of it."""
    if fixed is not None and not fixed > 0:
        raise UsageError(f"C = {fixed}", "it must be above 0", "--c 1, or leave --c away")

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        c = fixed
        if c is None:
            held = probing.held_out(labels, inner, FIFTH, seed)
            c = UNCHOSEN
            if held is not None:
                a, b = probing.standardised(train[~held], train[held])
                accuracy = [
                    float((scores.mean(1).argmax(1) == labels[held]).mean())
                    for scores in decide(a, labels[~held], b, strengths)
                ]
                c = strengths[int(np.argmax(accuracy))]  # of equals the first, the smallest of `STRENGTHS`
        a, b = probing.standardised(train, test)
        return decide(a, labels, b, [c])[0], f"C {c:g}{told_of(train)}"

    return classify


def oracle(x: np.ndarray, probed: Probed, strengths: Sequence[float], train_x: np.ndarray | None) -> list[Outcome]:
    """The best strength for each test part, chosen on it: what a leak is worth."""
    tried: list[list[np.ndarray]] = []

    def every(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        a, b = probing.standardised(train, test)
        tried.append(decide(a, labels, b, strengths))
        return tried[-1][0], ""

    probing.probe(x, probed, every, train_x)
    out = []
    for part, scores in zip(probed.parts, tried, strict=True):
        each = [probing.scored(part, s.mean(1).argmax(1), probed.labels) for s in scores]
        best = int(np.argmax([o.accuracy for o in each]))
        told = told_of((x if train_x is None else train_x)[part.learned_on()[0]])
        out.append(dataclasses.replace(each[best], setting=f"C {strengths[best]:g}{told}"))
    return out


def classical(x: np.ndarray, probed: Probed, seed: int = 0) -> list[Outcome]:
    """A control from before networks: a random forest on the mean and deviation of MFCCs and of zero crossings, x:
    those of `mfcc`."""
    out = []
    for part in probed.parts:
        model = RandomForestClassifier(500, random_state=seed)
        model.fit(x[part.train], probed.labels[part.train])
        out.append(probing.scored(part, model.predict(x[part.test]), probed.labels, "500 trees"))
    return out


def mfcc(store: Store, numbers: np.ndarray) -> np.ndarray:
    """float64 (n, 28): mean and deviation over time of 13 MFCCs (DCT-II of the 80 log-mel bins) and of the rate of zero
    crossings in 1024 samples."""
    import torch
    from scipy.fft import dct

    from avstore.frontends import spectrogram

    rows = []
    for number in numbers.tolist():
        wave, _ = store.waveform(number)
        if not store.has_sound[number] or len(wave) < 2048:
            wave = np.pad(wave, (0, max(0, 2048 - len(wave))))
        x = torch.from_numpy(wave.astype(np.float32) / 32768)[None]
        cepstrum = dct(spectrogram(x, "crisscross-mel80", store.spec.sample_rate)[0].double().numpy(), norm="ortho")
        frames = wave[: len(wave) // 1024 * 1024].reshape(-1, 1024) >= 0
        crossings = (frames[:, 1:] != frames[:, :-1]).mean(1)
        rows.append(
            np.concatenate([cepstrum[:, :13].mean(0), cepstrum[:, :13].std(0), [crossings.mean(), crossings.std()]])
        )
    return np.stack(rows)


def bench(
    store: Store,
    runs: Sequence[Run],
    *,
    clips: int = 10,
    only: Sequence[str] = (),
    seeds: int = 1,
    fixed: float | None = None,
    strengths: Sequence[float] = STRENGTHS,
    with_oracle: bool = False,
    augment: bool = False,
    checkpoint: str | int = "latest",
    controls: bool = True,
    published: str | None = None,
    work: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    **choice: Any,
) -> Table:
    """The table of `bench svm`. Runs of one method that differ in their seed alone: one row, mean over them; each is
    asked the parts that it was not pre-trained on (`unseen.py`). seeds: random networks to compare with. only: blocks.
    work: a folder in which features and accuracies are kept, so that a repeated command goes on where it stopped.
    UsageError, ConflictError as `probing.choose`, `unseen.plan`, `blocks.trunk`."""
    grids = {k: v for k, v in blocks.SOUND_GRIDS.items() if not only or k in only}
    for name in only:
        if name not in blocks.SOUND_GRIDS:
            raise UsageError(f"no block {name!r}", did_you_mean(name, blocks.SOUND_GRIDS), "--block conv5x")
    theirs = published_figures.rows("svm", published) if published is not None else []
    if clips < 1 or seeds < 0:
        raise UsageError(f"{clips} clips, {seeds} seeds", "at least 1 and 0")
    names = probing.names(runs)
    probed, asked, notes = unseen.plan(store, runs, names, probing.choose(store, modality="a", **choice))
    kept = Kept(work)
    found: dict[tuple[str, str], list[list[Outcome]]] = {}
    best: dict[tuple[str, str], list[list[Outcome]]] = {}

    def add(name: str, method: Any, run: Run, parts: tuple[probing.Part, ...]) -> None:
        def say(done: int, total: int) -> None:
            progress(name, done, total)

        mine = dataclasses.replace(probed, parts=parts)
        how: dict[str, Any] = {"clips": clips, "grids": grids}
        key = blocks.key_of(method, run, store, probed.numbers, modality="a", **how)
        of = (method, run, store, probed.numbers)
        x = kept.arrays(key, lambda: blocks.sound_blocks(*of, device=device, progress=say, **how))
        learn: dict[str, np.ndarray] = {}
        if augment:
            learn = kept.arrays(
                {**key, "augment": 0}, lambda: blocks.sound_blocks(*of, augment_seed=0, device=device, **how)
            )
        setting = {"strengths": list(strengths), "fixed": fixed, "augment": augment, "parts": probing.digest(mine)}
        for block, value in x.items():
            progress(f"{name} {block}", 0, 1)
            one, other = {**key, **setting, "block": block}, learn.get(block)
            made = functools.partial(probing.probe, value, mine, svm(strengths, fixed), other)
            found.setdefault((name, block), []).append(probing.kept_outcomes(kept, one, made))
            if with_oracle:
                leaking = functools.partial(oracle, value, mine, strengths, other)
                best.setdefault((name, block), []).append(probing.kept_outcomes(kept, {**one, "oracle": True}, leaking))

    for run, name, parts in zip(runs, names, asked, strict=True):
        add(name, blocks.with_weights(run, checkpoint), run, parts)
    for run in {blocks.same_networks(r, "a"): r for r in reversed(runs)}.values():
        for seed in range(seeds):
            add("random weights", blocks.with_weights(run, "random", seed), run, probed.parts)
    rows = [probing.row(name, block, unseen.whole(o, probed)) for (name, block), o in found.items()]
    most = probing.best_blocks(rows)
    rows += most
    rows += [
        probing.row(f"{name}, C chosen on the test part", block, unseen.whole(o, probed))
        for (name, block), o in best.items()
    ]
    if controls:
        progress("raw spectrogram", 0, 1)
        raw = blocks.raw_sound(store, probed.numbers, clips=clips)
        rows.append(probing.row("raw spectrogram", "", [probing.probe(raw, probed, svm(strengths, fixed))]))
        x = mfcc(store, probed.numbers)
        forests = [classical(x, probed, seed) for seed in range(FORESTS)]
        rows.append(probing.row("MFCC, zero crossings, random forest", "", forests))
    rows.append(probing.row("commonest class", "", [probing.chance(probed)]))
    rows += theirs
    return probing.table(
        f"linear SVM on sound, {store.path}",
        rows,
        probed,
        (f"{clips} clips of a recording, decision values averaged; C "
         + (f"{fixed:g}" if fixed is not None else "chosen within the training part")
         + ("; training clips at random places with random loudness" if augment else ""),
         *([probing.BEST] if most else []), *notes),
        list(dict.fromkeys(names)),
    )  # fmt: skip
