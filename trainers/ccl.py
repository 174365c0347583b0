"""CCL: compositional contrastive learning (Chen, Xian, Koepke, Shan, Akata; CVPR 2021), as "Audio Focused Multimodal
Learning" prints it: chapter 6, eqs. 6.1-6.5, and with what the authors' code does beyond it.

A video network learns from two teachers that never saw video: one of sound, one of images. What they know may have
little to do with what happens in a video, so each teacher's vector is composed with the student's, the composition has
to tell the video's class too, and the student is pulled towards teacher and composition of videos of its own class.

    avstore train avid && avstore train ccl                                  # a run as both teachers
    avstore train ccl --set audio_teacher=FEATURES.zarr/embeddings/panns/audio-trunk   # given vectors
    avstore train ccl --set image_teacher=resnet34.safetensors#image-resnet-34                        # a weights file
    avstore train ccl --set teachers=audio                                   # Table 7.4; image, both
    avstore train ccl --preset code                                          # the authors' code

Sources of teachers: `teacher.py`. What the report leaves open, and what differs:
* It sums nothing up: the loss is eq. 6.1 + 6.4 + 6.5. Neither temperatures nor lambda are printed: those of the code,
  which has no lambda, and one half. The index under the sum of eq. 6.2 is j.
* Preset `code` (`loss_scale=code`): eq. 6.3 in both directions, and two losses with an optimiser each. The student
  learns from its classification and, for each teacher, L_nce with the teacher, L_nce with the composition and a
  symmetric KL divergence of its classes and the composition's (weight 0.5), these three halved with two teachers. The
  composition and its classifier learn from their classification, the same L_nce and divergence, unhalved, and L_nce
  of composition and teacher. So no classification of a composition reaches the student. The report has one loss, no
  divergence, no L_nce of composition and teacher.
* The code clears no gradient between its two passes backward, so its last version adds the student's loss to the
  compositions' gradients; its first one does not, and neither do we.
* f_theta is Linear([x_a / |x_a|, x_v / |x_v|]); its residual takes the teacher's vector as it is [C].
* 1 - p of eq. 6.3 is the sum of the other probabilities, exact where p rounds to 1; 1e-10 inside logarithms [C]. A row
  without a negative (one class in the batch) has no such term, where the code divides by zero. Rows are the global
  batch's, over all GPUs.
* A teacher whose vectors have another length than the student's features is mapped to it by a linear layer [ours].
* An image network sees the clip's middle picture, the code one random frame; a clip that a teacher does not know is
  left out of that teacher's terms, and one without a label out of all.
* One optimiser; the code's others, of the compositions, never lower their rate. A layer that maps a teacher's vectors
  learns with the compositions.
"""

# legend: B clips of this rank, n those with picture and label, N those of all ranks that a teacher knows, C classes
# D features; x_v student, x_t a teacher's (x_a sound, x_i image), x_tv composition

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from avstore.views import RandomView
from trainers import backbones
from trainers.backbones import VIDEO
from trainers.batch import Batch
from trainers.distributed import all_gather_rows, gather_with_grad, global_means
from trainers.encoders import encode
from trainers.needs import Needs
from trainers.spread import feature_std
from trainers.stateless import Stateless
from trainers.teacher import Teacher, kind_of
from trainers.towers import at_least_float32, unit

NAMES: dict[str, tuple[str, ...]] = {"both": ("audio", "image"), "audio": ("audio",), "image": ("image",)}
EPSILON = 1e-10


@dataclass(frozen=True)
class Config:
    """Defaults: the report's equations with the code's numbers. [S2] the report, [C] the authors' code, [ours]."""

    teachers: Literal["both", "audio", "image"] = "both"  # [S2] Table 7.4: 70.0 (UCF51), audio 64.9, image 69.1
    audio_teacher: str = "runs/avid"  # [ours] [C] vectors of PANNs' CNN14; a run, weights file or column of vectors
    image_teacher: str = "runs/avid"  # [ours] [C] ResNet-34 of ImageNet
    audio_dim: int = 512  # [C] length of the audio teacher's vectors
    image_dim: int = 512  # [C] of the image teacher's
    audio_temperature: float = 0.5  # [C]
    image_temperature: float = 0.1  # [C]
    mix: float = 0.5  # [ours] lambda of eqs. 6.4, 6.5; with loss_scale=code there is none
    loss_scale: Literal["report", "code"] = "report"  # [S2] eqs. 6.1 + 6.4 + 6.5; code: [C] two losses of plain sums
    symmetric: bool = False  # [S2] eq. 6.3; True: [C] also from teacher to student
    divergence: float = 0.0  # [S2] none; [C] 0.5: weight of the symmetric KL of student and composition
    video_net: str = "vcop-r2plus1d"  # [C] R(2+1)D, one block per stage
    width: int = 64  # [C] 512 features
    pool: Literal["max", "avg"] = "avg"  # [C]
    frames: int = 16  # [C]
    fps: int | Literal["native"] = "native"  # [C] temporal stride 1
    size: int = 112  # [C]
    seconds: float = 2.0  # [ours] sound for a teacher that listens: AVID's window
    front_end: str = "avid-linear257"  # [ours] that of the teacher's run
    optimiser: Literal["adam", "adamw", "sgd"] = "sgd"  # [C]
    learning_rate: float = 1e-3  # [C]
    momentum: float = 0.9  # [C]
    weight_decay: float = 5e-4  # [C]
    schedule: Literal["constant", "cosine", "multistep"] = "multistep"  # [C] a tenth at each milestone
    milestones: tuple[int, ...] = (150, 225)  # [C] epochs
    warmup_steps: int = 0  # [C]
    batch: int = 16  # [C]
    epochs: int = 300  # [C]
    draws: int = 1  # [C]
    seed: int = 0  # [ours]
    crop: Literal["resized", "random"] = "resized"  # [C]
    crop_area: tuple[float, float] = (0.25, 1.0)  # [C] of a random resized crop
    flip: float = 0.5  # [C]
    brightness: float = 0.0  # [C] no jitter of colours
    contrast: float = 0.0  # [C] likewise
    saturation: float = 0.0  # [C] likewise
    hue: float = 0.0  # [C] likewise
    sound_gain: float = 0.0  # [C] its teacher of sound is a column of vectors

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}"
            for name, allowed in (
                ("teachers", tuple(NAMES)),
                ("loss_scale", ("report", "code")),
                ("video_net", tuple(VIDEO)),
                ("pool", ("max", "avg")),
                ("crop", ("resized", "random")),
            )
            if getattr(self, name) not in allowed
        ]
        wrong += [
            f"{name} {getattr(self, name)} must be at least 1"
            for name in ("audio_dim", "image_dim", "width", "frames", "size", "batch", "epochs", "draws")
            if getattr(self, name) < 1
        ]
        wrong += [
            f"{name} {getattr(self, name)} must be above 0"
            for name in ("audio_temperature", "image_temperature", "learning_rate", "seconds")
            if not getattr(self, name) > 0
        ]
        if not 0 <= self.mix <= 1:
            wrong.append(f"mix {self.mix} must lie in [0, 1]")
        if self.divergence < 0:
            wrong.append(f"divergence {self.divergence} must not be negative")
        if wrong:
            raise UsageError("the configuration of ccl does not hold", "; ".join(wrong), "correct it with --set")

    def settled(self) -> dict[str, Any]:
        """The code's loss has no lambda: another one than the default would do nothing."""
        return {"mix": Config.mix} if self.loss_scale == "code" else {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the teachers: 'audio', 'image'."""
        return NAMES.get(self.teachers, ())

    def sources(self) -> tuple[str, ...]:
        """Of the teachers."""
        return tuple(str(getattr(self, f"{name}_teacher")) for name in self.names)

    def needs(self) -> Needs:
        """Pictures and labels; sound only for a teacher that listens, not for one whose vectors are given."""
        sound = "audio" in self.names and kind_of(self.audio_teacher) != "vectors"
        return Needs(
            frames=self.frames,
            fps=self.fps,
            size=self.size,
            seconds=self.seconds if sound else 0.0,
            front_end=self.front_end if sound else None,
            sound=sound,
            labels=True,
        )


CODE = replace(Config(), loss_scale="code", symmetric=True, divergence=0.5)
# a CPU and a minute: taught by the tiny run of AVID, on its sound [ours]
TINY = replace(
    Config(),
    audio_dim=128,
    image_dim=128,
    video_net="avid-r2plus1d-10",
    width=16,
    frames=8,
    fps=8,
    size=64,
    optimiser="adam",
    learning_rate=2e-3,
    weight_decay=1e-5,
    schedule="cosine",
    warmup_steps=20,
    batch=24,
    epochs=16,
    draws=2,
    crop_area=(0.6, 1.0),
    sound_gain=0.1,
)
PRESETS = {"paper": Config(), "code": CODE, "tiny": TINY}


def clips(config: Config, sample_rate: int) -> RandomView:
    """Consecutive frames at a random place; sound, where a teacher listens, begins with them."""
    return RandomView()


# ---- losses: rows of a batch, no state ---------------------------------------------------------------------------


def probabilities(x_ND: Tensor, y_ND: Tensor, temperature: float) -> Tensor:
    """Eq. 6.2 without its logarithm: p_ij = softmax over j of cos(x_i, y_j) / t: (N, N)."""
    return torch.softmax(unit(x_ND) @ unit(y_ND).T / temperature, 1)


def class_aware_nce(x_ND: Tensor, y_ND: Tensor, label_N: Tensor, temperature: float) -> Tensor:
    """Eq. 6.3 for each x_i: (N,).

    - mean over j of its class of log p_ij - mean over the other j of log(1 - p_ij); no second term without such j.
    """
    p_NN = probabilities(x_ND, y_ND, temperature)
    others_NN = p_NN @ (1 - torch.eye(len(p_NN), dtype=p_NN.dtype, device=p_NN.device))  # 1 - p, to the last digit
    same_NN = (label_N[:, None] == label_N).to(p_NN.dtype)
    pull = -(torch.log(p_NN + EPSILON) * same_NN).sum(1) / same_NN.sum(1)
    push = -(torch.log(others_NN + EPSILON) * (1 - same_NN)).sum(1) / (1 - same_NN).sum(1).clamp(min=1)
    return pull + push


def distillation(direct: Tensor, composed: Tensor, mix: float, loss_scale: str, teachers: int) -> Tensor:
    """Eqs. 6.4, 6.5: lambda L_nce(x_v, x_t) + (1 - lambda) L_nce(x_v, x_tv); code: the student's sum / `teachers`."""
    return mix * direct + (1 - mix) * composed if loss_scale == "report" else (direct + composed) / teachers


def symmetric_kl(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """[C] KL(p || q) + KL(q || p) of the softmax of two logits: (B,)."""
    p, q = F.log_softmax(p_BC, 1), F.log_softmax(q_BC, 1)
    return ((p.exp() - q.exp()) * (p - q)).sum(1)


# ---- the method --------------------------------------------------------------------------------------------------


class Composition(nn.Module):
    """F_tv of section 6.2: x_t + f_theta(x_t, x_v), f_theta a linear layer of both, each of unit length: (n, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.f_theta = nn.Linear(2 * dim, dim)

    def forward(self, x_t: Tensor, x_v: Tensor) -> Tensor:
        return x_t + self.f_theta(torch.cat([unit(x_t), unit(x_v)], 1))


class Ccl(Stateless):
    """The student and its classifier; for each teacher a composition with a classifier of its own."""

    def __init__(self, config: Config, n_rows: int, classes: tuple[str, ...]) -> None:
        super().__init__()
        if len(classes) < 2:
            raise UsageError(f"{len(classes)} classes to tell apart", "labels are the names of the selection's folders")
        self.config, self.classes, self.needs = config, classes, config.needs()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would also seed every GPU, for good
            self.video = backbones.video_net(config.video_net, config.width, pool=config.pool)
            self.classifier = nn.Linear(self.video.dim, len(classes))
            self.teachers, self.adapters = nn.ModuleDict(), nn.ModuleDict()
            self.compositions, self.composed_classifiers = nn.ModuleDict(), nn.ModuleDict()
            for name, source in zip(config.names, config.sources(), strict=True):
                dim: int = getattr(config, f"{name}_dim")
                self.teachers[name] = Teacher(source, "audio" if name == "audio" else "video", dim)
                same = dim == self.video.dim
                self.adapters[name] = nn.Identity() if same else nn.Linear(dim, self.video.dim)
                self.compositions[name] = Composition(self.video.dim)
                self.composed_classifiers[name] = nn.Linear(self.video.dim, len(classes))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`step`, so that DistributedDataParallel sees the pass."""
        return self.step(batch)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Eqs. 6.1 + 6.4 + 6.5; this rank's share of the classification, the whole batch' distillation.

        With loss_scale=code the sum of the student's loss and the compositions', no parameter of which shares a
        gradient with the other.
        """
        if batch.video is None or batch.labels is None:
            raise UsageError("a batch without pictures or without labels", "this method learns from both")
        taught_B = batch.has_picture & (batch.labels >= 0)
        x_BD = at_least_float32(encode([self.video], batch.video, taught_B))
        with torch.autocast(x_BD.device.type, enabled=False):
            logit_BC = self.classifier(x_BD)
            label_B = batch.labels.clamp(min=0)
            right_B = (logit_BC.argmax(1) == label_B).to(x_BD.dtype)
            own = torch.stack([F.cross_entropy(logit_BC, label_B, reduction="none"), right_B])
            cls, accuracy = global_means(own, taught_B.expand(2, -1))
            loss, metrics = cls, {"cls": cls.detach(), "accuracy": accuracy.detach()}
            for name in self.config.names:
                here_B = taught_B & self.teachers[name].known(batch)  # type: ignore[operator]
                term, said = self._taught(name, batch, x_BD, logit_BC, label_B, here_B)
                loss, metrics = loss + term, metrics | said
        metrics = {"loss": loss.detach(), **metrics, "feature_std_video": feature_std(unit(x_BD), taught_B)}
        return loss, metrics

    def _taught(
        self, name: str, batch: Batch, x_BD: Tensor, logit_BC: Tensor, label_B: Tensor, here_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What one teacher adds: its composition's classification, its distillation."""
        c, temperature = self.config, getattr(self.config, f"{name}_temperature")
        t_BD = self.adapters[name](self.teachers[name](batch).to(x_BD))
        label_N = all_gather_rows(label_B[here_B])

        def gathered(y_BD: Tensor) -> Tensor:
            return gather_with_grad(y_BD[here_B])

        code = c.loss_scale == "code"
        x_ND, t_ND = gathered(x_BD), gathered(t_BD)
        tv_BD, composed_BC = self._compose(name, t_BD, x_BD.detach() if code else x_BD)
        tv_ND = gathered(tv_BD)
        if code:  # what the student learns from: compositions whose parameters are constants
            fixed_BD, fixed_BC = self._compose(name, t_BD.detach(), x_BD, fixed=True)
            direct = self._nce(x_ND, t_ND.detach(), label_N, temperature)
            composed = self._nce(x_ND, gathered(fixed_BD), label_N, temperature)
        else:
            fixed_BC = composed_BC
            direct = self._nce(x_ND, t_ND, label_N, temperature)
            composed = self._nce(x_ND, tv_ND, label_N, temperature)
        each = torch.stack([
            F.cross_entropy(composed_BC, label_B, reduction="none"), symmetric_kl(logit_BC, fixed_BC),
        ])  # fmt: skip
        cls, apart = global_means(each, here_B.expand(2, -1))
        told = distillation(direct, composed, c.mix, c.loss_scale, len(c.names))
        said = {f"cls_{name}": cls, f"nce_{name}": direct, f"nce_composed_{name}": composed}
        if not code:
            return cls + told + c.divergence * apart, {k: y.detach() for k, y in said.items()}
        student = told + c.divergence * apart / len(c.names)
        (mine,) = global_means(symmetric_kl(logit_BC.detach(), composed_BC)[None], here_B[None])
        said[f"nce_rectified_{name}"] = rectified = self._nce(tv_ND, t_ND, label_N, temperature)
        composition = cls + self._nce(x_ND.detach(), tv_ND, label_N, temperature) + rectified + c.divergence * mine
        return student + composition, {k: y.detach() for k, y in said.items()}

    def _compose(self, name: str, t_BD: Tensor, x_BD: Tensor, fixed: bool = False) -> tuple[Tensor, Tensor]:
        """The composition and its classes; `fixed`: no gradient to its parameters, only to what it is given."""
        out = []
        given: tuple[Tensor, ...] = (t_BD, x_BD)
        for module in (self.compositions[name], self.composed_classifiers[name]):
            parameters = {k: p.detach() if fixed else p for k, p in module.named_parameters()}
            out.append(torch.func.functional_call(module, parameters, given))
            given = (out[-1],)
        return out[0], out[1]

    def _nce(self, x_ND: Tensor, y_ND: Tensor, label_N: Tensor, temperature: float) -> Tensor:
        if not len(x_ND):
            return (x_ND.sum() + y_ND.sum()) * 0
        loss = class_aware_nce(x_ND, y_ND, label_N, temperature).mean()
        return loss + class_aware_nce(y_ND, x_ND, label_N, temperature).mean() if self.config.symmetric else loss

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """The student alone: 'video-trunk', and 'video', its direction. Sound has no tower: nothing for it."""
        if video is None:
            return {}
        trunk = at_least_float32(self.video(video))
        return {"video": unit(trunk), "video-trunk": trunk}
