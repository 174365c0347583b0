"""XDC: cross-modal deep clustering (Alwassel, Mahajan, Korbar, Torresani, Ghanem, Tran; NeurIPS 2020).

The features of all sounds are clustered, and the video network learns to name the cluster of each video's *sound*; the
sound network learns the clusters of the pictures. The better features make better clusters, and so on, by turns. That
the labels come from the other sense is what keeps a network from confirming its own habits.

    avstore train xdc --preset tiny

What differs from the paper (recalled, its training code is not public), and why:
* Features to cluster are those that the training itself met: a bank keeps, for each video, the normalised features of
  its newest clip, instead of another pass over the data. They are of augmented clips, and up to an epoch old.
* What one augmented clip of a small, untrained network gives is mostly noise, and k-means finds clusters that the other
  sense cannot tell: the loss then hardly falls. `tiny` therefore keeps a moving mean over a video's clips
  (`feature_momentum`) and clusters it in a few whitened principal components (`whiten`, DeepCluster's preparation).
* So epoch 0 only collects: its loss is 0 and no weight moves (but for weight decay), which makes the first clusters
  those of the random networks, as the paper's are. Adam would turn weight decay alone into full steps: it is refused.
* The paper draws clips uniformly over clusters. Here every clip comes once per draw and is weighted by
  N / (clusters * size of its cluster): the same expectation.
* The last layers are made anew at each round (their momentum in the optimiser is not).
* Pictures are cropped and coloured, and sounds made louder, as AVID's code does: what the paper does is not at hand.
* k-means is FAISS', on the CPU; a cluster that ends empty takes the point that lies worst in a cluster of several.
"""

# legend: N videos of the selection, B clips of this rank, n those with picture and sound, K clusters, D features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import ConflictError, ExtraMissingError, UsageError
from trainers import draws
from trainers.bank import MemoryBank
from trainers.batch import Batch
from trainers.distributed import all_gather_rows, global_means
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, present, seeded, spread
from trainers.towers import unit

__all__ = ["PRESETS", "Config", "Xdc", "balance", "clips", "kmeans", "pseudo_label_loss", "whitened"]

CLUSTER = 0x6B6D6561  # stream of `trainers.draws`: "kmea"
_POINTS = 1024  # per cluster that k-means is fitted on; all are assigned


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: XDC as recalled; what is not here is `pair.PairConfig`'s."""

    clusters: int = 64  # [M] k; 64 to 512
    round_epochs: int = 1  # [ours] epochs between clusterings
    iterations: int = 20  # [ours] of k-means
    whiten: int = 0  # [M] L2 alone; above 0: so many whitened principal components first
    feature_momentum: float = 0.0  # [M] the newest clip's features; above 0: a moving mean over a video's clips
    video_net: str = "r2plus1d-18"  # [C] XDC's released network
    audio_net: str = "resnet-18"  # [M]
    width: int = 64  # [C]
    pool: Literal["max", "avg"] = "avg"  # [C]
    frames: int = 32  # [S4] Table 2; 8 in its other rows
    fps: int | Literal["native"] = 30  # [M]
    size: int = 112  # [M]
    seconds: float = 1.0  # [ours]
    front_end: str = "gdt-fbank40"  # [M] 40 mel bands; which recipe [ours]
    optimiser: Literal["adam", "adamw", "sgd"] = "sgd"  # [M]
    learning_rate: float = 0.01  # [M]
    momentum: float = 0.9  # [M]
    weight_decay: float = 1e-4  # [M]
    batch: int = 256  # [ours]
    epochs: int = 100  # [ours]
    draws: int = 1  # [ours] clips of each video per epoch
    crop: Literal["resized", "random"] = "resized"  # [ours] AVID's
    crop_area: tuple[float, float] = (0.08, 1.0)  # [ours] AVID's
    flip: float = 0.5  # [ours] AVID's
    brightness: float = 0.4  # [ours] AVID's
    contrast: float = 0.4  # [ours] AVID's
    saturation: float = 0.4  # [ours] AVID's
    hue: float = 0.2  # [ours] AVID's
    sound_gain: float = 0.1  # [ours] AVID's

    def problems(self) -> list[str]:
        wrong = super().problems() + below(self, 2, "clusters") + below(self, 1, "round_epochs", "iterations")
        wrong += below(self, 0, "whiten")
        if not 0 <= self.feature_momentum < 1:
            wrong.append(f"feature_momentum {self.feature_momentum} must lie in [0, 1)")
        if self.optimiser == "adam" and self.weight_decay:
            wrong.append("optimiser adam with weight_decay moves weights in the epoch that collects: take adamw")
        return wrong


PRESETS = {
    "paper": Config(),
    "tiny": Config(
        **{**TINY, "optimiser": "adamw", "clusters": 16, "round_epochs": 3, "whiten": 8, "feature_momentum": 0.5}
    ),
}


# ---- clusters ----------------------------------------------------------------------------------------------------


def kmeans(x_ND: np.ndarray, clusters: int, seed: int, iterations: int = 20) -> np.ndarray:
    """int64 (N,): the cluster of each row, by FAISS' k-means; no cluster is empty. UsageError for fewer rows."""
    if len(x_ND) < clusters:
        raise UsageError(
            f"{clusters} clusters of {len(x_ND)} videos",
            "each cluster needs a video with picture and sound",
            "--set clusters=...",
        )
    try:
        import faiss
    except ImportError as e:
        raise ExtraMissingError("FAISS is not installed", str(e), "pip install faiss-cpu") from e
    x: Any = np.ascontiguousarray(x_ND, np.float32)
    fit = faiss.Kmeans(
        x.shape[1],
        clusters,
        niter=iterations,
        seed=seed & 0x7FFFFFFF,
        min_points_per_centroid=1,
        max_points_per_centroid=_POINTS,
    )
    fit.train(x)
    distance, found = fit.index.search(x, 1)
    distance, label = distance[:, 0].copy(), found[:, 0].astype(np.int64)
    for empty in np.flatnonzero(np.bincount(label, minlength=clusters) == 0):
        several = np.bincount(label, minlength=clusters)[label] > 1
        worst = int(np.where(several, distance, -np.inf).argmax())
        label[worst], distance[worst] = empty, 0.0
    return label


def whitened(x_ND: np.ndarray, components: int) -> np.ndarray:
    """float32 (N, components or fewer): unit rows of as many whitened principal components as there are of variance.

    Whitened, no few directions decide alone which rows are near, and clusters are of more even sizes; DeepCluster
    (Caron et al. 2018, recalled) prepares its features so. Where all rows are equal: zeros (N, 1).
    """
    x = x_ND.astype(np.float64)
    x -= x.mean(0)
    value, vector = np.linalg.eigh(x.T @ x / len(x))
    value, vector = value[::-1][:components], vector[:, ::-1][:, :components]
    kept = value > max(float(value[0]) * 1e-10, 1e-20)
    if not kept.any():
        return np.zeros((len(x), 1), np.float32)
    z = x @ vector[:, kept] / np.sqrt(value[kept])
    return (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def balance(label_N: Tensor, clusters: int) -> Tensor:
    """(N,) float32: N / (clusters * size of the row's cluster), so that every cluster weighs alike; 0 where -1."""
    here_N = label_N >= 0
    size_K = label_N[here_N].bincount(minlength=clusters)
    weight_N = here_N.sum() / (clusters * size_K.clamp(min=1))[label_N.clamp(min=0)]
    return torch.where(here_N, weight_N, 0).float()


# ---- loss --------------------------------------------------------------------------------------------------------


def pseudo_label_loss(logit_nK: Tensor, label_n: Tensor, weight_n: Tensor) -> Tensor:
    """- w log softmax(logit)[label]: (n,); 0 where the label is -1."""
    return weight_n * F.cross_entropy(logit_nK, label_n, ignore_index=-1, reduction="none")


# ---- the method --------------------------------------------------------------------------------------------------


class Xdc(Pair):
    """Two trunks, two last layers, the bank of features, the labels of a round. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        if n_rows < config.clusters:
            raise UsageError(
                f"{config.clusters} clusters of {n_rows} videos", "a cluster needs a video", "--set clusters=..."
            )
        if self.video.dim != self.audio.dim:
            raise UsageError(
                f"features of {self.video.dim} and {self.audio.dim} channels",
                "one bank holds both",
                "choose networks of equal width",
            )
        with seeded(config.seed):
            self.video_classifier = nn.Linear(self.video.dim, config.clusters)
            self.audio_classifier = nn.Linear(self.audio.dim, config.clusters)
        self.video_head = self.audio_head = nn.Identity()
        self.bank = MemoryBank(n_rows, self.video.dim, config.seed, momentum=config.feature_momentum)
        self.bank.memory.zero_()  # a row's first features are taken as they are: no noise in its mean
        self.round = 0  # 0: collecting; from 1 on, clusterings made
        self.labels = torch.full((n_rows, 2), -1)  # clusters of sight and of sound
        self.weights = torch.zeros(n_rows, 2)  # `balance` of both
        self._renew()
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def due(self, epoch: int) -> int:
        """The round that this epoch belongs to."""
        return 0 if epoch == 0 else 1 + (epoch - 1) // self.config.round_epochs

    def start_epoch(self, epoch: int) -> dict[str, float]:
        """Clusters what the last round left in the bank, where a new round begins; collective."""
        if self.due(epoch) == self.round:
            return {}
        before = self.labels.to(self.bank.memory.device)  # of round 0: still where it was made
        self.round = self.due(epoch)
        self._label(self._cluster())
        self._renew()
        told = {"round": float(self.round), "labelled": float((self.labels >= 0).all(1).double().mean())}
        for modality, name in enumerate(("video", "audio")):
            here = self.labels[:, modality] >= 0
            size = self.labels[here, modality].bincount(minlength=self.config.clusters)
            told[f"largest_{name}"] = float(size.max()) / max(1, int(here.sum()))
            if bool((before[here, modality] >= 0).all()) and bool(here.any()):
                told[f"kept_{name}"] = same_pairs(before[here, modality], self.labels[here, modality])
        return told

    def _label(self, labels_N2: Tensor) -> None:
        self.labels = labels_N2
        self.weights = torch.stack([balance(x, self.config.clusters) for x in labels_N2.unbind(1)], 1)

    def _cluster(self) -> Tensor:
        """(N, 2) labels; the same on every rank, since the first one's are taken."""
        labels = torch.full((len(self.bank), 2), -1)
        rows = self.bank.complete().nonzero()[:, 0].cpu()
        for modality in (0, 1):
            x = self.bank.memory[rows.to(self.bank.memory.device), modality].float().cpu().numpy()
            if self.config.whiten:
                x = whitened(x, self.config.whiten)
            seed = draws.key(self.config.seed, CLUSTER, self.round, modality)
            labels[rows, modality] = torch.from_numpy(kmeans(x, self.config.clusters, seed, self.config.iterations))
        device = self.bank.memory.device
        return all_gather_rows(labels.to(device))[: len(labels)]

    def _renew(self) -> None:
        """Last layers as a pure function of (seed, round)."""
        with seeded(self.config.seed, CLUSTER, self.round), torch.no_grad():
            for layer in (self.video_classifier, self.audio_classifier):
                new = nn.Linear(layer.in_features, layer.out_features)
                layer.weight.copy_(new.weight)
                layer.bias.copy_(new.bias)

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Half of each modality's loss; keeps the features for `after_step`."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        with torch.set_grad_enabled(self.round > 0 and torch.is_grad_enabled()):
            v_nD, a_nD = present([self.video], video, both_B), present([self.audio], audio, both_B)
        row_n = batch.row[both_B]
        if self.training:
            mask_n2 = torch.ones(len(row_n), 2, dtype=torch.bool, device=row_n.device)
            kept = torch.stack([unit(v_nD), unit(a_nD)], 1).detach()
            self._pending.append((batch.position[both_B], row_n, kept, mask_n2))
        metrics: Metrics = {
            "round": float(self.round),
            "feature_std_video": spread(v_nD),
            "feature_std_audio": spread(a_nD),
        }
        if self.round == 0:
            loss = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0
            return loss, metrics | {"loss": loss.detach()}
        label_n2 = self.labels.to(row_n.device)[row_n]
        weight_n2 = self.weights.to(row_n.device)[row_n]
        logit_v, logit_a = self.video_classifier(v_nD), self.audio_classifier(a_nD)
        with torch.autocast(v_nD.device.type, enabled=False):
            # pictures learn the clusters of sound, sounds those of sight
            logit_v, logit_a = logit_v.to(v_nD.dtype), logit_a.to(a_nD.dtype)
            right = [(x.argmax(1) == label_n2[:, m]).to(v_nD.dtype) for x, m in ((logit_v, 1), (logit_a, 0))]
            rows = torch.stack(
                [
                    pseudo_label_loss(logit_v, label_n2[:, 1], weight_n2[:, 1].to(v_nD.dtype)),
                    pseudo_label_loss(logit_a, label_n2[:, 0], weight_n2[:, 0].to(a_nD.dtype)),
                    *right,
                ]
            )
            labelled = (label_n2 >= 0).all(1).expand(4, -1)
            video_loss, audio_loss, video_right, audio_right = global_means(rows, labelled)
            loss = (video_loss + audio_loss) / 2
        return loss, metrics | {
            "loss": loss.detach(),
            "video_loss": video_loss.detach(),
            "audio_loss": audio_loss.detach(),
            "video_accuracy": video_right.detach(),
            "audio_accuracy": audio_right.detach(),
        }

    def after_step(self) -> dict[str, float]:
        """The bank takes the features of every `step` since the last call; collective."""
        if not self._pending:
            return {}
        position, row, feature, mask = (torch.cat(x) for x in zip(*self._pending, strict=True))
        self._pending.clear()
        self.bank.update(position, row, feature, mask)
        return {}

    def method_state(self) -> dict[str, Tensor]:
        """Bank, labels, round, and the seed of its clusters."""
        state = {f"bank.{name}": x for name, x in self.bank.state().items()}
        seed = torch.tensor(self.config.seed)
        return state | {"labels": self.labels, "round": torch.tensor(self.round), "seed": seed}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. ConflictError for a bank of another selection or width."""
        self.bank.load_state({k.removeprefix("bank."): x for k, x in state.items() if k.startswith("bank.")})
        labels = state["labels"]
        if labels.shape != self.labels.shape or int(labels.max()) >= self.config.clusters:
            raise ConflictError(
                f"saved labels {tuple(labels.shape)} up to {int(labels.max())}",
                f"this run has {tuple(self.labels.shape)} of {self.config.clusters} clusters",
                "use the selection and clusters of that run, or start a new run with --run",
            )
        self._label(labels.to(self.bank.memory.device).clone())
        self.round = int(state["round"])
        self._pending.clear()


def same_pairs(before_N: Tensor, after_N: Tensor) -> float:
    """How much of a clustering stayed: normalised mutual information of two labelings, in [0, 1]."""
    joint = torch.zeros(int(before_N.max()) + 1, int(after_N.max()) + 1, dtype=torch.float64)
    joint.index_put_((before_N.cpu(), after_N.cpu()), torch.ones(len(before_N), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    a, b = joint.sum(1), joint.sum(0)
    information = torch.special.xlogy(joint, joint / (a[:, None] * b).clamp(min=1e-300)).sum()
    entropy = -(torch.special.xlogy(a, a).sum() + torch.special.xlogy(b, b).sum()) / 2
    return float(information / entropy) if float(entropy) else 1.0
