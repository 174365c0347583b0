"""Listen to Look: action recognition by previewing audio (Gao, Oh, Grauman, Torresani; CVPR 2020), its clip level, as
"Audio Focused Multimodal Learning" prints it: chapter 3, eqs. 3.1-3.3. The authors released no code of this stage.

A clip's first picture tells most of what it looks like, its sound what happens. So a student that sees one picture and
hears the clip's sound learns to say what a teacher says that watches every frame: the teacher's clip descriptor, and
the teacher's class probabilities. Which moments of a long video to look at with it: `preview.py`, the second stage.

    avstore train avid && avstore train listen-to-look                       # taught by a run
    avstore train listen-to-look --set teacher=runs/supervised --set dim=512  # any run, weights file, column of vectors
    avstore train avid --preset tiny && avstore train listen-to-look --preset tiny

Sources of teachers: `teacher.py`. What the report leaves open, and what differs:
* The teacher's classes. Its network is fixed, as the report asks; its fully-connected layer is trained here, on its
  fixed descriptors with the videos' labels, since a self-supervised teacher has none. No gradient of eq. 3.1 reaches
  that layer, and none of its own cross-entropy the student: labels touch the student through the teacher alone.
  While that layer says all classes are alike, eq. 3.1 says so to the student: it has a rate of its own
  (`teacher_rate`), high and constant, so that the teacher is ahead of its student, as the report's is throughout.
* Eq. 3.1 is named KL; it is the cross-entropy (the gradient is the same).
* Eq. 3.2 is a sum over the descriptor's numbers: at width 512 about as large as eq. 3.1 weighed by 100. `l1=mean`
  divides by the width. Both are means over clips. lambda is not printed: 100 [M].
* Student: image ResNet-18, a sound ResNet-18 with a stem of stride 1 whose last three bins are folded to one before the
  maximum over time, Psi of two layers (1024 - 1024 - 512), as in the code of the second stage. Table 7.1 calls its rows
  ResNet-152 and R(2+1)D-152: the teachers', by their names.
* Crops, colours and gain are AVID's (the loop's defaults): the report names none.
* Towers: `video` is the image descriptor z^I, `audio` z^A, `joint` Psi(z^I, z^A), the only one that the teacher shapes
  directly.
"""

# legend: B clips of this rank, C classes, D the descriptor's width; z_V teacher's, z_I image's, z_A sound's

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from avstore.views import RandomView
from trainers import backbones
from trainers.backbones import AUDIO, IMAGE
from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.encoders import encode
from trainers.needs import Needs
from trainers.projectors import Projector
from trainers.spread import feature_std
from trainers.stateless import Stateless
from trainers.teacher import Teacher
from trainers.towers import at_least_float32, unit


@dataclass(frozen=True)
class Config:
    """[S2] the report, [C] the authors' code of the second stage, [M] recalled, [ours] declared choice."""

    teacher: str = "runs/avid"  # [ours] [S2] a clip model: a run, weights file or column of vectors
    dim: int = 512  # [C] D, length of the teacher's descriptor and of the student's
    kl_weight: float = 100.0  # [M] lambda of eq. 3.3; [S2] prints none
    l1: Literal["sum", "mean"] = "sum"  # [S2] eq. 3.2 over the descriptor; mean: divided by D
    image_net: str = "image-resnet-18"  # [C]
    audio_net: str = "l2l-resnet-18"  # [C]
    width: int = 64  # [C] 512 features each
    hidden: int = 1024  # [C] between the two layers of Psi
    frames: int = 16  # [ours] F, what the teacher watches; the student sees the first
    fps: int = 16  # [ours]
    size: int = 112  # [ours] that of the teacher's crop
    seconds: float = 1.0  # [C] about 101 rows of 10 ms
    front_end: str = "l2l-mel40"  # [C]
    learning_rate: float = 1e-4  # [ours] Adam, which does not mind the scale of a sum
    teacher_rate: float = 1e-2  # [ours] of the teacher's layer alone, constant; 0: as the student's
    weight_decay: float = 1e-5  # [ours]
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"  # [ours]
    warmup_steps: int = 0  # [ours]
    batch: int = 256  # [ours]
    epochs: int = 30  # [ours]
    draws: int = 1  # [ours]
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}"
            for name, allowed in (
                ("l1", ("sum", "mean")),
                ("image_net", tuple(IMAGE)),
                ("audio_net", tuple(AUDIO)),
                ("schedule", ("constant", "cosine", "multistep")),
            )
            if getattr(self, name) not in allowed
        ]
        wrong += [
            f"{name} {getattr(self, name)} must be at least 1"
            for name in ("dim", "width", "hidden", "frames", "size", "batch", "epochs", "draws")
            if getattr(self, name) < 1
        ]
        wrong += [
            f"{name} {getattr(self, name)} must be above 0"
            for name in ("learning_rate", "seconds")
            if not getattr(self, name) > 0
        ]
        wrong += [
            f"{name} {getattr(self, name)} must not be negative"
            for name in ("kl_weight", "teacher_rate")
            if getattr(self, name) < 0
        ]
        if wrong:
            raise UsageError(
                "the configuration of listen-to-look does not hold", "; ".join(wrong), "correct it with --set"
            )


# a CPU and a minute: taught by the tiny run of AVID, hearing as it does [ours]
TINY = replace(
    Config(),
    dim=128,
    audio_net="avid-conv2d-10",
    width=16,
    hidden=128,
    frames=8,
    fps=8,
    size=64,
    front_end="avid-linear129",
    learning_rate=2e-3,
    teacher_rate=0.02,
    warmup_steps=20,
    batch=24,
    epochs=16,
    draws=2,
)
PRESETS = {"paper": Config(), "tiny": TINY}


def clips(config: Config, sample_rate: int) -> RandomView:
    """A clip at a random place, its sound beginning with it."""
    return RandomView()


# ---- losses: per clip, no state ----------------------------------------------------------------------------------


def soft_cross_entropy(teacher_BC: Tensor, student_BC: Tensor) -> Tensor:
    """Eq. 3.1: - sum_c Omega_c(V) log Phi_c(I, A), of logits; no gradient to the teacher's: (B,)."""
    return -(torch.softmax(teacher_BC.detach(), 1) * F.log_softmax(student_BC, 1)).sum(1)


def descriptor_distance(z_BD: Tensor, psi_BD: Tensor, over: str = "sum") -> Tensor:
    """Eq. 3.2: || z^V - Psi(z^I, z^A) ||_1, or that over D: (B,)."""
    each_BD = (z_BD - psi_BD).abs()
    return each_BD.sum(1) if over == "sum" else each_BD.mean(1)


# ---- the method --------------------------------------------------------------------------------------------------


class ListenToLook(Stateless):
    """The student (image, sound, fusion, classifier) and the teacher's fully-connected layer."""

    def __init__(self, config: Config, n_rows: int, classes: tuple[str, ...]) -> None:
        super().__init__()
        if len(classes) < 2:
            raise UsageError(f"{len(classes)} classes to tell apart", "labels are the names of the selection's folders")
        self.config, self.classes = config, classes
        self.teacher = Teacher(config.teacher, "video", config.dim)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would also seed every GPU, for good
            self.image = backbones.image_net(config.image_net, config.width)
            self.audio = backbones.audio_net(config.audio_net, config.width)
            self.fusion = Projector((self.image.dim + self.audio.dim, config.hidden, config.dim))  # Psi
            self.classifier = nn.Linear(config.dim, len(classes))
            self.teacher_classifier = nn.Linear(config.dim, len(classes))
        self.needs = Needs(
            frames=config.frames,
            fps=config.fps,
            size=config.size,
            seconds=config.seconds,
            front_end=config.front_end,
            labels=True,
        )

    def own_rates(self) -> dict[str, float]:
        """The teacher's layer does not follow the student's schedule; see `optimiser`."""
        return {"teacher_classifier.": self.config.teacher_rate} if self.config.teacher_rate else {}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`step`, so that DistributedDataParallel sees the pass."""
        return self.step(batch)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Eq. 3.3, and the cross-entropy of the teacher's own layer; this rank's share of both."""
        if batch.video is None or batch.audio is None or batch.labels is None:
            raise UsageError("a batch without pictures, sound or labels", "this method learns from all three")
        here_B = batch.has_picture & batch.has_sound & self.teacher.known(batch)
        image_BD = encode([self.image], batch.video[:, :, 0], here_B)
        psi_BD = at_least_float32(self.fusion(torch.cat([image_BD, encode([self.audio], batch.audio, here_B)], 1)))
        with torch.autocast(psi_BD.device.type, enabled=False):
            z_BD = self.teacher(batch).to(psi_BD)
            student_BC, teacher_BC = self.classifier(psi_BD), self.teacher_classifier(z_BD)
            label_B, labelled_B = batch.labels.clamp(min=0), here_B & (batch.labels >= 0)
            right_B = (student_BC.argmax(1) == label_B).to(psi_BD.dtype)
            teacher_right_B = (teacher_BC.argmax(1) == label_B).to(psi_BD.dtype)
            terms = torch.stack([
                descriptor_distance(z_BD, psi_BD, self.config.l1), soft_cross_entropy(teacher_BC, student_BC),
                F.cross_entropy(teacher_BC, label_B, reduction="none"), right_B, teacher_right_B,
            ])  # fmt: skip
            masks = torch.stack([here_B, here_B, labelled_B, labelled_B, labelled_B])
            l1, kl, teacher, accuracy, teacher_accuracy = global_means(terms, masks)
            loss = l1 + self.config.kl_weight * kl + teacher
        metrics: dict[str, float | Tensor] = {
            "loss": loss.detach(),
            "l1": l1.detach(),
            "kl": kl.detach(),
            "teacher_cross_entropy": teacher.detach(),
            "accuracy": accuracy.detach(),
            "teacher_accuracy": teacher_accuracy.detach(),
            "feature_std_joint": feature_std(unit(psi_BD), here_B),
        }
        return loss, metrics

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """'video-trunk' z^I of the clip's first picture, 'audio-trunk' z^A; with both 'joint-trunk' Psi(z^I, z^A).

        Each also as its direction: 'video', 'audio', 'joint'.
        """
        if video is None and audio is None:
            raise UsageError("nothing to embed", "neither video nor audio was given")
        out: dict[str, Tensor] = {}
        if video is not None:
            out["video-trunk"] = at_least_float32(self.image(video[:, :, 0]))
        if audio is not None:
            out["audio-trunk"] = at_least_float32(self.audio(audio))
        if video is not None and audio is not None:
            both = torch.cat([out["video-trunk"], out["audio-trunk"]], 1)
            out["joint-trunk"] = at_least_float32(self.fusion(both))
        return out | {name.removesuffix("-trunk"): unit(x) for name, x in out.items()}
