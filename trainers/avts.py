"""AVTS: cooperative learning from audio-visual temporal synchronisation (Korbar, Tran, Torresani; NeurIPS 2018).

Embeddings of a picture and a sound shall lie close where they happen together, and at least a margin apart where they
do not. First the false sounds are those of other videos: an easy question. In the second half of the training a
quarter of them are of the same video at another time: then only who follows the motion can tell. The curriculum is the
method: hard questions from the start teach nothing.

    avstore train avts --preset tiny

What differs from the paper (recalled, its code is not public), and why:
* Networks are the paper's kind: MC3-18 for 25 consecutive frames, nine convolutions in the way of VGG for one second of
  sound; heads 512-512-128 and unit length are declared, since a margin of .99 wants a scale.
* One true and one false pair per clip. False sounds come from a derangement of the global batch; where that hands a
  clip another sound of its own video, the pair is left out.
* The shifted sound lies at least a window away. Where a video is too short for that, it lies as far away as it can
  (the metric `shrunk` tells how often).
* Pictures are cropped and coloured, and sounds made louder, as AVID's code does: what the paper does is not at hand.
* The curriculum turns after half the epochs (with `steps`, after half of those that the steps make).
"""

# legend: B clips of this rank, n those with picture and sound, N of all ranks, D embedding

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from avstore.errors import UsageError
from avstore.views import ShiftedSound
from trainers import draws
from trainers.batch import Batch
from trainers.distributed import all_gather_rows, gather_with_grad
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, false_partners, not_above, present, seeded, spread
from trainers.projectors import Norm, Projector
from trainers.towers import unit

__all__ = ["PRESETS", "Avts", "Config", "apart", "clips", "together"]

HARD = 0x73686674  # stream of `trainers.draws`: "shft"


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: AVTS as recalled; what is not here is `pair.PairConfig`'s."""

    video_net: str = "mc3-18"  # [M]; [S4] Table 2 "MC3"
    audio_net: str = "vgg-9"  # [M] "VGG-like"
    width: int = 64  # [ours]
    pool: Literal["max", "avg"] = "avg"  # [ours]
    hidden: int = 512  # [ours]
    dim: int = 128  # [ours]
    head_batch_norm: bool = False  # [ours]; True in the tiny preset
    margin: float = 0.99  # [M]
    hard_share: float = 0.25  # [M] of the false sounds in the second half: same video, shifted
    easy_share: float = 0.5  # [M] of the epochs, at the start, without them
    frames: int = 25  # [S4] Table 2
    fps: int | Literal["native"] = "native"  # [M] consecutive
    size: int = 224  # [S4] Table 2
    seconds: float = 1.0  # [M]
    front_end: str = "gdt-fbank40"  # [ours] 40 bands of one second
    optimiser: Literal["adam", "adamw", "sgd"] = "sgd"  # [M]
    learning_rate: float = 0.01  # [ours]
    momentum: float = 0.9  # [ours]
    weight_decay: float = 1e-5  # [ours]
    batch: int = 16  # [ours]
    epochs: int = 90  # [ours]
    steps: int = 0  # [ours] of the run, for the curriculum; 0: as epochs say
    crop: Literal["resized", "random"] = "resized"  # [ours] AVID's
    crop_area: tuple[float, float] = (0.08, 1.0)  # [ours] AVID's
    flip: float = 0.5  # [ours] AVID's
    brightness: float = 0.4  # [ours] AVID's
    contrast: float = 0.4  # [ours] AVID's
    saturation: float = 0.4  # [ours] AVID's
    hue: float = 0.2  # [ours] AVID's
    sound_gain: float = 0.1  # [ours] AVID's

    def problems(self) -> list[str]:
        wrong = super().problems() + below(self, 1, "hidden", "dim") + below(self, 0, "steps")
        wrong += not_above(self, 0, "margin")
        wrong += [
            f"{name} {getattr(self, name)} must lie in [0, 1]"
            for name in ("hard_share", "easy_share")
            if not 0 <= getattr(self, name) <= 1
        ]
        return wrong


PRESETS = {
    "paper": Config(),
    "tiny": Config(**{**TINY, "hidden": 128, "head_batch_norm": True, "seconds": 1.0}),
}


def clips(config: Config, sample_rate: int) -> ShiftedSound:
    """Two views: a picture with its sound, and the same picture with sound of the same video from elsewhere."""
    return ShiftedSound()


# ---- loss --------------------------------------------------------------------------------------------------------


def together(v_ND: Tensor, a_ND: Tensor) -> Tensor:
    """True pairs, y = 1: d^2 with d = | v - a |: (N,)."""
    return (v_ND - a_ND).square().sum(1)


def apart(v_ND: Tensor, a_ND: Tensor, margin: float) -> Tensor:
    """False pairs, y = 0: max(0, margin - d)^2: (N,). At d = 0 the direction is undefined and its gradient 0."""
    square_N = (v_ND - a_ND).square().sum(1)
    here_N = square_N > 0
    distance_N = torch.where(here_N, square_N, 1.0).sqrt()  # no root of 0: its gradient is infinite
    return (margin - torch.where(here_N, distance_N, 0.0)).clamp(min=0).square()


# ---- the method --------------------------------------------------------------------------------------------------


class Avts(Pair):
    """Two trunks, two heads. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        norm: Norm = "all" if config.head_batch_norm else "none"
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.hidden, config.dim), norm)
            self.audio_head = Projector((self.audio.dim, config.hidden, config.dim), norm)
        made = -(-config.steps * config.batch // (n_rows * config.draws))
        self.epochs = made or config.epochs

    def hard_share(self, epoch: int) -> float:
        """Of the false sounds of this epoch: how many are of the same video."""
        return self.config.hard_share if epoch >= self.config.easy_share * self.epochs else 0.0

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean over the true and the false pairs of the global batch, on every rank (see `gather_with_grad`)."""
        if batch.views != 2 or batch.video is None or batch.audio is None:
            raise UsageError(
                f"a batch of {batch.views} views", "this method compares a sound and a shifted one with pictures"
            )
        both_B = batch.has_picture & batch.has_sound
        word_B = draws.bits(draws.key(batch.seed, HARD, batch.epoch), [batch.row, batch.draw], 1)[:, 0]
        hard_B = both_B & (draws.below(word_B, 1_000_000) < self.hard_share(batch.epoch) * 1e6)
        v_nD = unit(present((self.video, self.video_head), batch.video[:, 0], both_B))
        # one pass for all sounds, so that their batch statistics are the same
        heard_nD = unit(present((self.audio, self.audio_head), self._sounds(batch), torch.cat([both_B, hard_B])))
        n, hard_n = len(v_nD), hard_B[both_B]
        shifted_nD = heard_nD.new_zeros(n, heard_nD.shape[1]).index_put((hard_n.nonzero()[:, 0],), heard_nD[n:])

        v_ND, a_ND, shifted_ND = gather_with_grad(v_nD), gather_with_grad(heard_nD[:n]), gather_with_grad(shifted_nD)
        row_N, position_N = all_gather_rows(batch.row[both_B]), all_gather_rows(batch.position[both_B])
        hard_N = all_gather_rows(hard_n)
        partner_N, other_N = false_partners(batch, position_N, row_N)
        with torch.autocast(v_ND.device.type, enabled=False):
            false_N = hard_N | other_N
            wrong_ND = torch.where(hard_N[:, None], shifted_ND, a_ND[partner_N])
            true, false = together(v_ND, a_ND), apart(v_ND, wrong_ND, self.config.margin)
            loss = (true.sum() + torch.where(false_N, false, 0).sum()) / (len(true) + false_N.sum()).clamp(min=1)
            nearer = (true < (v_ND - wrong_ND).square().sum(1)) & false_N
        return loss, {
            "loss": loss.detach(),
            "nearer": nearer.sum() / false_N.sum().clamp(min=1),  # true sounds nearer than the false ones
            "hard": hard_N.double().sum() / max(1, len(hard_N)),
            "feature_std_video": spread(v_ND),
            "feature_std_audio": spread(a_ND),
        }

    def _sounds(self, batch: Batch) -> Tensor:
        """The own sounds, then the shifted ones: (2 B, ...)."""
        assert batch.audio is not None
        share = batch.sound_share
        drawn = batch if self.training else None
        return torch.cat([self.hear(batch.audio[:, k], None if share is None else share[:, k], drawn) for k in (0, 1)])
