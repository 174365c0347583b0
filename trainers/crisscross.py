"""CrissCross: "Self-supervised audio-visual representation learning with relaxed cross-modal synchronicity" (Sarkar,
Etemad; AAAI 2023), after its poster and the authors' code.

Two views of a video, each with picture and sound, at two times t1 and t2. Every view has to predict the others: the
same modality at the other time (intra), the other modality at its own time (sync), and, which is new, the other
modality at the *other* time (async): relations without a frame-wise coupling generalise better. Predictor and
stop-gradient keep the constant answer away, as in SimSiam: no negatives, no momentum encoder, no memory.

    avstore train crisscross                                   # defaults: the released Kinetics-400 run
    avstore train crisscross --preset tiny --set relaxation=extreme
    avstore train crisscross --set async_12=0 --set async_21=0     # Tab. 1, "w/o L_async"

What differs from the poster or the authors' code, and why:
* The poster prints D(p, z) without its minus sign, and L = 1/3 (L_intra + L_sync + L_async), which is twice the code's
  mean of the six pairs. Default: the code's scale and sign, so that a collapsed net has -1; `loss_scale=paper`: -2.
* A coefficient multiplies its pair, and the sum is divided by the number of pairs whose coefficient is not 0: six, or
  the code's four without async.
* Both modalities of a view are cut from one window of the video's clock (`avstore.windows.two_views`), which is
  stricter than the code, where the picture of a view may miss its sound. `loose=True` cuts as the code does.
* Each view goes through the networks alone, so batch statistics are of one view, as SimSiam's are.
* The code's optimiser: Adam behind LARC (trust 1e-3, clipped), encoders and projectors warmed up to 2e-4 and by a
  cosine to 1e-4, the predictors at a constant 2e-3 (`trainers/optimiser.py`). `larc=0 predictor_rate=0` is plain Adam.
* Sound: gain, then two masks each way, then BYOL-A's random resized crop (`avstore.augment.crop_rows`), in the code's
  order. Masks are filled with the bins' means over the run's set, the code's with the mean of the clip.
* Pictures: the code's blur hands its range of deviations to a function that takes them as those of the two axes, so it
  always blurs by 2 pixels along the height and not at all along the width; here both have one deviation, drawn in that
  range, over the code's 11 taps. The cut-out multiplies by the mean of the first frame, as the code's does.
* Spectrograms are normalised by the statistics of the run's own selection, not by the authors' two numbers.
"""

# legend: B batch, D width of projections; v1, a1, v2, a2: sight and sound of views 1 and 2
# p: prediction h(f(x)), z: projection f(x), whose gradient is stopped; R: relations (pairs), 6

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from avstore.views import TwoViews
from avstore.windows import RELAXATIONS
from trainers.backbones import AUDIO, VIDEO
from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.encoders import encode
from trainers.needs import Needs
from trainers.projectors import Projector
from trainers.spread import feature_std
from trainers.stateless import Stateless
from trainers.towers import Towers, at_least_float32, unit

# the six relations, by the places of their two ends in (v1, a1, v2, a2); L_intra, L_sync, L_async hold two each
RELATIONS: dict[str, tuple[int, int]] = {
    "intra_video": (0, 2),
    "intra_audio": (1, 3),
    "sync_1": (0, 1),
    "sync_2": (2, 3),
    "async_12": (0, 3),
    "async_21": (2, 1),
}


@dataclass(frozen=True)
class Config:
    """Defaults: the Kinetics-400 run. [S3] the poster, [C] the authors' code, [ours] declared choice."""

    relaxation: Literal["none", "mild", "medium", "mixed", "extreme", "extreme-video", "extreme-audio"] = (
        "mild"  # [C] the released default; the poster names none
    )
    loose: bool = False  # [ours] True: [C] the clips of a view only share a surrounding window
    loss_scale: Literal["code", "paper"] = "code"  # [C] mean of the pairs; paper: one third of three sums, twice that
    intra_video: float = 1.0  # [C] coefficient of (v1, v2)
    intra_audio: float = 1.0  # [C] of (a1, a2)
    sync_1: float = 1.0  # [C] of (v1, a1)
    sync_2: float = 1.0  # [C] of (v2, a2)
    async_12: float = 1.0  # [C] of (v1, a2); 0 in Tab. 1 without L_async
    async_21: float = 1.0  # [C] of (v2, a1); 0 in Tab. 1 without L_async
    video_net: str = "avid-r2plus1d-18"  # [S3] Tab. 3, 15.4 M parameters
    audio_net: str = "resnet-18"  # [C] one channel
    width: int = 64  # [C]
    pool: Literal["max", "avg"] = "avg"  # [C] in pre-training; max in fine-tuning
    hidden: int = 2048  # [C] projector 512 - 2048 - 2048 - 2048
    dim: int = 2048  # [C]
    bottleneck: int = 512  # [C] predictor 2048 - 512 - 2048
    frames: int = 8  # [C]
    fps: int = 16  # [C]
    size: int = 112  # [C]
    seconds: float = 2.0  # [C]
    front_end: str = "crisscross-mel80"  # [C]
    gray: float = 0.2  # [C]
    blur: float = 0.5  # [C]
    cutout: int = 20  # [C] pixels, the largest side
    sound_gain: float = 0.2  # [C]
    time_mask: float = 0.1  # [C] two masks of fewer than 20 of 200 rows
    freq_mask: float = 0.125  # [C] two masks of fewer than 10 of 80 bins
    sound_crop: tuple[float, ...] = (0.6, 1.5)  # [C] BYOL-A's random resized crop; "" for none
    larc: float = 1e-3  # [C] trust coefficient; 0: Adam alone
    learning_rate: float = 2e-4  # [C] Adam, of the encoders and projectors
    final_rate: float = 1e-4  # [C] at the end of the cosine
    predictor_rate: float = 2e-3  # [C] of the predictors, constant; 0: as the rest
    warmup_steps: int = 1133  # [C] 2 epochs of 5 x 232,067 / 2048 steps
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"  # [C]
    weight_decay: float = 1e-4  # [C]
    batch: int = 2048  # [C] 1024 on each of two nodes
    epochs: int = 100  # [C]
    draws: int = 5  # [C] clips per video and epoch
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        for name, allowed in (
            ("relaxation", tuple(RELAXATIONS)),
            ("loss_scale", ("code", "paper")),
            ("video_net", tuple(VIDEO)),
            ("audio_net", tuple(AUDIO)),
            ("pool", ("max", "avg")),
            ("schedule", ("constant", "cosine", "multistep")),
        ):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}")
        wrong += [
            f"{name} {getattr(self, name)} must be at least 1"
            for name in ("width", "hidden", "dim", "bottleneck", "batch", "epochs", "draws")
            if getattr(self, name) < 1
        ]
        if not self.learning_rate > 0:
            wrong.append(f"learning_rate {self.learning_rate} must be above 0")
        if self.predictor_rate < 0:
            wrong.append(f"predictor_rate {self.predictor_rate} must not be negative")
        weights = self.coefficients()
        if min(weights.values()) < 0 or not any(weights.values()):
            wrong.append(f"coefficients {weights} must not be negative, nor all zero")
        if wrong:
            raise UsageError("the configuration of crisscross does not hold", "; ".join(wrong), "correct it with --set")

    def coefficients(self) -> dict[str, float]:
        """Of each of the RELATIONS."""
        return {name: getattr(self, name) for name in RELATIONS}


# a few hundred clips on a CPU [ours]: AVID's small nets, a projector of their size, no blur (a third of the step). In
# so few steps LARC hardly moves anything
TINY = replace(
    Config(),
    video_net="avid-r2plus1d-10",
    audio_net="avid-conv2d-10",
    width=16,
    hidden=256,
    dim=256,
    bottleneck=64,
    frames=8,
    fps=8,
    size=64,
    seconds=1.0,
    gray=0.0,
    blur=0.0,
    cutout=0,
    sound_crop=(),
    larc=0.0,
    learning_rate=2e-3,
    final_rate=0.0,
    predictor_rate=0.0,
    warmup_steps=10,
    weight_decay=1e-5,
    batch=24,
    epochs=8,
    draws=1,
)
PRESETS = {"paper": Config(), "tiny": TINY}


def two_views(config: Config, sample_rate: int) -> TwoViews:
    """How the two views are cut: Fig. 2."""
    return TwoViews(config.relaxation, config.loose)


# ---- losses: per sample, no state -----------------------------------------------------------------------------


def distance(p_BD: Tensor, z_BD: Tensor) -> Tensor:
    """D(p, S(z)) = - p . z / (||p|| ||z||), S the stop-gradient: (B,). The poster leaves the minus away."""
    return -F.cosine_similarity(p_BD, z_BD.detach(), dim=1)


def relation(p_1: Tensor, z_1: Tensor, p_2: Tensor, z_2: Tensor) -> Tensor:
    """1/2 D(p_1, S(z_2)) + 1/2 D(p_2, S(z_1)), one of the six: (B,)."""
    return (distance(p_1, z_2) + distance(p_2, z_1)) / 2


def relations(p_4BD: Tensor, z_4BD: Tensor) -> Tensor:
    """Each of RELATIONS in its order, from predictions and projections of v1, a1, v2, a2: (R, B).

    L_intra is the sum of the first two, L_sync of the next, L_async of the last.
    """
    return torch.stack([relation(p_4BD[i], z_4BD[i], p_4BD[j], z_4BD[j]) for i, j in RELATIONS.values()])


def combine(pair_R: Tensor, coefficients: dict[str, float], loss_scale: str = "code") -> Tensor:
    """L_CrissCross from the means of the relations: their weighted sum over the number of those that count.

    paper: 1/3 (L_intra + L_sync + L_async), each of which is a sum of two: twice the code's.
    """
    kept = sum(1 for c in coefficients.values() if c)
    scale = 2 / kept if loss_scale == "paper" else 1 / kept
    return scale * (pair_R * pair_R.new_tensor(list(coefficients.values()))).sum()


# ---- the method ------------------------------------------------------------------------------------------------


class CrissCross(Stateless):
    """Towers with projectors, and a predictor for each modality. No state beside the weights."""

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__()
        self.config = config
        self.towers = Towers(
            seed=config.seed,
            video_net=config.video_net,
            audio_net=config.audio_net,
            width=config.width,
            pool=config.pool,
            head=lambda inputs: Projector((inputs, config.hidden, config.hidden, config.dim), "all"),
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            sizes = (config.dim, config.bottleneck, config.dim)
            self.video_predictor, self.audio_predictor = Projector(sizes, "hidden"), Projector(sizes, "hidden")
        self.needs = Needs(
            frames=config.frames,
            fps=config.fps,
            size=config.size,
            seconds=config.seconds,
            front_end=config.front_end,
        )

    def own_rates(self) -> dict[str, float]:
        """Beginnings of parameter names -> their constant rate (`optimiser.make_optimiser`)."""
        rate = self.config.predictor_rate
        return {"video_predictor.": rate, "audio_predictor.": rate} if rate else {}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`step`, so that DistributedDataParallel sees the pass."""
        return self.step(batch)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """This rank's loss (world * local sum / global count) and detached metrics of the same scale."""
        if batch.video is None or batch.audio is None:
            raise UsageError("a batch without pictures or without sound", "this method trains on both")
        if batch.video.dim() != 6 or batch.video.shape[1] != 2:
            raise UsageError(f"a batch of shape {tuple(batch.video.shape)}", "it wants two views of each video")
        t, here_2 = self.towers, (batch.has_picture, batch.has_sound)
        nets = ((t.video, t.video_head), self.video_predictor), ((t.audio, t.audio_head), self.audio_predictor)
        projected: list[Tensor] = []
        predicted: list[Tensor] = []
        for view in range(2):
            for (net, predictor), x, here in zip(nets, (batch.video, batch.audio), here_2, strict=True):
                z = encode(net, x[:, view], here)
                # 0 * z: a process without any clip of a modality still reaches its encoder, as DDP asks
                p = encode((predictor,), z, here) + 0 * z
                projected.append(at_least_float32(z))
                predicted.append(at_least_float32(p))
        picture_B, sound_B = here_2
        ends = (picture_B, sound_B, picture_B, sound_B)
        with torch.autocast(projected[0].device.type, enabled=False):
            pair_RB = relations(torch.stack(predicted), torch.stack(projected))
            mask_RB = torch.stack([ends[i] & ends[j] for i, j in RELATIONS.values()])
            mean_R = global_means(pair_RB, mask_RB)
            loss = combine(mean_R, self.config.coefficients(), self.config.loss_scale)
        metrics: dict[str, float | Tensor] = {"loss": loss.detach()}
        metrics |= dict(zip(RELATIONS, mean_R.detach().unbind(), strict=True))
        metrics["feature_std_video"] = feature_std(unit(projected[0]), picture_B)
        metrics["feature_std_audio"] = feature_std(unit(projected[1]), sound_B)
        return loss, metrics

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """Towers `video`, `audio` (projections, unit length) and `video-trunk`, `audio-trunk`. See `Towers.embed`."""
        return self.towers.embed(video, audio)
