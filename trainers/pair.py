"""What the rivals share: a network for sight and one for sound, without common weights, and a recipe to train them.

S1 (AVCL, section 3.4 and Table 4) turns image methods into cross-modal ones: the two views of an image become the
picture and the sound of a video. `PairConfig` is that comparison's common recipe; each method's file adds its own keys
and says where it leaves the recipe. `Pair` holds the two trunks, runs what is there through them, and answers the
contract (`trainers`) where a method has nothing of its own to say: no state, nothing to prepare. No loss is here.

Of augmentation S1 names random crops alone (16 x 112 x 112 out of pictures of 128 lines, and of the sound images): the
paper presets crop at any place, and neither flip nor jitter. VCOP and IIC squeeze every picture to 128 x 171 first;
here a picture keeps its shape.

A sound network of `backbones.AUDIO` hears the spectrogram; one of `backbones.VIDEO` a `sound_image`, and then the
whole sound, as S1 has it.
"""

# legend: B clips of this rank, n those with picture and sound, D features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn

from avstore.errors import UsageError, did_you_mean
from avstore.views import RandomView
from trainers import draws
from trainers.backbones import AUDIO, VIDEO, audio_net, video_net
from trainers.batch import Batch
from trainers.encoders import Encoder, encode, has_local_batch_norm
from trainers.needs import Needs
from trainers.sound_image import sound_image
from trainers.spread import feature_std
from trainers.stateless import Stateless
from trainers.towers import at_least_float32, unit

CYCLE = 0x6379636C  # stream of `trainers.draws`: "cycl"
Metrics = dict[str, float | Tensor]


@dataclass(frozen=True)
class PairConfig:
    """Defaults: S1's comparison. [S1] paper, [C] the method's authors' code, [M] recalled, [ours] declared choice."""

    video_net: str = "vcop-r3d"  # [S1] section 3.2, Table 4: R3D; vcop-c3d and vcop-r2plus1d are its others
    audio_net: str = "vcop-r3d"  # [S1] "two models without sharing parameters", the sound as an image
    width: int = 64  # [S1] 512 channels at the end
    pool: Literal["max", "avg"] = "avg"  # [S1] "global spatiotemporal pooling"; mean [ours]
    frames: int = 16  # [S1] section 3.2
    fps: int | Literal["native"] = "native"  # [S1] "consecutive frames"
    size: int = 112  # [S1] section 3.2
    seconds: float = 10.0  # [S1] "whole audio" of Kinetics' clips
    front_end: str = "avcl-mel256"  # [S1] section 2.1
    optimiser: Literal["adam", "adamw", "sgd"] = "sgd"  # [S1] section 3.2, for all methods of Table 4
    learning_rate: float = 1e-3  # [S1]
    momentum: float = 0.9  # [S1]
    weight_decay: float = 5e-4  # [S1]
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # [ours] the paper names none
    warmup_steps: int = 0  # [ours]
    batch: int = 16  # [S1]; starves methods that contrast within a batch
    epochs: int = 300  # [S1]
    draws: int = 1  # [ours] one clip of each video per epoch
    seed: int = 0  # [ours]
    crop: Literal["resized", "random"] = "random"  # [S1] section 3.2: "randomly cropped to 112x112"
    crop_area: tuple[float, float] = (0.08, 1.0)  # [ours] of crop=resized, AVID's
    flip: float = 0.0  # [S1] section 3.2 names crops alone
    brightness: float = 0.0  # [S1] likewise
    contrast: float = 0.0  # [S1] likewise
    saturation: float = 0.0  # [S1] likewise
    hue: float = 0.0  # [S1] likewise
    sound_gain: float = 0.0  # [S1] likewise

    def __post_init__(self) -> None:
        wrong = self.problems()
        if wrong:
            raise UsageError("the configuration does not hold", "; ".join(wrong), "correct it with --set")

    def problems(self) -> list[str]:
        """What is wrong with these values, all of it; a method's own Config adds to it."""
        wrong = [
            f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}"
            for name, allowed in (
                ("video_net", tuple(VIDEO)),
                ("audio_net", (*AUDIO, *VIDEO)),
                ("pool", ("max", "avg")),
                *((key, get_args(get_type_hints(PairConfig)[key])) for key in ("optimiser", "schedule", "crop")),
            )
            if getattr(self, name) not in allowed
        ]
        wrong += below(self, 1, "width", "frames", "size", "batch", "epochs", "draws")
        return wrong + not_above(self, 0, "learning_rate", "seconds")

    @property
    def sees_sound(self) -> bool:
        """Whether the sound network is one for pictures, and hears the whole sound as an image."""
        return self.audio_net in VIDEO


# the networks, pictures and minute of AVID's tiny preset: 400 steps of 24 demo clips on two CPU cores [ours]
TINY: Mapping[str, Any] = {
    "video_net": "avid-r2plus1d-10", "audio_net": "avid-conv2d-10", "width": 16, "pool": "avg", "frames": 8, "fps": 8,
    "size": 64, "seconds": 2.0, "front_end": "avid-linear129", "optimiser": "adam", "learning_rate": 2e-3,
    "weight_decay": 1e-5, "schedule": "cosine", "warmup_steps": 20, "batch": 24, "epochs": 16, "draws": 2,
    "crop": "resized", "crop_area": (0.6, 1.0), "flip": 0.5, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0,
    "hue": 0.0, "sound_gain": 0.1,
}  # fmt: skip


def below(config: Any, least: float, *names: str) -> list[str]:
    """A line for each of these fields that is below `least`."""
    return [f"{n} {getattr(config, n)} must be at least {least}" for n in names if getattr(config, n) < least]


def not_above(config: Any, bound: float, *names: str) -> list[str]:
    """A line for each of these fields that is not above `bound`."""
    return [f"{n} {getattr(config, n)} must be above {bound}" for n in names if not getattr(config, n) > bound]


def clips(config: PairConfig, sample_rate: int) -> RandomView:
    """One clip at a random place; its sound starts with it, or is the video's whole one (S1, section 2.1)."""
    return RandomView(whole_sound=config.sees_sound)


@contextmanager
def seeded(seed: int, *what: int) -> Iterator[None]:
    """Initial weights as a pure function of (seed, what); the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed every GPU, for good
        torch.default_generator.manual_seed(draws.key(seed, *what) & (2**63 - 1) if what else seed)
        yield


class Pair(Stateless):
    """Encoders `video` and `audio`; a subclass sets `video_head` and `audio_head`, which `embed` uses."""

    config: PairConfig
    video: Encoder
    audio: Encoder
    video_head: nn.Module
    audio_head: nn.Module

    def __init__(self, config: PairConfig, needs: Needs | None = None) -> None:
        """needs: of a method whose clip its configuration's fields do not tell."""
        super().__init__()
        self.config = config
        self.needs = needs or Needs(config.frames, config.fps, config.size, config.seconds, config.front_end)
        with seeded(config.seed):
            if self.needs.picture:
                self.video = video_net(config.video_net, config.width, pool=config.pool)
            if self.needs.sound:
                make = video_net if config.sees_sound else audio_net
                self.audio = make(config.audio_net, config.width, pool=config.pool)

    # -- through the networks --------------------------------------------------------------------------------------

    def hear(self, audio: Tensor, share_B: Tensor | None = None, batch: Batch | None = None) -> Tensor:
        """(B, 1, F, M) as the sound network wants it; with `batch` the image is cropped at random."""
        if not self.config.sees_sound:
            return audio
        crop = None if batch is None else (batch.seed, batch.epoch, batch.row, batch.draw)
        return sound_image(audio, self.config.frames, self.config.size, share_B, crop)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What both networks are given. UsageError for a batch that lacks a modality."""
        if batch.video is None or batch.audio is None:
            raise UsageError("a batch without pictures or without sound", "this method trains on both")
        return batch.video, self.hear(batch.audio, batch.sound_share, batch if self.training else None)

    def embed(
        self, video: Tensor | None = None, audio: Tensor | None = None, sound_share: Tensor | None = None
    ) -> dict[str, Tensor]:
        """'video', 'audio': head outputs of unit length; 'video-trunk', 'audio-trunk': pooled features as they are.

        sound_share: as `Batch.sound_share`; only a sound image asks for it.
        """
        if video is None and audio is None:
            raise UsageError("nothing to embed", "neither video nor audio was given")
        out: dict[str, Tensor] = {}
        if video is not None:
            trunk = self.video(video)
            out |= {"video": unit(self.video_head(trunk)), "video-trunk": at_least_float32(trunk)}
        if audio is not None:
            trunk = self.audio(self.hear(audio, sound_share))
            out |= {"audio": unit(self.audio_head(trunk)), "audio-trunk": at_least_float32(trunk)}
        return out

    # -- the contract, for methods without state -------------------------------------------------------------------

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """`step`, so that DistributedDataParallel sees the pass."""
        return self.step(batch)

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        raise NotImplementedError


def present(nets: Sequence[nn.Module], x: Tensor, here_B: Tensor) -> Tensor:
    """(n, D): what the nets in turn make of the clips that are here; n may be 0. At least float32."""
    return at_least_float32(encode(nets, x, here_B)[here_B])


def predict(net: nn.Module, x_nD: Tensor) -> Tensor:
    """A predictor's (n, D); of no clip no row, but the (zero) gradient that DDP asks of each parameter behind."""
    if len(x_nD) or not has_local_batch_norm(net):
        return net(x_nD)
    nothing = torch.stack([x_nD.sum(), *(p.sum() for p in net.parameters())]).sum() * 0
    return x_nD.new_zeros(0, int(net.dim)) + nothing  # type: ignore[arg-type]


def cycle(word_N: Tensor) -> Tensor:
    """(N,) int64: for each clip the next one of a cycle through all, in the order of these random words.

    A derangement for N > 1: every clip is somebody's partner once, and nobody's own. N = 1: itself.
    """
    order_N = word_N.argsort(stable=True)
    partner_N = torch.empty_like(order_N)
    partner_N[order_N] = order_N.roll(-1)
    return partner_N


def false_partners(batch: Batch, position_N: Tensor, row_N: Tensor) -> tuple[Tensor, Tensor]:
    """(partner, false): for each clip of the global batch another one, and whether that is of another video.

    The words hang on the place in the epoch's order, so that pairs are the same on any number of ranks.
    """
    partner_N = cycle(draws.bits(draws.key(batch.seed, CYCLE, batch.epoch), [position_N], 1)[:, 0])
    return partner_N, row_N[partner_N] != row_N


def spread(x_nD: Tensor) -> Tensor:
    """`feature_std` of the directions of the clips that are here; 0: collapse, about 1: all over the sphere."""
    return feature_std(unit(x_nD), torch.ones(len(x_nD), dtype=torch.bool, device=x_nD.device))
