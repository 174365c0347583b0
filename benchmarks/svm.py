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
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from avstore.errors import UsageError, did_you_mean
from benchmarks import blocks, probing, unseen
from benchmarks.kept import Kept
from benchmarks.probing import Classifier, Outcome, Probed
from benchmarks.squared_hinge import OneVsRest
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# figures of the papers, one SVM on official folds; trained on other and far more media than any run here
PUBLISHED = {
    "ESC-50": {"random forest (Piczak)": 0.443, "AVTS, Kinetics": 0.767, "XDC, Kinetics (S4)": 0.785,
               "Cross-AVID, Kinetics": 0.776, "CrissCross, Kinetics-Sound": 0.828, "CrissCross, AudioSet": 0.905},
    "DCASE": {"AVTS, Kinetics": 0.91, "XDC, Kinetics": 0.91, "CrissCross, Kinetics-400": 0.96},
}  # fmt: skip
Progress = Callable[[str, int, int], None]


def decide(train: np.ndarray, labels: np.ndarray, test: np.ndarray, strengths: Sequence[float]) -> list[np.ndarray]:
    """Decision values (m, K, C) of one-vs-rest linear SVMs, for each strength. Inputs standardised: (t, K', D), labels
    (t,), (m, K, D); classes that training lacks: -inf."""
    machines = OneVsRest(train.reshape(-1, train.shape[-1]), np.repeat(labels, train.shape[1]))
    out: dict[float, np.ndarray] = {}
    for c in sorted(set(strengths)):  # rising: each starts from the one before
        scores = machines.fit(c).decide(test.reshape(-1, test.shape[-1]))
        full = np.full((len(scores), int(labels.max()) + 1), -np.inf)
        full[:, machines.classes] = scores
        out[c] = full.reshape(*test.shape[:2], -1)
    return [out[c] for c in strengths]


def svm(strengths: Sequence[float] = STRENGTHS, fixed: float | None = None, seed: int = 0) -> Classifier:
    """The classifier of `probing.probe`: standardise, choose C by an inner part of training, fit on all of it.

    The inner part: the first of the training folds, or a seeded fifth of each class where there are no folds.
    """
    if fixed is not None and not fixed > 0:
        raise UsageError(f"C = {fixed}", "it must be above 0")

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        c = fixed
        if c is None:
            held = _held_out(labels, inner, seed)
            a, b = probing.standardised(train[~held], train[held])
            accuracy = [
                float((scores.mean(1).argmax(1) == labels[held]).mean())
                for scores in decide(a, labels[~held], b, strengths)
            ]
            c = strengths[int(np.argmax(accuracy))]  # of equals the first, the smallest of `STRENGTHS`
        a, b = probing.standardised(train, test)
        return decide(a, labels, b, [c])[0], f"C {c:g}"

    return classify


def _held_out(labels: np.ndarray, inner: np.ndarray | None, seed: int) -> np.ndarray:
    if inner is not None and len(set(inner.tolist())) > 1:
        for fold in sorted(set(inner.tolist())):
            held = inner == fold
            if set(labels[held].tolist()) <= set(labels[~held].tolist()):
                return held
    from benchmarks.rank import folds

    return folds([str(i) for i in range(len(labels))], labels.tolist(), 5, seed) == 0


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
        accuracy = [float((s.mean(1).argmax(1) == probed.labels[part.test]).mean()) for s in scores]
        best = int(np.argmax(accuracy))
        out.append(Outcome(part.name, accuracy[best], f"C {strengths[best]:g}"))
    return out


def classical(store: Store, probed: Probed, seed: int = 0) -> list[Outcome]:
    """A control from before networks: a random forest on the mean and deviation of MFCCs and of zero crossings."""
    x = mfcc(store, probed.numbers)
    out = []
    for part in probed.parts:
        model = RandomForestClassifier(500, random_state=seed)
        model.fit(x[part.train], probed.labels[part.train])
        accuracy = float((model.predict(x[part.test]) == probed.labels[part.test]).mean())
        out.append(Outcome(part.name, accuracy, "500 trees"))
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
            raise UsageError(f"no block {name!r}", did_you_mean(name, blocks.SOUND_GRIDS))
    if published is not None and published not in PUBLISHED:
        raise UsageError(f"no published figures of {published!r}", did_you_mean(published, PUBLISHED))
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
        setting = {"strengths": list(strengths), "fixed": fixed, "augment": augment, "parts": _digest(mine)}
        for block, value in x.items():
            progress(f"{name} {block}", 0, 1)
            one, other = {**key, **setting, "block": block}, learn.get(block)
            found.setdefault((name, block), []).append(
                _kept(kept, one, functools.partial(probing.probe, value, mine, svm(strengths, fixed), other))
            )
            if with_oracle:
                best.setdefault((name, block), []).append(
                    _kept(kept, {**one, "oracle": True}, functools.partial(oracle, value, mine, strengths, other))
                )

    for run, name, parts in zip(runs, names, asked, strict=True):
        add(name, blocks.with_weights(run, checkpoint), run, parts)
    for run in {blocks.same_networks(r, "a"): r for r in reversed(runs)}.values():
        for seed in range(seeds):
            add("random weights", blocks.with_weights(run, "random", seed), run, probed.parts)
    rows = [probing.row(name, block, unseen.whole(o, probed)) for (name, block), o in found.items()]
    rows += [
        probing.row(f"{name}, C chosen on the test part", block, unseen.whole(o, probed))
        for (name, block), o in best.items()
    ]
    if controls:
        progress("raw spectrogram", 0, 1)
        raw = blocks.raw_sound(store, probed.numbers, clips=clips)
        rows.append(probing.row("raw spectrogram", "", [probing.probe(raw, probed, svm(strengths, fixed))]))
        rows.append(probing.row("MFCC, zero crossings, random forest", "", [classical(store, probed)]))
    rows.append(probing.row("commonest class", "", [probing.chance(probed)]))
    if published is not None:
        rows += probing.by_name(PUBLISHED[published])
    return probing.table(
        f"linear SVM on sound, {store.path}",
        rows,
        probed,
        (f"{clips} clips of a recording, decision values averaged; C "
         + (f"{fixed:g}" if fixed is not None else "chosen within the training part")
         + ("; training clips at random places with random loudness" if augment else ""), *notes),
        list(dict.fromkeys(names)),
    )  # fmt: skip


def _kept(kept: Kept, key: dict[str, Any], make: Callable[[], list[Outcome]]) -> list[Outcome]:
    return [Outcome(*o) for o in kept.value(key, lambda: [dataclasses.astuple(o) for o in make()])]


def _digest(probed: Probed) -> str:
    h = hashlib.sha256(np.ascontiguousarray(probed.labels, "<i8").tobytes())
    for part in probed.parts:
        h.update(part.name.encode())
        for x in (*part.learned_on(), part.test):
            h.update(b"none" if x is None else np.ascontiguousarray(x, "<i8").tobytes())
    return h.hexdigest()[:16]
