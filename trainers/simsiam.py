"""SimSiam across sight and sound (Chen and He; CVPR 2021), as AVCL compares it (S1, Table 4, "SimSam").

A predictor on the picture's embedding must point where the sound's embedding points, and the reverse; the embedding
that is pointed at takes no gradient. Without negatives and without a second copy of a network, this stop is all that
keeps the embeddings apart. It is CrissCross' synchronous loss with one view: the same function, held by a test.

    avstore train simsiam --preset tiny

What differs from the papers, and why:
* Cross-modal: the two views are the picture and the sound of a video, in networks of their own (S1).
* Projector 3 x 2048, normalised in all layers, predictor 2048-512-2048, normalised in the hidden one: SimSiam's own.
* The loss of collapsed embeddings is -1, its minimum: watch `feature_std_video` and `_audio`, which then fall to 0
  (SimSiam, Fig. 2, times sqrt(D)).
"""

# legend: B clips of this rank, n those with picture and sound, D embedding

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, predict, present, seeded, spread
from trainers.projectors import Projector

__all__ = ["PRESETS", "Config", "SimSiam", "clips", "negative_cosine"]


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's comparison; what is not here is `pair.PairConfig`'s."""

    dim: int = 2048  # [C] SimSiam, section 3
    predictor_hidden: int = 512  # [C] SimSiam, section 3

    def problems(self) -> list[str]:
        return super().problems() + below(self, 1, "dim", "predictor_hidden")


PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "dim": 128, "predictor_hidden": 32})}


# ---- loss --------------------------------------------------------------------------------------------------------


def negative_cosine(p_BD: Tensor, z_BD: Tensor) -> Tensor:
    """SimSiam eq. 1 and 3: D(p, stopgrad(z)) = - p / |p| . z / |z|: (B,), in [-1, 1]."""
    return -F.cosine_similarity(p_BD, z_BD.detach(), dim=1)


# ---- the method --------------------------------------------------------------------------------------------------


class SimSiam(Pair):
    """Two trunks, projectors and predictors. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.dim, config.dim, config.dim), "all")
            self.audio_head = Projector((self.audio.dim, config.dim, config.dim, config.dim), "all")
            self.video_predictor = Projector((config.dim, config.predictor_hidden, config.dim), "hidden")
            self.audio_predictor = Projector((config.dim, config.predictor_hidden, config.dim), "hidden")

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """SimSiam eq. 2: half of D(p_v, z_a) and half of D(p_a, z_v), mean over the global batch."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        z_v_nD = present((self.video, self.video_head), video, both_B)
        z_a_nD = present((self.audio, self.audio_head), audio, both_B)
        p_v_nD, p_a_nD = predict(self.video_predictor, z_v_nD), predict(self.audio_predictor, z_a_nD)
        with torch.autocast(z_v_nD.device.type, enabled=False):
            loss_Tn = torch.stack(
                [negative_cosine(p_v_nD.to(z_a_nD), z_a_nD), negative_cosine(p_a_nD.to(z_v_nD), z_v_nD)]
            )
            v_to_a, a_to_v = global_means(loss_Tn, torch.ones_like(loss_Tn, dtype=torch.bool))
            loss = (v_to_a + a_to_v) / 2
        return loss, {
            "loss": loss.detach(),
            "video_to_audio": v_to_a.detach(),
            "audio_to_video": a_to_v.detach(),
            "feature_std_video": spread(z_v_nD),
            "feature_std_audio": spread(z_a_nD),
        }
