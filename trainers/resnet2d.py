"""2-D ResNets with basic blocks: pictures (depth 18 and 34) and spectrograms (9, 10 and 18). State names torchvision's.

    ImageNet-style   7 x 7 stem of stride 2, max-pool, four stages of basic blocks, average pool
    spectrograms     the same with one channel: CrissCross' sound network at depth 18 (11,170,240 parameters), SeLaVi's
                     and GDT's at depth 9

Depths 9 and 10 name one network, (1, 1, 1, 1) blocks: 9 counts its convolutions, 10 a last linear layer as well, which
a trunk has not (the SSCL report gives only the name "2D-ResNet10"). `FoldedResNet2d` is Listen-to-Look's sound network:
a stem of stride 1, after which 101 x 40 ends in 7 x 3, and a fold of the three bins before the pool over time.
"""

# legend: B clips, H x W pixels, F spectrogram frames, M bins, C channels

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from trainers.encoders import Encoder, PaddedConv2d, Pool, check_net, initialise
from trainers.resnet3d import classifier, classify

DEPTHS: dict[int, tuple[int, int, int, int]] = {
    9: (1, 1, 1, 1),
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
}


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = PaddedConv2d(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = PaddedConv2d(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(PaddedConv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet2d(Encoder):
    """(B, inputs, H, W) float -> (B, 8 * width).

    depth: 9, 10, 18, 34. inputs: 3 for pictures (11,689,512 and 21,797,672 parameters at depth 18 and 34 with
    classes = 1000), 1 for spectrograms (B, 1, F, M). Raises UsageError for another depth, width < 1, classes < 1.
    """

    def __init__(
        self,
        depth: int = 18,
        width: int = 64,
        inputs: int = 3,
        pool: Pool = "avg",
        stem_stride: int = 2,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise UsageError(f"no 2-D ResNet of depth {depth}", did_you_mean(str(depth), map(str, DEPTHS)))
        if stem_stride not in (1, 2):
            raise UsageError(f"a stem of stride {stem_stride}", "there is: 1, 2")
        check_net(width, pool)
        self.pool, self.dim, self.inputs = pool, 8 * width, inputs
        self.conv1 = PaddedConv2d(inputs, width, 7, stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        before = width
        for stage, blocks in enumerate(DEPTHS[depth]):
            outputs = width * 2**stage
            layers = [
                _Block(before if n == 0 else outputs, outputs, 2 if n == 0 and stage else 1) for n in range(blocks)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            before = outputs
        initialise(self)
        self.fc = classifier(self.dim, classes)

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """conv2x ... conv5x: (B, C, H', W'), C = width * (1, 2, 4, 8); conv3x on halve both sides."""
        if x.dim() != 4 or x.shape[1] != self.inputs:
            what = "(clips, 1, frames, bins)" if self.inputs == 1 else f"(clips, {self.inputs}, height, width)"
            raise UsageError(f"the 2-D network got a tensor of shape {tuple(x.shape)}", f"it wants {what}")
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = {}
        for stage in range(4):
            maps[f"conv{stage + 2}x"] = x = self.get_submodule(f"layer{stage + 1}")(x)
        return maps

    def logits(self, x: Tensor) -> Tensor:
        """(B, classes). UsageError without the layer `fc`."""
        return classify(self, x)


class FoldedResNet2d(ResNet2d):
    """Listen-to-Look's sound network [C]. (B, 1, F, M) float -> (B, 8 * width): the bins of the last map folded to one
    by a learned weight each and a bias, the same for all channels (their 1 x 1 convolution, 3 -> 1), then the pool over
    time alone, their maximum.

    bins: of the last map, 3 for the 33 to 48 mel bands of a spectrogram; `l2l-mel40` has 40. Its weights begin as
    nn.Linear's. Raises UsageError for other spectrograms.
    """

    def __init__(self, depth: int = 18, width: int = 64, pool: Pool = "max", bins: int = 3) -> None:
        if bins < 1:
            raise UsageError(f"a fold of {bins} bins", "it wants at least one")
        super().__init__(depth, width, inputs=1, pool=pool, stem_stride=1)
        self.fold = nn.Linear(bins, 1)

    def forward(self, x: Tensor) -> Tensor:
        last = self.forward_blocks(x)["conv5x"]
        bins = self.fold.in_features
        if last.shape[3] != bins:
            raise UsageError(
                f"spectrograms of {x.shape[3]} bins for a network that folds {16 * bins - 15} to {16 * bins}",
                f"its last map has {last.shape[3]} bins, not {bins}",
                "use the front-end l2l-mel40, or another sound network",
            )
        time = self.fold(last)[..., 0]  # (B, C, F')
        return time.amax(2) if self.pool == "max" else time.mean(2)
