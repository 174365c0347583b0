"""Encoders whose weights were published by others: used as they are, never trained here.

A module for the runs that `avstore convert` makes from a checkpoint (`convert.py` reads it and maps its names): one or
two networks of `backbones.py`, and their heads where the checkpoint has them. It embeds like any method; asked for a
loss it refuses. Not in the table of methods to train: see `methods.FROZEN`.

State names: `video.*`, `audio.*`, `video_head.*`, `audio_head.*`.
"""

# legend: B clips, T frames, H x W pixels, F spectrogram frames, M bins, D embedding

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from avstore.errors import UsageError, did_you_mean
from trainers import backbones
from trainers.encoders import Pool
from trainers.needs import Needs
from trainers.projectors import NORMS, Norm, Projector
from trainers.towers import at_least_float32, unit


@dataclass(frozen=True)
class Config:
    """What a published checkpoint is. `convert` fills it in; None: the checkpoint has no network of that modality."""

    video_net: str | None = "avid-r2plus1d-18"
    audio_net: str | None = "avid-conv2d-10"
    video_width: int = 64
    audio_width: int = 64
    video_pool: Pool = "max"
    audio_pool: Pool = "max"
    video_head: tuple[int, ...] = ()  # output sizes of its layers; empty: no head, trunks only
    audio_head: tuple[int, ...] = ()
    head_norm: Norm = "none"  # see `projectors.Projector`
    frames: int = 8  # of the clip that the weights were trained on
    fps: int = 16
    size: int = 224
    seconds: float = 2.0
    front_end: str = "avid-linear257"
    max_offset: float = 0.0  # seconds
    source: str = ""  # file names and digests of what was converted
    seed: int = 0  # of the random weights that a control puts in their place

    def __post_init__(self) -> None:
        wrong = []
        for name, value, allowed in (
            ("video_net", self.video_net, (*backbones.VIDEO, None)),
            ("audio_net", self.audio_net, (*backbones.AUDIO, None)),
            ("head_norm", self.head_norm, NORMS),
        ):
            if value not in allowed:
                wrong.append(f"{name} {value!r}: {did_you_mean(str(value), map(str, allowed))}")
        if self.video_net is None and self.audio_net is None:
            wrong.append("neither video_net nor audio_net")
        if wrong:
            raise UsageError("these weights are of no network", "; ".join(wrong), "avstore convert FILE says of which")

    def needs(self) -> Needs:
        """The clip that they were trained on, of the modalities that they have."""
        return Needs(
            frames=self.frames,
            fps=self.fps,
            size=self.size,
            seconds=self.seconds,
            front_end=self.front_end if self.audio_net is not None else None,
            picture=self.video_net is not None,
            sound=self.audio_net is not None,
            max_offset=self.max_offset,
        )


PRESETS = {"paper": Config(), "tiny": Config(video_net="avid-r2plus1d-10", video_width=16, audio_width=16, size=64)}


class Published(nn.Module):
    """The networks of a checkpoint, at random until its weights are loaded. See `trainers` for the contract."""

    def __init__(self, config: Config, n_rows: int = 0) -> None:
        super().__init__()
        self.config = config
        self.needs = config.needs()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would also seed every GPU, for good
            for kind, make in (("video", backbones.video_net), ("audio", backbones.audio_net)):
                name, head = getattr(config, f"{kind}_net"), getattr(config, f"{kind}_head")
                if name is None:
                    continue
                net = make(name, getattr(config, f"{kind}_width"), pool=getattr(config, f"{kind}_pool"))
                self.add_module(kind, net)
                if head:
                    self.add_module(f"{kind}_head", Projector((net.dim, *head), config.head_norm))

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """'video-trunk', 'audio-trunk': pooled features; 'video', 'audio': unit length, where there is a head. A
        modality without a network is left out. Mode and gradients are the caller's."""
        out: dict[str, Tensor] = {}
        modules = dict(self.named_children())
        kinds: tuple[tuple[Literal["video", "audio"], Tensor | None], ...] = (("video", video), ("audio", audio))
        for kind, x in kinds:
            if x is None or kind not in modules:
                continue
            trunk = modules[kind](x)
            if f"{kind}_head" in modules:
                out[kind] = unit(modules[f"{kind}_head"](trunk))
            out[f"{kind}-trunk"] = at_least_float32(trunk)
        return out

    def method_state(self) -> dict[str, Tensor]:
        """Nothing beside the weights."""
        return {}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Nothing."""

    def start_epoch(self, epoch: int) -> dict[str, float]:
        self._refuse()

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "published weights are not trained under this name",
            "their run holds networks, and no loss",
            "avstore embed RUN uses them; a run of AVID's weights starts avstore train avid-cma --init RUN",
        )
