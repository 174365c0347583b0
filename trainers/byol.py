"""BYOL across sight and sound (Grill et al.; NeurIPS 2020), as AVCL compares it (S1, Table 4).

There are no negatives at all: a predictor on the picture's embedding must say what a slowly moving copy of the sound
network makes of the sound, and the reverse. What keeps everything from shrinking to one point is that the target is
not trained, only followed. The best of S1's six rivals (73.3 on Kinetics-Sounds32).

    avstore train byol --preset tiny

What differs from the papers, and why:
* Cross-modal: online sight predicts target sound and online sound target sight; targets of one's own modality are not
  used, for there is one picture and one sound (S1).
* Projector 512-2048-128 and predictor 128-512-128, both batch normalised in the hidden layer as in BYOL; S1 gives no
  sizes.
* The targets' momentum runs from 0.99 to 1 along a cosine over the run, whose length this file computes from epochs,
  draws, batch and the number of videos (or takes from `steps`).
"""

# legend: B clips of this rank, n those with picture and sound, D embedding

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.momentum import cosine_momentum, follow, momentum_copy
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, predict, present, seeded, spread
from trainers.projectors import Projector

__all__ = ["PRESETS", "Byol", "Config", "clips", "regression"]


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's comparison; what is not here is `pair.PairConfig`'s."""

    target_momentum: float = 0.99  # [C] at the start; 1 at the end
    hidden: int = 2048  # [ours] S1 gives no sizes; BYOL 4096
    predictor_hidden: int = 512  # [ours]; BYOL 4096
    dim: int = 128  # [ours]; BYOL 256
    steps: int = 0  # [ours] of the run, for the momentum's schedule; 0: as epochs say

    def problems(self) -> list[str]:
        wrong = super().problems() + below(self, 1, "hidden", "predictor_hidden", "dim") + below(self, 0, "steps")
        if not 0 <= self.target_momentum <= 1:
            wrong.append(f"target_momentum {self.target_momentum} must lie in [0, 1]")
        return wrong


# in 400 steps a target at .99 lags a quarter of the run behind
PRESETS = {
    "paper": Config(),
    "tiny": Config(**{**TINY, "hidden": 128, "predictor_hidden": 64, "target_momentum": 0.95}),
}


# ---- loss --------------------------------------------------------------------------------------------------------


def regression(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """BYOL eq. 2: || q / |q| - z / |z| ||^2 = 2 - 2 cos(q, z): (B,), in [0, 4]. The target takes no gradient."""
    return 2 - 2 * F.cosine_similarity(prediction_BD, target_BD.detach(), dim=1)


# ---- the method --------------------------------------------------------------------------------------------------


class Byol(Pair):
    """Two trunks, projectors, predictors; momentum copies of trunks and projectors. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.hidden, config.dim), "hidden")
            self.audio_head = Projector((self.audio.dim, config.hidden, config.dim), "hidden")
            self.video_predictor = Projector((config.dim, config.predictor_hidden, config.dim), "hidden")
            self.audio_predictor = Projector((config.dim, config.predictor_hidden, config.dim), "hidden")
        self.target_video, self.target_video_head = momentum_copy(self.video), momentum_copy(self.video_head)
        self.target_audio, self.target_audio_head = momentum_copy(self.audio), momentum_copy(self.audio_head)
        self.total = config.steps or config.epochs * -(-n_rows * config.draws // config.batch)
        self.updates = torch.zeros((), dtype=torch.int64)  # of the targets so far
        self._stepped = False

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """(2 - 2 cos(q_v, z'_a)) + (2 - 2 cos(q_a, z'_v)), mean over the global batch."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        z_v_nD = present((self.video, self.video_head), video, both_B)
        z_a_nD = present((self.audio, self.audio_head), audio, both_B)
        q_v_nD, q_a_nD = predict(self.video_predictor, z_v_nD), predict(self.audio_predictor, z_a_nD)
        with torch.no_grad():
            target_v_nD = present((self.target_video, self.target_video_head), video, both_B)
            target_a_nD = present((self.target_audio, self.target_audio_head), audio, both_B)
        self._stepped = self._stepped or self.training
        with torch.autocast(z_v_nD.device.type, enabled=False):
            loss_Tn = torch.stack(
                [regression(q_v_nD.to(target_a_nD), target_a_nD), regression(q_a_nD.to(target_v_nD), target_v_nD)]
            )
            v_to_a, a_to_v = global_means(loss_Tn, torch.ones_like(loss_Tn, dtype=torch.bool))
            loss = v_to_a + a_to_v
        return loss, {
            "loss": loss.detach(),
            "video_to_audio": v_to_a.detach(),
            "audio_to_video": a_to_v.detach(),
            "target_momentum": self.momentum(),
            "feature_std_video": spread(z_v_nD),
            "feature_std_audio": spread(z_a_nD),
        }

    def momentum(self) -> float:
        """Of the next update of the targets."""
        return cosine_momentum(self.config.target_momentum, int(self.updates), self.total)

    def after_step(self) -> dict[str, float]:
        """Moves the targets after the networks."""
        if not self._stepped:
            return {}
        self._stepped = False
        for name in ("video", "video_head", "audio", "audio_head"):
            follow(self.get_submodule(f"target_{name}"), self.get_submodule(name), self.momentum())
        self.updates = self.updates + 1
        return {}

    def method_state(self) -> dict[str, Tensor]:
        """How often the targets were moved; they themselves are weights, in `state_dict()`."""
        return {"updates": self.updates}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`."""
        self.updates = state["updates"].clone()
        self._stepped = False
