"""Two towers of any networks: encoders by name (`backbones.py`), heads as the method makes them.

What `towers.Towers` is for AVID's own networks, for the methods that name theirs. No loss, no bank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trainers import backbones
from trainers.encoders import Pool
from trainers.towers import Towers


class NamedTowers(Towers):
    """Encoders `video`, `audio` and heads `video_head`, `audio_head`, initialised as a pure function of `seed`.

    video_net, audio_net: names of `backbones.VIDEO` and `.AUDIO`; width: channels of their first stage, None the
    paper's; pool: 'max' or 'avg', None the paper's. head: features of an encoder -> its head, which tells `dim`.
    `forward` and `embed` are those of `Towers`. UsageError for unknown names.
    """

    def __init__(
        self,
        *,
        seed: int,
        video_net: str,
        audio_net: str,
        width: int | None,
        pool: Pool | None,
        head: Callable[[int], nn.Module],
    ) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU, for good
            self.video = backbones.video_net(video_net, width, pool=pool)
            self.audio = backbones.audio_net(audio_net, width, pool=pool)
            self.video_head = head(self.video.dim)  # type: ignore[assignment]
            self.audio_head = head(self.audio.dim)  # type: ignore[assignment]
        self.dim = int(self.video_head.dim)
