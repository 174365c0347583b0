"""AVID: audio-visual instance discrimination (Morgado, Vasconcelos, Misra; 2020 workshop paper, S4).

A video network and a sound network are trained so that the embedding of a video's picture picks out the slowly moving
memory of *its own* sound among the sounds of other videos, and the reverse. The memory makes a thousand negatives as
cheap as one, and noise contrastive estimation makes each a yes-or-no question. Cross-modal targets (Cross-AVID) learn
more than targets of the same modality (Self-AVID), because low-level statistics do not answer them.

    avstore train avid                          # defaults: the paper's Kinetics recipe
    avstore train avid --preset tiny            # a CPU, a minute
    avstore train avid --set variant=self
    avstore train avid-softmax                  # the softmax form of the report, under its own name

What differs from the paper or the authors' code, and why:
* Eqs. 1-3 are plain sums; the code that made the numbers halves them (Joint: quarters). Default: the code's scale,
  since learning rate and weight decay belong to it; `loss_scale=paper` sums.
* Negatives are drawn by a counter hash instead of a generator: the same on any number of GPUs and after a restart.
* Two clips of one video in a batch: the mean of their embeddings, one bank update (undefined in the code).
* A missing picture or sound is masked out of the terms that need it, never replaced by zeros or a neighbour.
* Convolutions before a batch normalisation have no bias; initial weights are He normal (`encoders.py`).
* `form=softmax` is the (K+1)-way softmax of the report "Audio-focused multimodal learning" (eqs. 4.1, 4.4-4.6), which
  calls it NCE; eqs. 4.2 and 4.3 are the bank's update. The report gives neither K, tau and lambda nor an optimiser:
  `avid-softmax` takes AVID's, sums as eq. 4.6 does, and needs no partition constant.
"""

# legend: B batch, K negatives, P positives (1 here), N videos of the selection, D embedding
# v, a: embeddings of this batch; memory tensors (..., 2, D): index 0 sight (v-bar), index 1 sound (a-bar)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from trainers.bank import MemoryBank, estimate_partition
from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.needs import Needs
from trainers.negatives import draw_negatives
from trainers.spread import feature_std
from trainers.towers import Towers

TERMS = ("video_to_audio", "audio_to_video", "video_to_video", "audio_to_audio")
VARIANTS: dict[str, tuple[str, ...]] = {"cross": TERMS[:2], "self": TERMS[2:], "joint": TERMS}


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's Kinetics-400 run. [S4] paper, [C] the authors' code, [ours] declared choice."""

    variant: Literal["cross", "self", "joint"] = "cross"  # [S4] eqs. 1-3, section 3
    form: Literal["nce", "softmax"] = "nce"  # [C] binary NCE; softmax: the report's eqs. 4.4-4.6
    loss_scale: Literal["code", "paper"] = "code"  # [C] mean of the terms; paper: their sum, eqs. 1-3
    negatives: int = 1024  # [C] K, with replacement
    temperature: float = 0.07  # [C]
    bank_momentum: float = 0.5  # [C] every configuration that was run
    video_depth: int = 18  # [S4] section 3; 10 ("9 layers") in the ablations
    audio_depth: int = 10  # [S4] "9-layer 2D ConvNet"
    width: int = 64  # [C] channels of conv2x
    small: bool = False  # [C] True: the ablations' networks, for 112 x 112 and 100 x 129
    pool: Literal["max", "avg"] = "max"  # [S4] "output activations are max-pooled"
    hidden: int = 512  # [C] proj_dim
    dim: int = 128  # [S4] section 3
    head_batch_norm: bool = False  # [C]; True in the tiny preset [ours]
    frames: int = 8  # [C]
    fps: int = 16  # [C]
    size: int = 224  # [C]
    seconds: float = 2.0  # [C] sound window
    front_end: str = "avid-linear257"  # [C] 200 x 257
    max_offset: float = 0.5  # [C] pictures may start or end this far outside the sound window, seconds
    learning_rate: float = 2e-4  # [C] Adam, constant
    warmup_steps: int = 0  # [C]
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # [C] milestones with factor 1
    weight_decay: float = 1e-5  # [C]
    batch: int = 256  # [C] per node
    epochs: int = 30  # [C]; times `draws` = 300 passes over the videos
    draws: int = 10  # [C] clips per video and epoch
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        for name, allowed in (
            ("variant", tuple(VARIANTS)),
            ("form", ("nce", "softmax")),
            ("loss_scale", ("code", "paper")),
            ("pool", ("max", "avg")),
            ("schedule", ("constant", "cosine", "multistep")),
        ):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}")
        wrong += [
            f"{name} {getattr(self, name)} must be at least 1"
            for name in ("negatives", "width", "hidden", "dim", "batch", "epochs", "draws")
            if getattr(self, name) < 1
        ]
        wrong += [
            f"{name} {getattr(self, name)} must be above 0"
            for name in ("temperature", "learning_rate")
            if not getattr(self, name) > 0
        ]
        if wrong:
            raise UsageError("the configuration of avid does not hold", "; ".join(wrong), "correct it with --set")


# a few hundred clips, two CPU cores, minutes: 400 steps of 24 clips of the demo set [ours]. Average pooling and batch
# normalisation in the heads because they learn several times faster in so few steps (docs/decisions.md)
TINY = Config(
    video_depth=10,
    width=16,
    pool="avg",
    hidden=128,
    head_batch_norm=True,
    frames=8,
    fps=8,
    size=64,
    negatives=64,
    batch=24,
    learning_rate=2e-3,
    warmup_steps=20,
    schedule="cosine",
    epochs=16,
    draws=2,
)
PRESETS = {"paper": Config(), "tiny": TINY}


@dataclass(frozen=True)
class SoftmaxConfig(Config):
    """`avid-softmax`: what the report states is tagged [S2]; all it leaves open is AVID's."""

    form: Literal["nce", "softmax"] = "softmax"  # [S2] eqs. 4.1, 4.4-4.6
    loss_scale: Literal["code", "paper"] = "paper"  # [S2] eq. 4.6 is a sum


SOFTMAX_PRESETS = {
    "paper": SoftmaxConfig(),
    "tiny": SoftmaxConfig(**{**vars(TINY), "form": "softmax", "loss_scale": "paper"}),
}


# ---- losses: per sample, no state -----------------------------------------------------------------------------


def nce(score_pos_BP: Tensor, score_neg_BK: Tensor, partition: Tensor | float) -> Tensor:
    """L_NCE of eqs. 1-3 (Gutmann and Hyvarinen; as in Wu et al.): (B,).

    P(data | s) = e^s / (e^s + K Z);  - mean_p log P(data | s_p) - sum_k log(1 - P(data | s_k)).
    With c = log(K Z), P is the logistic function of s - c.
    """
    c = torch.log(torch.as_tensor(partition, dtype=torch.float64) * score_neg_BK.shape[1]).to(score_neg_BK)
    return -F.logsigmoid(score_pos_BP - c).mean(1) - F.logsigmoid(c - score_neg_BK).sum(1)


def softmax_contrast(score_pos_BP: Tensor, score_neg_BK: Tensor) -> Tensor:
    """Report eqs. 4.1, 4.4-4.6: - log( e^s+ / (e^s+ + sum_k e^s_k) ), mean over positives: (B,)."""
    noise_B1 = torch.logsumexp(score_neg_BK, 1, keepdim=True)
    return -F.logsigmoid(score_pos_BP - noise_B1).mean(1)


Contrast = Callable[[Tensor, Tensor], Tensor]


def _contrast(query_BD: Tensor, pos_BPD: Tensor, neg_BKD: Tensor, temperature: float, contrast: Contrast) -> Tensor:
    return contrast(scores(query_BD, pos_BPD, temperature), scores(query_BD, neg_BKD, temperature))


def scores(query_BD: Tensor, target_BKD: Tensor, temperature: float) -> Tensor:
    """s = q . m / t: (B, K)."""
    return torch.einsum("bd,bkd->bk", query_BD, target_BKD) / temperature


def video_to_audio(v_BD: Tensor, pos_BP2D: Tensor, neg_BK2D: Tensor, temperature: float, contrast: Contrast) -> Tensor:
    """L(v_i; a-bar_i, N_i): first term of eq. 2; with softmax the first of eq. 4.6."""
    return _contrast(v_BD, pos_BP2D[:, :, 1], neg_BK2D[:, :, 1], temperature, contrast)


def audio_to_video(a_BD: Tensor, pos_BP2D: Tensor, neg_BK2D: Tensor, temperature: float, contrast: Contrast) -> Tensor:
    """L(a_i; v-bar_i, N_i): second term of eq. 2; with softmax the second of eq. 4.6."""
    return _contrast(a_BD, pos_BP2D[:, :, 0], neg_BK2D[:, :, 0], temperature, contrast)


def video_to_video(v_BD: Tensor, pos_BP2D: Tensor, neg_BK2D: Tensor, temperature: float, contrast: Contrast) -> Tensor:
    """L(v_i; v-bar_i, N_i): first term of eq. 1; with softmax eq. 4.4."""
    return _contrast(v_BD, pos_BP2D[:, :, 0], neg_BK2D[:, :, 0], temperature, contrast)


def audio_to_audio(a_BD: Tensor, pos_BP2D: Tensor, neg_BK2D: Tensor, temperature: float, contrast: Contrast) -> Tensor:
    """L(a_i; a-bar_i, N_i): second term of eq. 1; with softmax eq. 4.5."""
    return _contrast(a_BD, pos_BP2D[:, :, 1], neg_BK2D[:, :, 1], temperature, contrast)


def term_weights(variant: str, loss_scale: str) -> dict[str, float]:
    """Eqs. 1-3 as weights of the four terms: 1 each in the papers, 1 / (number of terms) in the code."""
    names = VARIANTS[variant]
    return {name: 1.0 if loss_scale == "paper" else 1 / len(names) for name in names}


# ---- the method ------------------------------------------------------------------------------------------------


class Avid(nn.Module):
    """Towers, memory bank of `n_rows` videos, partition constant. See `trainers` for the contract."""

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__()
        self.config = config
        self.towers = Towers(
            seed=config.seed,
            video_depth=config.video_depth,
            audio_depth=config.audio_depth,
            width=config.width,
            small=config.small,
            pool=config.pool,
            hidden=config.hidden,
            dim=config.dim,
            head_batch_norm=config.head_batch_norm,
        )
        self.bank = MemoryBank(n_rows, config.dim, config.seed, config.bank_momentum)
        self.partition: Tensor | None = None  # Z, 0-dim float64: mean e^s of the first batch, then frozen
        self.needs = Needs(
            frames=config.frames,
            fps=config.fps,
            size=config.size,
            seconds=config.seconds,
            front_end=config.front_end,
            max_offset=config.max_offset,
        )
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`step`, so that DistributedDataParallel sees the pass."""
        return self.step(batch)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """This rank's loss (world * local sum / global count) and detached metrics of the same scale."""
        v_BD, a_BD = self.towers(batch.video, batch.audio, batch.has_picture, batch.has_sound)
        mask_B2 = torch.stack([batch.has_picture, batch.has_sound], 1)
        if self.training:
            self._pending.append((batch.position, batch.row, torch.stack([v_BD, a_BD], 1).detach(), mask_B2))
        with torch.autocast(v_BD.device.type, enabled=False):
            pos_B12D, neg_BK2D = self._targets(batch)
            both_B = mask_B2.all(1)
            contrast: Contrast = softmax_contrast
            if self.config.form == "nce":
                if self.partition is None:
                    self.partition = self.first_partition(v_BD, neg_BK2D, batch.has_picture, both_B)
                contrast = partial(nce, partition=self.partition)
            terms: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
                "video_to_audio": (video_to_audio, v_BD, both_B),
                "audio_to_video": (audio_to_video, a_BD, both_B),
                "video_to_video": (video_to_video, v_BD, batch.has_picture),
                "audio_to_audio": (audio_to_audio, a_BD, batch.has_sound),
            }
            weights = term_weights(self.config.variant, self.config.loss_scale)
            loss_TB = torch.stack(
                [
                    terms[name][0](terms[name][1], pos_B12D, neg_BK2D, self.config.temperature, contrast)
                    for name in weights
                ]
            )
            mean_T = global_means(loss_TB, torch.stack([terms[name][2] for name in weights]))
            loss = (mean_T * mean_T.new_tensor(list(weights.values()))).sum()
        metrics: dict[str, float | Tensor] = {"loss": loss.detach()}
        metrics |= dict(zip(weights, mean_T.detach().unbind(), strict=True))
        if self.partition is not None:
            metrics["partition"] = self.partition
        metrics["feature_std_video"] = feature_std(v_BD, batch.has_picture)
        metrics["feature_std_audio"] = feature_std(a_BD, batch.has_sound)
        return loss, metrics

    def first_partition(self, v_BD: Tensor, neg_BK2D: Tensor, picture_B: Tensor, both_B: Tensor) -> Tensor:
        """Z from the first score type evaluated, as the code does: v -> a-bar, or v -> v-bar for Self."""
        own = self.config.variant == "self"
        score_BK = scores(v_BD.detach(), neg_BK2D[:, :, 0 if own else 1], self.config.temperature)
        return estimate_partition(score_BK, picture_B if own else both_B)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 1, 2, D) own memory and (B, K, 2, D) memories of other videos, without gradient."""
        negative_BK = draw_negatives(
            len(self.bank),
            self.config.negatives,
            batch.row[:, None],
            seed=batch.seed,
            epoch=batch.epoch,
            row_B=batch.row,
            draw_B=batch.draw,
        )
        return self.bank.memory[batch.row][:, None], self.bank.memory[negative_BK]

    def after_step(self) -> dict[str, float]:
        """Move the bank by the embeddings of every `step` since the last call (several with accumulation)."""
        if not self._pending:
            return {}
        position, row, embedding, mask = (torch.cat(x) for x in zip(*self._pending, strict=True))
        self._pending.clear()
        return self.bank.update(position, row, embedding, mask)

    def start_epoch(self, epoch: int) -> dict[str, float]:
        """Nothing to prepare: negatives are drawn per step."""
        return {}

    def method_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside `state_dict()`: bank, what was ever seen, Z. Live tensors, no copies."""
        state = {f"bank.{name}": x for name, x in self.bank.state().items()}
        return state if self.partition is None else state | {"partition": self.partition}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. Raises ConflictError for a bank of another selection or width."""
        self.bank.load_state({k.removeprefix("bank."): x for k, x in state.items() if k.startswith("bank.")})
        z = state.get("partition")
        self.partition = None if z is None else z.to(self.bank.memory.device, torch.float64).clone()
        self._pending.clear()

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """Towers `video`, `audio` (unit length) and `video-trunk`, `audio-trunk`. See `Towers.embed`."""
        return self.towers.embed(video, audio)
