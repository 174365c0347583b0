"""The VGG-like sound network of AVTS (Korbar et al., NeurIPS 2018): nine plain 3 x 3 convolutions.

The paper's text gives "VGG-like" and no table that we could check, so the layout is declared: 64 | 64 64 | 128 128 |
256 256 | 512 512 channels at width 64, each followed by batch normalisation and ReLU, 2 x 2 max-pools between the
groups, average pooling at the end. 4,723,136 parameters.
"""

# legend: B clips, F spectrogram frames, M bins, C channels

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError
from trainers.encoders import BLOCKS, Encoder, Pool, check_net, initialise, require_audio
from trainers.resnet2d import PaddedConv2d


def _pair(inputs: int, outputs: int) -> list[nn.Module]:
    return [PaddedConv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class Vgg2d(Encoder):
    """(B, 1, F, M) float, F and M >= 16 -> (B, 8 * width). UsageError for width < 1 and smaller spectrograms."""

    def __init__(self, width: int = 64, pool: Pool = "avg") -> None:
        super().__init__()
        check_net(width, pool)
        self.pool, self.dim = pool, 8 * width
        self.conv1 = nn.Sequential(*_pair(1, width))
        before = width
        for stage, name in enumerate(BLOCKS):
            outputs = width * 2**stage
            self.add_module(name, nn.Sequential(*_pair(before, outputs), *_pair(outputs, outputs)))
            before = outputs
        initialise(self)

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """conv2x ... conv5x: (B, C, F', M'), C = width * (1, 2, 4, 8), both sides halved in front of each."""
        require_audio(x)
        if min(x.shape[2:]) < 16:
            raise UsageError(
                f"the VGG-like network got spectrograms of {x.shape[2]} x {x.shape[3]}", "it wants at least 16 x 16"
            )
        maps, x = {}, self.conv1(x)
        for name in BLOCKS:
            maps[name] = x = self.get_submodule(name)(F.max_pool2d(x, 2))
        return maps
