"""The 3-D ResNets of depth 18 as torchvision lays them out: R(2+1)D-18, R3D-18 and MC3-18.

State names and shapes are torchvision's, so that its weights load, and ours load there (`classes` adds the layer `fc`
that its checkpoints end with; `backbones.load_trunk` leaves it away). A factorised convolution has

    M = floor(27 N P / (9 N + 3 P))     middle channels between N and P channels (Tran et al., CVPR 2018, section 3.5)

computed once per block from its input and output, as torchvision does; the stem's 45 of 64 follows the width. Against
AVID's R(2+1)D (`encoders.VideoNet`): factorised stem without max-pool, batch normalisation before the sum and in the
shortcut, average pooling. MC3 is R3D with flat (1, 3, 3) convolutions from conv3x on, which keep every frame.
"""

# legend: B clips, T frames, H x W pixels, C channels

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from trainers.encoders import Encoder, Pool, TimePaddedConv3d, check_net, initialise, require_video

Kind = Literal["r2plus1d", "r3d", "mc3"]
KINDS: tuple[Kind, ...] = ("r2plus1d", "r3d", "mc3")


def middle_channels(inputs: int, outputs: int) -> int:
    """Channels between the two halves of a factorised 3 x 3 x 3 convolution, at equal parameters; at least 1."""
    return max(1, 27 * inputs * outputs // (9 * inputs + 3 * outputs))


def _convolution(kind: Kind, inputs: int, outputs: int, middle: int, stride: int) -> nn.Module:
    if kind == "r3d":
        return TimePaddedConv3d(inputs, outputs, (3, 3, 3), (stride,) * 3)
    if kind == "mc3":
        return TimePaddedConv3d(inputs, outputs, (1, 3, 3), (1, stride, stride))
    return nn.Sequential(
        TimePaddedConv3d(inputs, middle, (1, 3, 3), (1, stride, stride)),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        TimePaddedConv3d(middle, outputs, (3, 1, 1), (stride, 1, 1)),
    )


class _Block(nn.Module):
    def __init__(self, kind: Kind, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = middle_channels(inputs, outputs)
        self.conv1 = nn.Sequential(
            _convolution(kind, inputs, outputs, middle, stride), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(_convolution(kind, outputs, outputs, middle, 1), nn.BatchNorm3d(outputs))
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            steps = (1 if kind == "mc3" else stride, stride, stride)
            self.downsample = nn.Sequential(
                TimePaddedConv3d(inputs, outputs, (1, 1, 1), steps), nn.BatchNorm3d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class VideoResNet(Encoder):
    """(B, 3, T, H, W) float -> (B, 8 * width). 31,300,125 (r2plus1d), 33,166,272 (r3d), 11,490,240 (mc3) parameters at
    width 64, and 205,200 more with classes = 400.

    kind: 'r2plus1d', 'r3d', 'mc3'. classes: of a layer `fc` behind the pooled vector, see `logits`; None: without it.
    Raises UsageError for an unknown kind, width < 1, classes < 1.
    """

    def __init__(self, kind: Kind, width: int = 64, pool: Pool = "avg", classes: int | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UsageError(f"no 3-D ResNet {kind!r}", did_you_mean(kind, KINDS))
        check_net(width, pool)
        self.pool, self.dim = pool, 8 * width
        if kind == "r2plus1d":
            middle = max(1, round(45 * width / 64))
            self.stem = nn.Sequential(
                TimePaddedConv3d(3, middle, (1, 7, 7), (1, 2, 2)),
                nn.BatchNorm3d(middle),
                nn.ReLU(inplace=True),
                TimePaddedConv3d(middle, width, (3, 1, 1)),
                nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
            )
        else:
            self.stem = nn.Sequential(
                TimePaddedConv3d(3, width, (3, 7, 7), (1, 2, 2)), nn.BatchNorm3d(width), nn.ReLU(inplace=True)
            )
        first: Kind = "r3d" if kind == "mc3" else kind
        self.layer1 = nn.Sequential(_Block(first, width, width, 1), _Block(first, width, width, 1))
        self.layer2 = nn.Sequential(_Block(kind, width, 2 * width, 2), _Block(kind, 2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(_Block(kind, 2 * width, 4 * width, 2), _Block(kind, 4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(_Block(kind, 4 * width, 8 * width, 2), _Block(kind, 8 * width, 8 * width, 1))
        initialise(self)
        self.fc = classifier(self.dim, classes)

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """conv2x ... conv5x: (B, C, T', H', W'), C = width * (1, 2, 4, 8); conv3x on halve T (not mc3), H and W."""
        require_video(x)
        conv2x = self.layer1(self.stem(x))
        conv3x = self.layer2(conv2x)
        conv4x = self.layer3(conv3x)
        return {"conv2x": conv2x, "conv3x": conv3x, "conv4x": conv4x, "conv5x": self.layer4(conv4x)}

    def logits(self, x: Tensor) -> Tensor:
        """(B, classes). UsageError without the layer `fc`."""
        return classify(self, x)


def classifier(dim: int, classes: int | None) -> nn.Linear | None:
    """torchvision's last layer: N(0, 0.01) weights, zero biases; None for None."""
    if classes is None:
        return None
    if classes < 1:
        raise UsageError(f"{classes} classes", "a classifier has at least one")
    fc = nn.Linear(dim, classes)
    nn.init.normal_(fc.weight, 0, 0.01)
    nn.init.zeros_(fc.bias)
    return fc


def classify(net: Encoder, x: Tensor) -> Tensor:
    """`fc` of the pooled vector."""
    fc = getattr(net, "fc", None)
    if fc is None:
        raise UsageError("this network has no classes", "it was made without", "give classes=...")
    return fc(net(x))
