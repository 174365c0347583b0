"""SimCLR across sight and sound (Chen, Kornblith, Norouzi, Hinton; ICML 2020), as AVCL compares it (S1, Table 4).

The picture and the sound of a video are the two views of one thing. In a batch of N videos each of the 2N embeddings
must find its partner among the other 2N - 1, both modalities together; no memory, no second copy of a network. All
contrast comes from the batch, so a batch of 16 as in S1 gives 30 negatives: few (the run says so).

    avstore train simclr --preset tiny

What differs from the papers, and why:
* Cross-modal: one picture and one sound instead of two crops, two networks and two projectors (S1).
* S1 names neither temperature nor projector: 0.1 (SimCLR's best at large batches) and 512-2048-128, declared.
* Negatives are gathered over all processes, with their gradient.
* Two clips of one video in a batch count as two videos, as in SimCLR.
"""

# legend: B clips of this rank, N clips of all ranks with picture and sound, D embedding

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.batch import Batch
from trainers.distributed import gather_with_grad
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, not_above, present, seeded, spread
from trainers.projectors import Norm, Projector
from trainers.towers import unit

__all__ = ["PRESETS", "Config", "SimClr", "clips", "nt_xent"]


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's comparison; what is not here is `pair.PairConfig`'s."""

    temperature: float = 0.1  # [ours] S1 names none; SimCLR's Table 5
    hidden: int = 2048  # [ours] SimCLR: a non-linear projector, here 512-2048-128
    dim: int = 128  # [ours] as SimCLR's section 2.1 [M]
    head_batch_norm: bool = False  # [ours]; True in the tiny preset

    def problems(self) -> list[str]:
        return super().problems() + below(self, 1, "hidden", "dim") + not_above(self, 0, "temperature")


PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "hidden": 128, "head_batch_norm": True})}


# ---- loss --------------------------------------------------------------------------------------------------------


def nt_xent(v_ND: Tensor, a_ND: Tensor, temperature: float) -> Tensor:
    """SimCLR eq. 1 over the 2N items {v, a}: (2N,), first the pictures' losses, then the sounds'.

    l_i = - log( exp(z_i . z_p(i) / t) / sum over k != i of exp(z_i . z_k / t) ); rows of unit length.
    """
    z = torch.cat([v_ND, a_ND])
    n = len(v_ND)
    if not n:
        return z.sum(1)
    score = z @ z.T / temperature
    score = score.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(score, partner, reduction="none")


# ---- the method --------------------------------------------------------------------------------------------------


class SimClr(Pair):
    """Two trunks, two projectors. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        norm: Norm = "hidden" if config.head_batch_norm else "none"
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.hidden, config.dim), norm)
            self.audio_head = Projector((self.audio.dim, config.hidden, config.dim), norm)

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The whole global batch' mean, on every rank (`gather_with_grad` says why that is right)."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        v_nD = unit(present((self.video, self.video_head), video, both_B))
        a_nD = unit(present((self.audio, self.audio_head), audio, both_B))
        with torch.autocast(v_nD.device.type, enabled=False):
            v_ND, a_ND = gather_with_grad(v_nD), gather_with_grad(a_nD)
            loss = nt_xent(v_ND, a_ND, self.config.temperature).sum() / max(1, 2 * len(v_ND))
            score = (v_ND @ a_ND.T).detach()
            found = score.diagonal() >= score.amax(1) if len(v_ND) else score.diagonal()
        return loss, {
            "loss": loss.detach(),
            "negatives": float(max(0, 2 * len(v_ND) - 2)),
            "matched": found.double().sum() / max(1, len(v_ND)),  # sounds found by their pictures
            "feature_std_video": spread(v_ND),
            "feature_std_audio": spread(a_ND),
        }
