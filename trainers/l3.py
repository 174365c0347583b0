"""L3: look, listen and learn (Arandjelovic and Zisserman; ICCV 2017), in the re-implementation that AVID compares with
(S4, Table 2, "L3*").

One question, yes or no: do this picture and this sound come from the same video? Both networks' features go side by
side into a small classifier, which sees each picture once with its own sound and once with another's. The oldest and
the simplest of audio-visual tasks; AVID's paper finds it well behind contrast with many negatives.

    avstore train l3 --preset tiny

What differs from the papers, and why:
* L3*'s networks, clips and optimiser are AVID's (R(2+1)D-18, nine convolutions, pictures up to half a second outside
  the sound window, its crops and colours, Adam), 16 frames of 224 pixels; its head is Linear(v, a) -> 512 -> ReLU -> 1
  with binary cross-entropy (L3's own: 128 -> 2-way softmax). `max_offset=0` starts pictures and sound together.
* The false pairs are a derangement of the global batch, a random cycle through all its clips: nobody keeps his own, and
  every sound is taken once. L3*'s code draws for each clip any other of its process, with replacement. Where the cycle
  hands a clip the sound of another clip of the same video, that pair is left out.
* Embeddings are the unit vectors of the pooled features: L3 trains no common space, so cross-modal retrieval is chance
  by construction (AVE-Net was the answer to that).
"""

# legend: B clips of this rank, N clips of all ranks with picture and sound, D features

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.views import AvidView, RandomView, Views
from avstore.windows import to_samples
from trainers.batch import Batch
from trainers.distributed import all_gather_rows, gather_with_grad
from trainers.needs import Needs
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, false_partners, present, seeded, spread

__all__ = ["L3", "PRESETS", "Config", "clips", "correspondence"]


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S4's L3*; what is not here is `pair.PairConfig`'s."""

    video_net: str = "avid-r2plus1d-18"  # [S4] Table 2
    width: int = 64  # [C] as AVID
    audio_net: str = "avid-conv2d-10"  # [S4] "9-layer 2D ConvNet"
    pool: Literal["max", "avg"] = "max"  # [S4] as AVID
    hidden: int = 512  # [C] AVID's development history
    frames: int = 16  # [S4] Table 2
    fps: int | Literal["native"] = 16  # [C] as AVID
    size: int = 224  # [S4] Table 2
    seconds: float = 2.0  # [C] as AVID
    front_end: str = "avid-linear257"  # [C] as AVID
    max_offset: float = 0.5  # [C] as AVID, seconds; 0: pictures start with the sound
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"  # [C] as AVID
    learning_rate: float = 2e-4  # [C] as AVID
    momentum: float = 0.9  # [ours] of sgd
    weight_decay: float = 1e-5  # [C] as AVID
    batch: int = 256  # [C] as AVID
    epochs: int = 30  # [C] as AVID
    draws: int = 10  # [C] as AVID, clips per video and epoch
    crop: Literal["resized", "random"] = "resized"  # [C] as AVID
    crop_area: tuple[float, float] = (0.08, 1.0)  # [C] as AVID
    flip: float = 0.5  # [C] as AVID
    brightness: float = 0.4  # [C] as AVID
    contrast: float = 0.4  # [C] as AVID
    saturation: float = 0.4  # [C] as AVID
    hue: float = 0.2  # [C] as AVID
    sound_gain: float = 0.1  # [C] as AVID

    def needs(self) -> Needs:
        """Pictures up to `max_offset` outside the sound."""
        return Needs(self.frames, self.fps, self.size, self.seconds, self.front_end, max_offset=self.max_offset)

    def problems(self) -> list[str]:
        return super().problems() + below(self, 1, "hidden") + below(self, 0, "max_offset")


PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "hidden": 128, "max_offset": 0.0})}


def clips(config: Config, sample_rate: int) -> Views:
    """AVID's: a sound window, and pictures up to `max_offset` outside it. 0: both start at one random place."""
    return AvidView(to_samples(config.max_offset, sample_rate)) if config.max_offset else RandomView()


# ---- loss --------------------------------------------------------------------------------------------------------


def correspondence(logit_N: Tensor, true: bool) -> Tensor:
    """Binary cross-entropy of 'from the same video': - log sigmoid(x) where it is true, - log(1 - sigmoid(x)) else."""
    return F.softplus(-logit_N if true else logit_N)


# ---- the method --------------------------------------------------------------------------------------------------


class L3(Pair):
    """Two trunks and the classifier of pairs. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config, config.needs())
        with seeded(config.seed, 1):
            self.classifier = nn.Sequential(
                nn.Linear(self.video.dim + self.audio.dim, config.hidden), nn.ReLU(inplace=True),
                nn.Linear(config.hidden, 1),
            )  # fmt: skip
        self.video_head = self.audio_head = nn.Identity()

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean over the true and the false pairs of the global batch, on every rank (see `gather_with_grad`)."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        v_ND = gather_with_grad(present([self.video], video, both_B))
        a_ND = gather_with_grad(present([self.audio], audio, both_B))
        row_N, position_N = all_gather_rows(batch.row[both_B]), all_gather_rows(batch.position[both_B])
        partner_N, false_N = false_partners(batch, position_N, row_N)
        yes_N = self.classifier(torch.cat([v_ND, a_ND], 1))[:, 0]
        no_N = self.classifier(torch.cat([v_ND, a_ND[partner_N]], 1))[:, 0]
        with torch.autocast(v_ND.device.type, enabled=False):
            yes_N, no_N = yes_N.to(v_ND.dtype), no_N.to(v_ND.dtype)
            pairs = (len(yes_N) + false_N.sum()).clamp(min=1)
            loss_true, loss_false = correspondence(yes_N, True), correspondence(no_N, False)
            loss = (loss_true.sum() + torch.where(false_N, loss_false, 0).sum()) / pairs
            right = (yes_N > 0).sum() + ((no_N <= 0) & false_N).sum()
        return loss, {
            "loss": loss.detach(),
            "accuracy": right / pairs,
            "feature_std_video": spread(v_ND),
            "feature_std_audio": spread(a_ND),
        }
