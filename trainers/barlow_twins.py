"""Barlow Twins across sight and sound (Zbontar, Jing, Misra, LeCun, Deny; ICML 2021), as AVCL compares it (S1, Table
4).

Over a batch, each dimension of the picture's embedding is correlated with each dimension of the sound's. The loss
wants the identity: the same dimension agrees between the modalities, different ones tell different things. It is
AVCL's CGRA loss (S1, eqs. 5-6) with centred features and a projector: the same function, held by a test.

    avstore train barlow-twins --preset tiny

What differs from the papers, and why:
* Cross-modal: the two views are the picture and the sound of a video, in networks of their own (S1).
* Projector 512-2048-2048-2048, batch normalised in its hidden layers (Barlow Twins uses 8192; S1 gives no sizes).
* Statistics are those of the global batch, gathered with gradient; no running averages, no epsilon but a floor of 1e-4
  on a dimension's norm, so that a dead dimension counts as uncorrelated instead of dividing by zero.
* With N clips in a batch the matrix has rank N - 1 at most: S1's batch of 16 leaves 2048 dimensions unlike the
  identity whatever is learned. The metric `on_diagonal` shows it.
"""

# legend: B clips of this rank, N clips of all ranks with picture and sound, D embedding

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.batch import Batch
from trainers.distributed import gather_with_grad
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, present, seeded, spread
from trainers.projectors import Projector

__all__ = ["PRESETS", "BarlowTwins", "Config", "clips", "cross_correlation", "redundancy"]


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's comparison; what is not here is `pair.PairConfig`'s."""

    off_diagonal: float = 0.005  # [C] lambda; S1, section 3.2, has the same for CGRA
    loss_scale: float = 1.0  # [M] Barlow Twins eq. 1 as it is; [C] 0.1 in solo-learn's code
    dim: int = 2048  # [ours] of all three layers; Barlow Twins 8192

    def problems(self) -> list[str]:
        wrong = super().problems() + below(self, 1, "dim")
        if self.off_diagonal < 0 or not self.loss_scale > 0:
            wrong.append(f"off_diagonal {self.off_diagonal} must be at least 0, loss_scale {self.loss_scale} above it")
        return wrong


PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "dim": 128})}


# ---- loss --------------------------------------------------------------------------------------------------------


def cross_correlation(v_ND: Tensor, a_ND: Tensor) -> Tensor:
    """Barlow Twins eq. 2: C_ij = correlation over the batch of v's dimension i with a's dimension j: (D, D)."""
    v, a = v_ND - v_ND.mean(0), a_ND - a_ND.mean(0)
    return F.normalize(v, dim=0, eps=1e-4).T @ F.normalize(a, dim=0, eps=1e-4)


def redundancy(correlation_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Barlow Twins eq. 1, its two sums: over i of (1 - C_ii)^2, and over i != j of C_ij^2."""
    diagonal = correlation_DD.diagonal()
    return (1 - diagonal).square().sum(), correlation_DD.square().sum() - diagonal.square().sum()


# ---- the method --------------------------------------------------------------------------------------------------


class BarlowTwins(Pair):
    """Two trunks, two projectors. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.dim, config.dim, config.dim), "hidden")
            self.audio_head = Projector((self.audio.dim, config.dim, config.dim, config.dim), "hidden")

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The whole global batch' loss, on every rank (`gather_with_grad` says why that is right)."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        v_nD = present((self.video, self.video_head), video, both_B)
        a_nD = present((self.audio, self.audio_head), audio, both_B)
        with torch.autocast(v_nD.device.type, enabled=False):
            v_ND, a_ND = gather_with_grad(v_nD), gather_with_grad(a_nD)
            if len(v_ND):
                on, off = redundancy(cross_correlation(v_ND, a_ND))
            else:
                on = off = v_ND.sum() + a_ND.sum()
            loss = self.config.loss_scale * (on + self.config.off_diagonal * off)
        return loss, {
            "loss": loss.detach(),
            "on_diagonal": on.detach(),
            "off_diagonal": off.detach(),
            "feature_std_video": spread(v_ND),
            "feature_std_audio": spread(a_ND),
        }
