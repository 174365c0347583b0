"""MoCo across sight and sound (He, Fan, Wu, Xie, Girshick; CVPR 2020), as AVCL compares it (S1, Table 4).

Each picture must pick the sound of its own video out of a long queue of other sounds, and each sound its picture. The
keys come from momentum copies of the two networks, which change slowly enough that keys of earlier steps still fit:
so the number of negatives does not hang on the batch.

    avstore train moco --preset tiny

What differs from the papers, and why:
* Cross-modal: queries of one modality against keys of the other; one queue per modality (S1 says only that two
  networks are used). Half of each direction.
* The queue is at most a quarter of the videos: a longer one would hold the last epoch's keys of nearly every video,
  its own among them. What own keys remain are left out of the denominator. The metric `queue` tells the length.
* Temperature 0.2 and the 512-2048-128 projector are MoCo v2's; momentum .999 as in MoCo's section 4.1 (declared).
* No shuffled batch normalisation: query and key never pass through the same network here.
* Before it is full, the queue holds random directions, as MoCo's code does.
"""

# legend: B clips of this rank, n those with picture and sound, Q queue, D embedding

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.keys import KeyQueue, in_order
from trainers.momentum import follow, momentum_copy
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, not_above, present, seeded, spread
from trainers.projectors import Norm, Projector
from trainers.towers import unit

__all__ = ["PRESETS", "Config", "MoCo", "clips", "info_nce"]


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's comparison; what is not here is `pair.PairConfig`'s."""

    queue: int = 65536  # [C] MoCo; never more than a quarter of the videos
    key_momentum: float = 0.999  # [M] MoCo, section 4.1
    temperature: float = 0.2  # [C] MoCo v2; S1 names none
    hidden: int = 2048  # [C] MoCo v2's projector
    dim: int = 128  # [M] MoCo, section 3.3
    head_batch_norm: bool = False  # [ours]; True in the tiny preset

    def problems(self) -> list[str]:
        wrong = super().problems() + below(self, 1, "queue", "hidden", "dim") + not_above(self, 0, "temperature")
        return wrong if 0 <= self.key_momentum < 1 else [*wrong, f"key_momentum {self.key_momentum} must lie in [0, 1)"]


# in 400 steps a copy at .999 would hardly leave its start
PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "hidden": 128, "head_batch_norm": True, "key_momentum": 0.98})}


# ---- loss --------------------------------------------------------------------------------------------------------


def info_nce(query_BD: Tensor, key_BD: Tensor, queue_QD: Tensor, own_BQ: Tensor, temperature: float) -> Tensor:
    """MoCo eq. 1: - log( exp(q . k+ / t) / (exp(q . k+ / t) + sum over the queue of exp(q . k / t)) ): (B,).

    own_BQ: keys of the queue that are of the query's own video; they are left out of the sum.
    """
    positive_B = (query_BD * key_BD).sum(1) / temperature
    noise_BQ = (query_BD @ queue_QD.T / temperature).masked_fill(own_BQ, -torch.inf)
    return torch.cat([positive_B[:, None], noise_BQ], 1).logsumexp(1) - positive_B


# ---- the method --------------------------------------------------------------------------------------------------


class MoCo(Pair):
    """Two trunks and projectors, their momentum copies, two queues. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        norm: Norm = "hidden" if config.head_batch_norm else "none"
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.hidden, config.dim), norm)
            self.audio_head = Projector((self.audio.dim, config.hidden, config.dim), norm)
        self.key_video, self.key_video_head = momentum_copy(self.video), momentum_copy(self.video_head)
        self.key_audio, self.key_audio_head = momentum_copy(self.audio), momentum_copy(self.audio_head)
        length = max(1, min(config.queue, n_rows // 4))
        self.video_keys = KeyQueue(length, config.dim, config.seed, 0)
        self.audio_keys = KeyQueue(length, config.dim, config.seed, 1)
        self._pending: list[tuple[Tensor, ...]] = []

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Half of each direction; keeps the keys for `after_step`."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        v_nD = unit(present((self.video, self.video_head), video, both_B))
        a_nD = unit(present((self.audio, self.audio_head), audio, both_B))
        with torch.no_grad():
            key_v_nD = unit(present((self.key_video, self.key_video_head), video, both_B))
            key_a_nD = unit(present((self.key_audio, self.key_audio_head), audio, both_B))
        row_n = batch.row[both_B]
        if self.training:
            self._pending.append((batch.position[both_B], row_n, key_v_nD, key_a_nD))
        with torch.autocast(v_nD.device.type, enabled=False):
            t, own_nQ = self.config.temperature, row_n[:, None] == self.audio_keys.rows
            loss_Tn = torch.stack(
                [
                    info_nce(v_nD, key_a_nD, self.audio_keys.keys, own_nQ, t),
                    info_nce(a_nD, key_v_nD, self.video_keys.keys, own_nQ, t),
                ]
            )
            v_to_a, a_to_v = global_means(loss_Tn, torch.ones_like(loss_Tn, dtype=torch.bool))
            loss = (v_to_a + a_to_v) / 2
        return loss, {
            "loss": loss.detach(),
            "video_to_audio": v_to_a.detach(),
            "audio_to_video": a_to_v.detach(),
            "queue": float(len(self.audio_keys)),
            "filled": self.audio_keys.filled(),
            "feature_std_video": spread(v_nD),
            "feature_std_audio": spread(a_nD),
        }

    def after_step(self) -> dict[str, float]:
        """Moves the copies after the networks, and the step's keys into the queues; collective."""
        if not self._pending:
            return {}
        position, row, key_v, key_a = (torch.cat(x) for x in zip(*self._pending, strict=True))
        self._pending.clear()
        row, key_v, key_a = in_order(position, row, key_v, key_a)
        self.video_keys.push(row, key_v)
        self.audio_keys.push(row, key_a)
        for name in ("video", "video_head", "audio", "audio_head"):
            follow(self.get_submodule(f"key_{name}"), self.get_submodule(name), self.config.key_momentum)
        return {}

    def method_state(self) -> dict[str, Tensor]:
        """Both queues. The copies are weights, in `state_dict()`."""
        queues = {"video_keys": self.video_keys, "audio_keys": self.audio_keys}
        return {f"{name}.{k}": x for name, queue in queues.items() for k, x in queue.state().items()}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. ConflictError for queues of another selection or width."""
        for name in ("video_keys", "audio_keys"):
            part = {k.removeprefix(f"{name}."): x for k, x in state.items() if k.startswith(f"{name}.")}
            getattr(self, name).load_state(part)
        self._pending.clear()
