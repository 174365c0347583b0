"""The two towers (encoder + head for sight, encoder + head for sound) that AVID, AVID-CMA and their kin train.

Only what both share: building them from a seed, embedding with masks, naming the four outputs. No loss, no bank.
"""

# legend: B clips, T frames, H x W pixels, F spectrogram frames, M bins, D embedding

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError
from trainers import backbones
from trainers.encoders import AudioNet, Encoder, Pool, VideoNet, encode
from trainers.heads import ProjectionHead


class Towers(nn.Module):
    """Encoders `video`, `audio` and heads `video_head`, `audio_head`, initialised as a pure function of `seed`.

    video_net, audio_net: names of `backbones.VIDEO` and AUDIO; None: AVID's of `video_depth`, `audio_depth`. width:
    channels of the first stage, pool: of the last map; None: 64 and max, or what a named network's paper has. small:
    the networks of AVID's ablations. head: features of an encoder -> its head, which tells `dim`; None: AVID's of
    `hidden`, `dim` and `head_batch_norm`. The global random state is left as it was.
    """

    def __init__(
        self,
        *,
        seed: int,
        video_depth: int = 18,
        audio_depth: int = 10,
        width: int | None = 64,
        small: bool = False,
        pool: Pool | None = "max",
        hidden: int = 512,
        dim: int = 128,
        head_batch_norm: bool = False,
        video_net: str | None = None,
        audio_net: str | None = None,
        head: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        own = {"small": True} if small else {}  # of a network that has no such stem: refused there, by name
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU, for good
            self.video: Encoder = (
                VideoNet(video_depth, 64 if width is None else width, small, pool or "max")
                if video_net is None
                else backbones.video_net(video_net, width, pool=pool, **own)
            )
            self.audio: Encoder = (
                AudioNet(audio_depth, 64 if width is None else width, small, pool or "max")
                if audio_net is None
                else backbones.audio_net(audio_net, width, pool=pool, **own)
            )
            make = head or partial(ProjectionHead, hidden=hidden, dim=dim, batch_norm=head_batch_norm)
            self.video_head, self.audio_head = make(self.video.dim), make(self.audio.dim)
        self.dim = int(self.video_head.dim)  # type: ignore[arg-type]

    def forward(
        self, video: Tensor | None, audio: Tensor | None, has_picture_B: Tensor, has_sound_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(v, a), each (B, D) of unit length and at least float32; a row whose modality is missing is zero."""
        if video is None or audio is None:
            raise UsageError("a batch without pictures or without sound", "this method trains on both")
        v = unit(encode((self.video, self.video_head), video, has_picture_B))
        a = unit(encode((self.audio, self.audio_head), audio, has_sound_B))
        return v, a

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """'video', 'audio': head outputs of unit length; 'video-trunk', 'audio-trunk': pooled features as they are.

        Mode and gradients are the caller's: call `.eval()` first, or batch statistics leak between clips.
        """
        if video is None and audio is None:
            raise UsageError("nothing to embed", "neither video nor audio was given")
        out: dict[str, Tensor] = {}
        if video is not None:
            trunk = self.video(video)
            out |= {"video": unit(self.video_head(trunk)), "video-trunk": at_least_float32(trunk)}
        if audio is not None:
            trunk = self.audio(audio)
            out |= {"audio": unit(self.audio_head(trunk)), "audio-trunk": at_least_float32(trunk)}
        return out


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in at least float32 (8 bits of bf16 would blur a score of temperature 0.07)."""
    return F.normalize(at_least_float32(x), dim=-1)
