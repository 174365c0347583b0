"""DR-DSN: a summariser that learns without labels (Zhou, Qiao, Xiang; AAAI 2018), on any features.

A bidirectional LSTM gives each sampled frame a probability; frames are drawn by it; the reward is half how different
the drawn frames are from one another and half how well they stand for the whole video; REINFORCE follows the reward
against a moving baseline for each video.

What is declared: features are brought to unit length first, because the representativeness reward exp(- squared
distance) is 0 to the last bit for features of length 50 (`normalise=False` for files that are to be taken as they
are). Everything else as the authors' code ran it.
"""

# legend: n sampled frames, D width of a feature, k drawn frames

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from avstore import draws
from avstore.errors import AvstoreError, UsageError


@dataclass(frozen=True)
class Config:
    """[C] the authors' code."""

    hidden: int = 256  # of each direction
    episodes: int = 5
    epochs: int = 60
    learning_rate: float = 1e-5  # Adam
    weight_decay: float = 1e-5
    decay_epoch: int = 30  # after which the rate is a tenth
    clip_gradient: float = 5.0
    far: int = 20  # steps beyond which two frames count as different, whatever they show
    share: float = 0.5  # the mean probability that a penalty asks for
    penalty: float = 0.01
    baseline: float = 0.9  # momentum of each video's moving reward
    normalise: bool = True  # [ours] features to unit length
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [f"{n} {getattr(self, n)}" for n in ("hidden", "episodes", "epochs") if getattr(self, n) < 1]
        if not self.learning_rate > 0 or not 0 <= self.baseline < 1:
            wrong.append(f"learning_rate {self.learning_rate}, baseline {self.baseline}")
        if wrong:
            raise UsageError("a summariser that cannot be trained", "; ".join(wrong))


def diversity(features_nD: Tensor, chosen_n: Tensor, far: int = 20) -> Tensor:
    """R_div: mean over ordered pairs of chosen frames of 1 - cosine; 1 for pairs more than `far` steps apart; 0 for
    fewer than two frames. A scalar."""
    place = chosen_n.nonzero()[:, 0]
    k = len(place)
    if k < 2:
        return features_nD.new_zeros(())
    x = F.normalize(features_nD[place], dim=1)
    apart = 1 - x @ x.T
    apart = torch.where((place[:, None] - place[None, :]).abs() > far, torch.ones_like(apart), apart)
    return (apart.sum() - apart.diagonal().sum()) / (k * (k - 1))


def representativeness(features_nD: Tensor, chosen_n: Tensor) -> Tensor:
    """R_rep: exp(- mean over frames of the squared distance to the nearest chosen one); 0 where none is chosen."""
    place = chosen_n.nonzero()[:, 0]
    if not len(place):
        return features_nD.new_zeros(())
    squared = torch.cdist(features_nD, features_nD[place], compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-squared.min(1).values.mean())


def reward(features_nD: Tensor, chosen_n: Tensor, far: int = 20) -> Tensor:
    """R = (R_div + R_rep) / 2; 0 where nothing is chosen."""
    return (diversity(features_nD, chosen_n, far) + representativeness(features_nD, chosen_n)) / 2


def loss(
    p_n: Tensor, episodes: Sequence[tuple[Tensor, float]], baseline: float, share: float = 0.5, penalty: float = 0.01
) -> Tensor:
    """What is minimised for one video: penalty * (mean p - share)^2 less, summed over the episodes (chosen bool (n,),
    reward), mean log P(chosen) * (reward - baseline). The paper takes the mean over episodes; the authors'
    code, and this, their sum, so that with 5 of them the penalty weighs a fifth of the paper's. A scalar."""
    out = penalty * (p_n.mean() - share) ** 2
    for chosen_n, got in episodes:
        out = out - torch.where(chosen_n, p_n, 1 - p_n).clamp_min(1e-12).log().mean() * (got - baseline)
    return out


class Summariser(nn.Module):
    """(n, D) -> (n,) probabilities."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.score = nn.Linear(2 * hidden, 1)

    def forward(self, features_nD: Tensor) -> Tensor:
        out, _ = self.rnn(features_nD[None])
        return torch.sigmoid(self.score(out[0])[:, 0])


def train(
    features: Mapping[str, NDArray[np.floating]], config: Config | None = None
) -> tuple[Summariser, list[dict[str, float]]]:
    """A summariser of the videos' features {name: (n, D)}, and for each epoch the mean reward and probability.

    The order of an epoch and every draw are pure functions of (seed, epoch, video, episode). UsageError for features
    that cannot be used, AvstoreError when a loss is not finite.
    """
    c = Config() if config is None else config
    names = sorted(features)
    if not names:
        raise UsageError("no video to learn from", "a summariser needs features of at least one")
    widths = {np.asarray(features[n]).shape[1:] for n in names}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise UsageError(f"features of shapes {sorted(map(str, widths))}", "every video needs (n, D) of one width")
    data = {n: prepared(features[n], c.normalise) for n in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        net = Summariser(next(iter(widths))[0], c.hidden)
    optimiser = torch.optim.Adam(net.parameters(), lr=c.learning_rate, weight_decay=c.weight_decay)
    baselines = np.zeros(len(names))
    history = []
    net.train()
    for epoch in range(c.epochs):
        for group in optimiser.param_groups:
            group["lr"] = c.learning_rate * (0.1 if epoch >= c.decay_epoch else 1.0)
        order = np.argsort(draws.uniform(c.seed, "shuffle", epoch, np.arange(len(names)), 0)[..., 0])
        rewards, shares = [], []
        for i in order.tolist():
            x = data[names[i]]
            p = net(x)
            tried = []
            for episode in range(c.episodes):
                u = draws.uniform(c.seed, "probe", epoch * c.episodes + episode, i, np.arange(len(p)))[..., 0]
                action = torch.from_numpy(u).to(p) < p.detach()
                tried.append((action, float(reward(x, action, c.far))))
            cost = loss(p, tried, float(baselines[i]), c.share, c.penalty)
            optimiser.zero_grad(set_to_none=True)
            cost.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), c.clip_gradient)
            if not torch.isfinite(cost) or not torch.isfinite(norm):
                raise AvstoreError(f"DR-DSN diverged in epoch {epoch + 1} at {names[i]}", f"loss {float(cost)}")
            optimiser.step()
            got = [r for _, r in tried]
            baselines[i] = c.baseline * baselines[i] + (1 - c.baseline) * float(np.mean(got))
            rewards += got
            shares.append(float(p.detach().mean()))
        history.append({"epoch": epoch + 1, "reward": float(np.mean(rewards)), "share": float(np.mean(shares))})
    return net.eval(), history


def prepared(features: NDArray[np.floating], normalise: bool = True) -> Tensor:
    """float32 (n, D), finite; unit rows where asked. UsageError otherwise."""
    x = torch.as_tensor(np.asarray(features, np.float32))
    if x.ndim != 2 or not len(x):
        raise UsageError(f"features of shape {tuple(x.shape)}", "(n, D) with at least one row")
    if not torch.isfinite(x).all():
        raise UsageError("features that are not finite", "leave out these frames, or embed the video anew")
    return F.normalize(x, dim=1) if normalise else x


@torch.no_grad()
def scores(net: Summariser, features: NDArray[np.floating], normalise: bool = True) -> NDArray[np.float64]:
    """float64 (n,): the probability of each sampled frame."""
    return net.eval()(prepared(features, normalise)).double().numpy()
