"""Linear classifiers of frozen features: AVID's, trained with Adam, and L2 logistic regression.

    probing.probe(x, probed, adam())
    probing.probe(x, probed, averaged(logistic()))

Each is a classifier of `probing.probe`: (train (t, K', D), labels (t,), test (m, K, D), inner folds (t,) or None) ->
(clip scores (m, K, C), text). What is to be chosen is chosen within training (`probing.held_out`), and standardised
without what chooses. Not here: the SVMs (`svm.py`) and the vote of neighbours (`knn.py`).
"""

# legend: t training videos, m tested ones, K clips of each, D values, C classes

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from avstore.errors import UsageError
from benchmarks import probing
from benchmarks.probing import Classifier

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TENTH = 10  # 1 / share of training that chooses a strength where no fold is marked (clips-and-protocols.md 3)


@dataclass(frozen=True)
class Schedule:
    """Adam's: `decay` times the rate after each of `milestones` (epochs); clips of each tested video."""

    epochs: int = 12
    rate: float = 1e-4
    decay: float = 0.1
    milestones: tuple[int, ...] = (6, 9)
    batch: int = 128
    clips: int = 10

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or self.clips < 1 or not self.rate > 0 or not 0 < self.decay <= 1:
            raise UsageError(
                f"{self.epochs} epochs of batches of {self.batch} at {self.rate}, decay {self.decay}",
                "at least 1 and 2, above 0, in (0, 1]",
                "--epochs 12 --rate 1e-4",
            )

    def shortened(self, epochs: int) -> Schedule:
        """The same of another length: its milestones at the same shares of it."""
        at = tuple(sorted({max(1, round(m * epochs / self.epochs)) for m in self.milestones}))
        return Schedule(epochs, self.rate, self.decay, at, self.batch, self.clips)


# AVID: its probes of Kinetics (their code), and those of its ablations (Table 1; development history); methods.md 6.2
SCHEDULES = {"kinetics": Schedule(), "ablation": Schedule(20, 1e-4, 0.3, (8, 12, 15, 18), 128, 25)}


def adam(schedule: Schedule = SCHEDULES["kinetics"], seed: int = 0) -> Classifier:
    """AVID's probe: BatchNorm1d (running statistics at test), Linear, Adam; every clip is a training example."""

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        x = torch.from_numpy(train.reshape(-1, train.shape[-1]))
        y = torch.from_numpy(np.repeat(labels, train.shape[1]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.BatchNorm1d(x.shape[1]), nn.Linear(x.shape[1], int(y.max()) + 1))
            optimiser = torch.optim.Adam(net.parameters(), lr=schedule.rate)
            for epoch in range(schedule.epochs):
                for group in optimiser.param_groups:
                    group["lr"] = schedule.rate * schedule.decay ** sum(epoch >= m for m in schedule.milestones)
                order = torch.randperm(len(x))
                for at in range(0, len(x), schedule.batch):
                    rows = order[at : at + schedule.batch]
                    if len(rows) < 2:  # batch statistics of one clip do not exist
                        continue
                    optimiser.zero_grad(set_to_none=True)
                    F.cross_entropy(net(x[rows]), y[rows]).backward()
                    optimiser.step()
        net.eval()
        with torch.no_grad():
            scores = net(torch.from_numpy(test.reshape(-1, test.shape[-1]))).softmax(1)
        return scores.numpy().reshape(*test.shape[:2], -1), f"{schedule.epochs} epochs"

    return classify


def logistic(strengths: Sequence[float] = STRENGTHS, seed: int = 0) -> Classifier:
    """L2 logistic regression on the mean over a video's clips, standardised on what is trained on; strength by the
    inner fold or validation part where there is one, else by a held-out tenth of each class, then fitted on all of
    training. The scores are one per video: (m, 1, C)."""

    def fit(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=c, max_iter=500).fit(x, y)

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        train, test = train.mean(1, keepdims=True), test.mean(1, keepdims=True)
        held = probing.held_out(labels, inner, TENTH, seed) if len(strengths) > 1 else None
        c = strengths[0] if len(strengths) == 1 else 1.0
        if held is not None:
            a, b = (x[:, 0] for x in probing.standardised(train[~held], train[held]))
            accuracy = [float((fit(a, labels[~held], s).predict(b) == labels[held]).mean()) for s in strengths]
            c = strengths[int(np.argmax(accuracy))]
        a, b = (x[:, 0] for x in probing.standardised(train, test))
        model = fit(a, labels, c)
        scores = np.zeros((len(b), int(labels.max()) + 1))
        scores[:, model.classes_] = model.predict_proba(b)
        return scores[:, None], f"C {c:g}"

    return classify


def averaged(classifier: Classifier) -> Classifier:
    """The classifier on the mean over each video's clips: one example, and one score, of each."""

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        return classifier(train.mean(1, keepdims=True), labels, test.mean(1, keepdims=True), inner)

    return classify
