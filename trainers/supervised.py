"""Supervised baselines of AVCL's comparison: Baseline-R, Baseline-A, Baseline-R+A (S1, section 3.4, Table 4).

What labels alone give, with the same networks and clips: a classifier on the picture's features, on the sound's, or on
both side by side. No pre-training method need beat it, but each should be seen beside it: on Kinetics-Sounds32 S1
prints 60.4 (picture), 52.9 (sound) and 73.9 (both), above all six self-supervised rivals.

    avstore train supervised --preset tiny                       # both
    avstore train supervised --preset tiny --set modality=a      # a: sound, v: picture, av: both

What differs from the paper, and why:
* S1 says neither how the baseline's head looks nor how long it trains: it is the head and the schedule of its
  fine-tuning (1024 or 512 -> 512 -> ReLU -> dropout 0.7 -> classes; weight decay 5e-3, 150 epochs).
* A clip whose video has no label (no folder of its own) is masked out of the loss.
* Embeddings are the unit vectors of the pooled features: the two networks share no space, so what one retrieves of the
  other is chance, by construction.
"""

# legend: B clips of this rank, n those that count, C classes, D features

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.encoders import Encoder
from trainers.needs import Needs
from trainers.pair import TINY, Metrics, Pair, PairConfig, clips, present, seeded

__all__ = ["PRESETS", "Config", "Supervised", "clips", "cross_entropy"]

MODALITIES = ("v", "a", "av")


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's Baseline-R+A; what is not here is `pair.PairConfig`'s."""

    modality: Literal["v", "a", "av"] = "av"  # [S1] Table 4: Baseline-R, -A, -R+A
    hidden: int = 512  # [ours] as in fine-tuning
    dropout: float = 0.7  # [S1] section 3.2, "between fully-connected layers"
    weight_decay: float = 5e-3  # [S1] of fine-tuning
    epochs: int = 150  # [S1] of fine-tuning

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.modality not in MODALITIES:
            wrong.append(f"modality {self.modality!r}: {did_you_mean(self.modality, MODALITIES)}")
        if self.hidden < 1 or not 0 <= self.dropout < 1:
            wrong.append(f"hidden {self.hidden} must be at least 1, dropout {self.dropout} in [0, 1)")
        return wrong

    def needs(self) -> Needs:
        """Only the modality that is looked at; and labels."""
        picture, sound = "v" in self.modality, "a" in self.modality
        return Needs(
            frames=self.frames if picture else 0,
            fps=self.fps,
            size=self.size if picture else 0,
            seconds=self.seconds if sound else 0.0,
            front_end=self.front_end if sound else None,
            picture=picture,
            sound=sound,
            labels=True,
        )


PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "hidden": 128, "dropout": 0.5})}


# ---- loss --------------------------------------------------------------------------------------------------------


def cross_entropy(logit_BC: Tensor, label_B: Tensor) -> Tensor:
    """- log softmax(logit)[label]: (B,); 0 where the label is -1."""
    return F.cross_entropy(logit_BC, label_B, ignore_index=-1, reduction="none")


# ---- the method --------------------------------------------------------------------------------------------------


class Supervised(Pair):
    """One or two trunks and a classifier of `classes`. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int, classes: tuple[str, ...]) -> None:
        if len(classes) < 2:
            raise UsageError(
                f"{len(classes)} classes to tell apart", "the labels of the selection are the names of its folders",
                "select videos of at least two classes",
            )  # fmt: skip
        super().__init__(config, config.needs())
        self.classes = classes
        width = sum(net.dim for net in self._nets())
        with seeded(config.seed, 1):
            self.classifier = nn.Sequential(
                nn.Linear(width, config.hidden), nn.ReLU(inplace=True), nn.Dropout(config.dropout),
                nn.Linear(config.hidden, len(classes)),
            )  # fmt: skip
        self.video_head = self.audio_head = nn.Identity()

    def _nets(self) -> list[Encoder]:
        names = (("v", "video"), ("a", "audio"))
        return [getattr(self, name) for letter, name in names if letter in self.config.modality]

    def logits(self, batch: Batch, here_B: Tensor) -> Tensor:
        """(n, C) of the clips that are here."""
        parts = []
        if "v" in self.config.modality:
            if batch.video is None:
                raise UsageError("a batch without pictures", f"modality {self.config.modality} looks at them")
            parts.append(present([self.video], batch.video, here_B))
        if "a" in self.config.modality:
            if batch.audio is None:
                raise UsageError("a batch without sound", f"modality {self.config.modality} listens to it")
            heard = self.hear(batch.audio, batch.sound_share, batch if self.training else None)
            parts.append(present([self.audio], heard, here_B))
        return self.classifier(torch.cat(parts, 1))

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Cross-entropy of this rank's labelled clips, and the share of them that is right."""
        if batch.labels is None:
            raise UsageError("a batch without labels", "this method learns from them")
        here_B = batch.labels >= 0
        if "v" in self.config.modality:
            here_B = here_B & batch.has_picture
        if "a" in self.config.modality:
            here_B = here_B & batch.has_sound
        logit_nC = self.logits(batch, here_B)
        with torch.autocast(logit_nC.device.type, enabled=False):
            logit_nC, label_n = logit_nC.float() if logit_nC.dtype != torch.float64 else logit_nC, batch.labels[here_B]
            loss_n = cross_entropy(logit_nC, label_n)
            right_n = (logit_nC.argmax(1) == label_n).to(loss_n.dtype)
            rows = torch.stack([loss_n, right_n])
            loss, accuracy = global_means(rows, torch.ones_like(rows, dtype=torch.bool))
        return loss, {"loss": loss.detach(), "accuracy": accuracy.detach()}

    def embed(
        self, video: Tensor | None = None, audio: Tensor | None = None, sound_share: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `Pair.embed`, of the modalities that were trained; the others are left out."""
        video = video if "v" in self.config.modality else None
        audio = audio if "a" in self.config.modality else None
        return {} if video is None and audio is None else super().embed(video, audio, sound_share)
