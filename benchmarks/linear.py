"""`avstore bench linear`: linear probes on frozen features of sight, sound and both.

For one modality, AVID's probe: each of conv2x ... conv5x pooled by maximum to 12, 8, 6, 4 cells a side (sound: by
mean), batch normalisation, one linear layer, Adam. The backbone stays in eval mode; AVID's code leaves it in train
mode, where statistics of the probe's videos move into the frozen network: `--train-mode` shows what that is worth.

`--modality av` (Kinetics-Sound of the CrissCross poster, its code is not public): pooled features of sight and sound
side by side, each standardised on training; L2 logistic regression, its strength chosen on a held-out tenth of
training; the same for a and v alone, so that the three numbers compare (declared: the paper does not say).

`--shots k`: k training videos of each class.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from benchmarks import blocks, probing, unseen
from benchmarks.kept import Kept
from benchmarks.probing import Classifier, Outcome
from benchmarks.rank import folds
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

EPOCHS, BATCH, RATE = 12, 128, 1e-4  # [C] AVID on Kinetics: divided by 10 after epochs 6 and 9
MILESTONES = (0.5, 0.75)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
POOLED = {"conv5x": 1}
Progress = Callable[[str, int, int], None]
# top-1 on frozen features as the papers print them, for --published
PUBLISHED = {
    "UCF101": {"CrissCross, Kinetics-Sound": 0.781, "CrissCross, Kinetics-400": 0.839, "CrissCross, AudioSet": 0.877},
    "HMDB51": {"CrissCross, Kinetics-Sound": 0.457, "CrissCross, Kinetics-400": 0.500, "CrissCross, AudioSet": 0.562},
    "Kinetics-400": {"AVID, Kinetics": 0.430, "AVID-CMA, Kinetics": 0.444, "AVID, AudioSet": 0.465,
                     "AVID-CMA, AudioSet": 0.489, "CrissCross, AudioSet": 0.501},
}  # fmt: skip


def adam(epochs: int = EPOCHS, rate: float = RATE, batch: int = BATCH, seed: int = 0) -> Classifier:
    """AVID's probe: BatchNorm1d (running statistics at test), Linear, Adam; every clip is a training example."""
    if epochs < 1 or batch < 2 or not rate > 0:
        raise UsageError(f"{epochs} epochs of batches of {batch} at {rate}", "1, 2 and above 0 at least")

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        x = torch.from_numpy(train.reshape(-1, train.shape[-1]))
        y = torch.from_numpy(np.repeat(labels, train.shape[1]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.BatchNorm1d(x.shape[1]), nn.Linear(x.shape[1], int(y.max()) + 1))
            optimiser = torch.optim.Adam(net.parameters(), lr=rate)
            for epoch in range(epochs):
                for group in optimiser.param_groups:
                    group["lr"] = rate * 0.1 ** sum(epoch >= m * epochs for m in MILESTONES)
                order = torch.randperm(len(x))
                for at in range(0, len(x), batch):
                    rows = order[at : at + batch]
                    if len(rows) < 2:  # batch statistics of one clip do not exist
                        continue
                    optimiser.zero_grad(set_to_none=True)
                    F.cross_entropy(net(x[rows]), y[rows]).backward()
                    optimiser.step()
        net.eval()
        with torch.no_grad():
            scores = net(torch.from_numpy(test.reshape(-1, test.shape[-1]))).softmax(1)
        return scores.numpy().reshape(*test.shape[:2], -1), f"{epochs} epochs"

    return classify


def logistic(strengths: Sequence[float] = STRENGTHS, seed: int = 0) -> Classifier:
    """L2 logistic regression on the mean over a video's clips, standardised; strength by a held-out tenth of training
    (of each class), then fitted on all of it. The scores are one per video: (m, 1, C)."""

    def fit(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=c, max_iter=500).fit(x, y)

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        a, b = probing.standardised(train.mean(1, keepdims=True), test.mean(1, keepdims=True))
        a, b = a[:, 0], b[:, 0]
        smallest = int(np.bincount(labels)[np.unique(labels)].min())
        c = 1.0
        if smallest >= 2:
            held = folds([str(i) for i in range(len(labels))], labels.tolist(), min(10, smallest), seed) == 0
            accuracy = [float((fit(a[~held], labels[~held], s).predict(a[held]) == labels[held]).mean())
                        for s in strengths]  # fmt: skip
            c = strengths[int(np.argmax(accuracy))]
        model = fit(a, labels, c)
        scores = np.zeros((len(b), int(labels.max()) + 1))
        scores[:, model.classes_] = model.predict_proba(b)
        return scores[:, None], f"C {c:g}"

    return classify


def bench(
    store: Store,
    runs: Sequence[Run],
    *,
    modality: Literal["a", "v", "av"] = "v",
    clips: int = 10,
    only: Sequence[str] = (),
    shots: int | None = None,
    seeds: int = 1,
    epochs: int = EPOCHS,
    rate: float = RATE,
    checkpoint: str | int = "latest",
    train_mode: bool = False,
    controls: bool = True,
    published: str | None = None,
    work: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    **choice: Any,
) -> Table:
    """The table of `bench linear`. One row for each method and block (av: for a, v and both), beside random networks of
    `seeds` seeds, raw pixels or spectrograms, and the commonest class. Runs of one method that differ in their seed
    alone are one row; each is asked the parts that it was not pre-trained on (`unseen.py`). work: a folder in which
    features are kept: what is there is not computed again, for other labels neither."""
    if modality not in ("a", "v", "av"):
        raise UsageError(f"no modality {modality!r}", did_you_mean(modality, ("a", "v", "av")))
    if published is not None and published not in PUBLISHED:
        raise UsageError(f"no published figures of {published!r}", did_you_mean(published, PUBLISHED))
    known = blocks.PICTURE_GRIDS
    for name in only:
        if name not in known:
            raise UsageError(f"no block {name!r}", did_you_mean(name, known))
    if clips < 1 or seeds < 0:
        raise UsageError(f"{clips} clips, {seeds} seeds", "at least 1 and 0")
    names = probing.names(runs)
    probed, asked, notes = unseen.plan(store, runs, names, probing.choose(store, modality=modality, **choice))
    if shots is not None:
        probed = probing.few_shot(probed, shots)
    at = {p.name: p for p in probed.parts}
    grids = POOLED if modality == "av" else {k: v for k, v in known.items() if not only or k in only}
    found: dict[tuple[str, str], list[list[Outcome]]] = {}
    kept = Kept(work)
    classifier = logistic() if modality == "av" else adam(epochs, rate)

    def add(name: str, method: nn.Module, run: Run, parts: Sequence[probing.Part]) -> None:
        x: dict[str, dict[str, np.ndarray]] = {}
        each_of: tuple[tuple[Literal["a", "v"], Any], ...] = (("a", blocks.sound_blocks), ("v", blocks.picture_blocks))
        for m, make in each_of:
            if m in modality:

                def say(done: int, total: int, which: str = m) -> None:
                    progress(f"{name} {which}", done, total)

                how: Literal["avg", "max"] = "avg" if modality == "av" or m == "a" else "max"
                key = blocks.key_of(method, run, store, probed.numbers, modality=m, clips=clips, grids=grids, how=how,
                                    train_mode=train_mode)  # fmt: skip

                def computed(
                    m: Literal["a", "v"] = m, make: Any = make, how: str = how, say: Any = say
                ) -> Mapping[str, np.ndarray]:
                    with _Statistics(method, blocks.trunk(method, m), train_mode):
                        return make(method, run, store, probed.numbers, clips=clips, grids=grids, how=how,
                                    device=device, progress=say)  # fmt: skip

                x[m] = kept.arrays(key, computed)
        if modality == "av":
            each = {m: v["conv5x"] for m, v in x.items()}
            sets = {**each, "a + v": np.concatenate([each["v"], each["a"]], 2)}
        else:
            sets = x[modality]
        for block, value in sets.items():
            mine = dataclasses.replace(probed, parts=tuple(at[p.name] for p in parts))
            found.setdefault((name, block), []).append(probing.probe(value, mine, classifier))

    for run, name, parts in zip(runs, names, asked, strict=True):
        add(name, blocks.with_weights(run, checkpoint), run, parts)
    for run in {blocks.same_networks(r, modality): r for r in reversed(runs)}.values():
        for seed in range(seeds):
            add("random weights", blocks.with_weights(run, "random", seed), run, probed.parts)
    rows = [probing.row(name, block, unseen.whole(o, probed)) for (name, block), o in found.items()]
    if controls:
        raw = {}
        if "a" in modality:
            raw["raw spectrogram"] = blocks.raw_sound(store, probed.numbers, clips=clips)
        if "v" in modality:
            raw["raw pixels and their change"] = blocks.raw_pictures(store, probed.numbers, clips=clips)
        rows += [probing.row(n, "", [probing.probe(value, probed, logistic())]) for n, value in raw.items()]
    rows.append(probing.row("commonest class", "", [probing.chance(probed)]))
    if published is not None:
        rows += probing.by_name(PUBLISHED[published])
    return probing.table(
        f"linear probes of {modality}, {store.path}",
        rows,
        probed,
        (
            f"{clips} clips of a video, class probabilities averaged; "
            + ("L2 logistic regression on standardised features" if modality == "av" else "BatchNorm and Linear, Adam")
            + "; raw features: logistic regression",
            *(["backbone in train mode, as published: batch statistics of the probe's videos, test part included"]
              if train_mode else []),
            *notes,
        ),
        list(dict.fromkeys(names)),
    )  # fmt: skip


class _Statistics:
    """Within it the encoder is left in eval mode, or, as published, its batch normalisations use batch statistics."""

    def __init__(self, method: nn.Module, net: nn.Module, train_mode: bool) -> None:
        self.norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if train_mode else []
        self.method, self.before = method, [m.track_running_stats for m in self.norms]

    def __enter__(self) -> None:
        self.kept = [(m.running_mean, m.running_var) for m in self.norms]
        for m in self.norms:  # without running statistics a norm uses those of the batch, in eval mode too
            m.track_running_stats, m.running_mean, m.running_var = False, None, None

    def __exit__(self, *_: object) -> None:
        for m, track, (mean, var) in zip(self.norms, self.before, self.kept, strict=True):
            m.track_running_stats, m.running_mean, m.running_var = track, mean, var
