"""SSCL: self-supervised curriculum learning (Zhang, Xu, Shen, Lu, Liu, Shen; AAAI 2021), as "Audio Focused Multimodal
Learning" prints it: chapter 5, eqs. 4.4, 4.5, 5.1, 5.2. No public code.

Sight and sound do not learn at the same pace, so one teaches the other in turns. Stage I: sight learns alone to tell
its videos apart, then teaches sound, which looks for the memory of its video's sight among those of others. Stage II
exchanges the roles: sound learns alone, then sight looks for the memory of its sound.

    avstore train sscl                    # trains stage I first, as a run of its own in runs/sscl-stage-1
    avstore train sscl-stage-1            # stage I alone: the first row of Tables 7.2 and 7.3
    avstore train sscl --preset tiny --set joint=live

Each stage begins with `teacher_epochs` of the teacher alone (the student is not even run: neither its weights nor its
batch statistics move), the rest of its epochs trains both. What the report leaves open, and what differs:
* K, t, the momenta, epochs and the optimiser are AVID's; lambda_v = lambda_a is an ordinary constant ("to be learned"
  is a slip), and memories are of unit length.
* "Jointly trained" cannot be eq. 5.1 alone, whose teacher is a constant memory. Default `uni+cross`: the teacher goes
  on with its own eq. 4.4 (4.5), weighed alike. `cross`: eq. 5.1 (5.2) as printed, the teacher only moves its memory.
  `live`: the positive of eq. 5.1 (5.2) is the teacher's present embedding, so that its gradient reaches both.
* Both memories move whenever their network is run, so stage II starts with what sound learned in stage I.
* The 3-D network has no name in the report; ours is AVID's. The heads are AVID's too, and so are crops, colours, gain.
"""

# legend: B batch, K negatives, N videos of the selection, D embedding
# v, a: embeddings of this batch; memory tensors (..., 2, D): index 0 sight (v-bar), index 1 sound (a-bar)

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError, did_you_mean
from trainers.bank import MemoryBank
from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.encoders import encode
from trainers.needs import Needs
from trainers.negatives import draw_negatives
from trainers.spread import feature_std
from trainers.towers import Towers, unit


@dataclass(frozen=True)
class Config:
    """Of a stage; both have the same. [S2] the report, [C] AVID's code, [ours] declared choice."""

    teacher_epochs: int = 10  # [ours] the teacher alone; the rest of `epochs` trains both
    joint: Literal["uni+cross", "cross", "live"] = "uni+cross"  # [ours] what trains the teacher beside the student
    negatives: int = 1024  # [C] K; [S2] gives no number
    temperature: float = 0.07  # [C]
    bank_momentum: float = 0.5  # [C] lambda_v = lambda_a of eqs. 4.2, 4.3
    video_net: str = "avid-r2plus1d-18"  # [ours] [S2] names none
    audio_net: str = "resnet-10"  # [S2] Table 7.3, "2D-ResNet10"
    width: int = 64  # [ours] channels of the first stage
    pool: Literal["max", "avg"] = "avg"  # [ours]
    hidden: int = 512  # [C] of the heads
    dim: int = 128  # [C]
    head_batch_norm: bool = False  # [C]; True in the tiny preset [ours]
    frames: int = 16  # [S2] Table 7.2: 16 x 112, 16 x 224, 32 x 224
    fps: int = 16  # [ours]
    size: int = 112  # [S2] Table 7.2
    seconds: float = 2.0  # [C]
    front_end: str = "avid-linear257"  # [C]
    max_offset: float = 0.5  # [C]
    learning_rate: float = 2e-4  # [C] Adam, constant
    warmup_steps: int = 0  # [C]
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # [C]
    weight_decay: float = 1e-5  # [C]
    batch: int = 256  # [C]
    epochs: int = 30  # [C] of each stage
    draws: int = 10  # [C] clips per video and epoch
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        for name, allowed in (
            ("joint", ("uni+cross", "cross", "live")),
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
        if not 0 <= self.teacher_epochs < self.epochs:
            wrong.append(
                f"teacher_epochs {self.teacher_epochs} must lie in 0 .. epochs - 1 ({self.epochs - 1}): "
                "the student learns in the rest"
            )
        if wrong:
            raise UsageError("the configuration of sscl does not hold", "; ".join(wrong), "correct it with --set")


TINY = replace(  # a few hundred clips on a CPU [ours]
    Config(),
    teacher_epochs=2,
    video_net="avid-r2plus1d-10",
    audio_net="avid-conv2d-10",
    width=16,
    hidden=128,
    head_batch_norm=True,
    frames=8,
    fps=8,
    size=64,
    front_end="avid-linear129",
    negatives=64,
    batch=24,
    learning_rate=2e-3,
    warmup_steps=10,
    schedule="cosine",
    epochs=8,
    draws=2,
)
SMALL = replace(  # a CPU within hours, or a GPU in minutes [ours]
    TINY,
    teacher_epochs=10,
    width=32,
    hidden=256,
    fps=16,
    size=112,
    negatives=256,
    batch=64,
    learning_rate=5e-4,
    warmup_steps=50,
    epochs=30,
    draws=4,
)
PRESETS = {"paper": Config(), "small": SMALL, "tiny": TINY}


# ---- losses: per sample, no state -----------------------------------------------------------------------------


def softmax_contrast(query_BD: Tensor, pos_BD: Tensor, neg_BKD: Tensor, temperature: float) -> Tensor:
    """- log( e^(q . m+ / t) / sum over the K + 1 of e^(q . m / t) ): (B,)."""
    pos_B = (query_BD * pos_BD).sum(1) / temperature
    neg_BK = torch.einsum("bd,bkd->bk", query_BD, neg_BKD) / temperature
    return -F.logsigmoid(pos_B - torch.logsumexp(neg_BK, 1))


def visual_uni(v_BD: Tensor, own_B2D: Tensor, neg_BK2D: Tensor, temperature: float) -> Tensor:
    """Eq. 4.4: v_i against its own memory v-bar_i and those of others."""
    return softmax_contrast(v_BD, own_B2D[:, 0], neg_BK2D[:, :, 0], temperature)


def audio_uni(a_BD: Tensor, own_B2D: Tensor, neg_BK2D: Tensor, temperature: float) -> Tensor:
    """Eq. 4.5: a_i against its own memory a-bar_i and those of others."""
    return softmax_contrast(a_BD, own_B2D[:, 1], neg_BK2D[:, :, 1], temperature)


def audio_cross(a_BD: Tensor, own_B2D: Tensor, neg_BK2D: Tensor, temperature: float) -> Tensor:
    """Eq. 5.1: the student a_i looks for its teacher's memory v-bar_i."""
    return softmax_contrast(a_BD, own_B2D[:, 0], neg_BK2D[:, :, 0], temperature)


def video_cross(v_BD: Tensor, own_B2D: Tensor, neg_BK2D: Tensor, temperature: float) -> Tensor:
    """Eq. 5.2: the student v_i looks for its teacher's memory a-bar_i."""
    return softmax_contrast(v_BD, own_B2D[:, 1], neg_BK2D[:, :, 1], temperature)


# ---- the method ------------------------------------------------------------------------------------------------


class Sscl(nn.Module):
    """A stage: towers and memory bank of `n_rows` videos. `StageOne` and `StageTwo` say who teaches."""

    teacher: ClassVar[int]  # 0 sight, 1 sound
    unused_parameters = True  # the student's, while the teacher learns alone

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__()
        self.config = config
        self.towers = Towers(
            seed=config.seed,
            video_net=config.video_net,
            audio_net=config.audio_net,
            width=config.width,
            pool=config.pool,
            hidden=config.hidden,
            dim=config.dim,
            head_batch_norm=config.head_batch_norm,
        )
        self.bank = MemoryBank(n_rows, config.dim, config.seed, config.bank_momentum)
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

    def load_stage_one(self, weights: dict[str, Tensor], method_state: dict[str, Tensor]) -> None:
        """Start from a checkpoint of stage I: towers and memories. ConflictError where nets or videos differ."""
        mine = self.state_dict()
        differing = sorted(
            name
            for name in mine.keys() | weights.keys()
            if name not in mine or name not in weights or mine[name].shape != weights[name].shape
        )
        if differing:
            raise ConflictError(
                f"stage I has other networks: {len(differing)} tensors differ, first {differing[0]}",
                "stage II goes on with its weights",
                "use the same networks, width, head and preset for both",
            )
        self.load_state_dict(weights)
        self.load_method_state(method_state)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """This rank's loss (world * local sum / global count) and detached metrics of the same scale."""
        c, teacher, student = self.config, self.teacher, 1 - self.teacher
        if batch.video is None or batch.audio is None:
            raise UsageError("a batch without pictures or without sound", "this method trains on both")
        alone = batch.epoch < c.teacher_epochs
        here_2 = batch.has_picture, batch.has_sound
        with torch.set_grad_enabled(torch.is_grad_enabled() and (alone or c.joint != "cross")):
            teaching_BD = self._embed(teacher, batch)
        learning_BD = torch.zeros_like(teaching_BD) if alone else self._embed(student, batch)
        there_2 = [here if n == teacher or not alone else torch.zeros_like(here) for n, here in enumerate(here_2)]
        if self.training:
            both = (teaching_BD, learning_BD) if teacher == 0 else (learning_BD, teaching_BD)
            self._pending.append((batch.position, batch.row, torch.stack(both, 1).detach(), torch.stack(there_2, 1)))
        uni, cross = (visual_uni, audio_cross) if teacher == 0 else (audio_uni, video_cross)
        names = ("visual_uni", "audio_cross") if teacher == 0 else ("audio_uni", "video_cross")
        with torch.autocast(teaching_BD.device.type, enabled=False):
            own_B2D, neg_BK2D = self._targets(batch)
            losses: list[Tensor] = []
            masks: list[Tensor] = []
            if alone or c.joint == "uni+cross":
                losses.append(uni(teaching_BD, own_B2D, neg_BK2D, c.temperature))
                masks.append(here_2[teacher])
            if not alone:
                target_B2D = own_B2D
                if c.joint == "live":
                    target_B2D = torch.stack([teaching_BD, teaching_BD], 1)
                losses.append(cross(learning_BD, target_B2D, neg_BK2D, c.temperature))
                masks.append(here_2[0] & here_2[1])
            mean_T = global_means(torch.stack(losses), torch.stack(masks))
            loss = mean_T.sum()
        kept = names[: len(losses)] if len(losses) == 2 or alone else names[1:]
        metrics: dict[str, float | Tensor] = {"loss": loss.detach()}
        metrics |= dict(zip(kept, mean_T.detach().unbind(), strict=True))
        modality = ("video", "audio")
        metrics[f"feature_std_{modality[teacher]}"] = feature_std(teaching_BD, here_2[teacher])
        if not alone:
            metrics[f"feature_std_{modality[student]}"] = feature_std(learning_BD, here_2[student])
        return loss, metrics

    def _embed(self, modality: int, batch: Batch) -> Tensor:
        """(B, D) of unit length; zeros where the modality is missing."""
        t = self.towers
        if modality == 0:
            return unit(encode((t.video, t.video_head), _there(batch.video), batch.has_picture))
        return unit(encode((t.audio, t.audio_head), _there(batch.audio), batch.has_sound))

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 2, D) own memory and (B, K, 2, D) memories of other videos, without gradient."""
        negative_BK = draw_negatives(
            len(self.bank),
            self.config.negatives,
            batch.row[:, None],
            seed=batch.seed,
            epoch=batch.epoch,
            row_B=batch.row,
            draw_B=batch.draw,
        )
        return self.bank.memory[batch.row], self.bank.memory[negative_BK]

    def after_step(self) -> dict[str, float]:
        """Move the memories (eqs. 4.2, 4.3) of the networks that were run, by every `step` since the last call."""
        if not self._pending:
            return {}
        position, row, embedding, mask = (torch.cat(x) for x in zip(*self._pending, strict=True))
        self._pending.clear()
        return self.bank.update(position, row, embedding, mask)

    def start_epoch(self, epoch: int) -> dict[str, float]:
        """Says who learns: joint 0 or 1."""
        return {"joint": float(epoch >= self.config.teacher_epochs)}

    def method_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside `state_dict()`: the memories. Live tensors, no copies."""
        return {f"bank.{name}": x for name, x in self.bank.state().items()}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. Raises ConflictError for a bank of another selection or width."""
        self.bank.load_state({k.removeprefix("bank."): x for k, x in state.items() if k.startswith("bank.")})
        self._pending.clear()

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """Towers `video`, `audio` (unit length) and `video-trunk`, `audio-trunk`. See `Towers.embed`."""
        return self.towers.embed(video, audio)


class StageOne(Sscl):
    """Sight teaches, sound learns: eq. 4.4, then 5.1."""

    teacher = 0


class StageTwo(Sscl):
    """Sound teaches, sight learns: eq. 4.5, then 5.2. Starts from stage I: `load_stage_one`."""

    teacher = 1


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
