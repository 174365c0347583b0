"""The networks of the VCOP family (Xu et al., CVPR 2019), which AVCL, IIC, TCGL and CCL use.

    C3D      eight 3 x 3 x 3 convolutions with batch normalisation; its two wide linear layers gave way to pooling
    R3D      7 x 7 x 3 stem and one residual block in each of conv2x ... conv5x: "9 conv layers"
    R(2+1)D  the same with each convolution factorised, the stem and the 1 x 1 x 1 shortcuts too

All end in 512 channels at width 64, pooled by average. State names are those of the public checkpoints of the family
(VCOP, IIC). C3D's convolutions have biases there: they are kept, so that such weights load, and frozen, since in front
of a batch normalisation their gradient is zero and an optimiser would only amplify its rounding noise.
"""

# legend: B clips, T frames, H x W pixels, C channels

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError
from trainers.encoders import Encoder, Pool, TimePaddedConv3d, check_net, initialise, require_video

Triple = tuple[int, int, int]


def factor_channels(inputs: int, outputs: int, kernel: Triple) -> int:
    """Middle channels of a factorised convolution of any kernel, at equal parameters; at least 1."""
    t, s = kernel[0], kernel[1] * kernel[2]
    return max(1, t * s * inputs * outputs // (s * inputs + t * outputs))


class _Full(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.temporal_spatial_conv = TimePaddedConv3d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_spatial_conv(x)


class _Factorised(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        middle = factor_channels(inputs, outputs, kernel)
        self.spatial_conv = TimePaddedConv3d(inputs, middle, (1, *kernel[1:]), (1, *stride[1:]))
        self.bn = nn.BatchNorm3d(middle)
        self.temporal_conv = TimePaddedConv3d(middle, outputs, (kernel[0], 1, 1), (stride[0], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_conv(F.relu(self.bn(self.spatial_conv(x))))


class _Block(nn.Module):
    def __init__(self, make: type[_Full] | type[_Factorised], inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        stride = (2, 2, 2) if halve else (1, 1, 1)
        self.conv1 = make(inputs, outputs, (3, 3, 3), stride)
        self.bn1 = nn.BatchNorm3d(outputs)
        self.conv2 = make(outputs, outputs, (3, 3, 3), (1, 1, 1))
        self.bn2 = nn.BatchNorm3d(outputs)
        self.halve = halve
        if halve:
            self.downsampleconv = make(inputs, outputs, (1, 1, 1), stride)
            self.downsamplebn = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsamplebn(self.downsampleconv(x)) if self.halve else x))


class VcopResNet(Encoder):
    """R3D, or R(2+1)D where `factorised`. (B, 3, T, H, W) float -> (B, 8 * width). UsageError for width < 1."""

    def __init__(self, factorised: bool, width: int = 64, pool: Pool = "avg") -> None:
        super().__init__()
        check_net(width, pool)
        self.pool, self.dim = pool, 8 * width
        make = _Factorised if factorised else _Full
        self.conv1 = make(3, width, (3, 7, 7), (1, 2, 2))
        self.bn1 = nn.BatchNorm3d(width)
        before = width
        for stage in range(4):
            outputs = width * 2**stage
            # `block1`: the family's name of the first, here only, block of a stage
            self.add_module(
                f"conv{stage + 2}", nn.ModuleDict({"block1": _Block(make, before, outputs, halve=stage > 0)})
            )
            before = outputs
        initialise(self)

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """conv2x ... conv5x: (B, C, T', H', W'), C = width * (1, 2, 4, 8); conv3x on halve T, H and W."""
        require_video(x)
        x = F.relu(self.bn1(self.conv1(x)))
        maps = {}
        for stage in range(4):
            maps[f"conv{stage + 2}x"] = x = self.get_submodule(f"conv{stage + 2}.block1")(x)
        return maps


# name of the convolution, its channels in widths, the max-pool in front of it, the map it ends
_C3D = (
    ("1", 1, None, None),
    ("2", 2, (1, 2, 2), "conv2x"),
    ("3a", 4, (2, 2, 2), None),
    ("3b", 4, None, "conv3x"),
    ("4a", 8, (2, 2, 2), None),
    ("4b", 8, None, "conv4x"),
    ("5a", 8, (2, 2, 2), None),
    ("5b", 8, None, "conv5x"),
)


class C3d(Encoder):
    """(B, 3, T, H, W) float, T >= 8, H and W >= 16 -> (B, 8 * width). Maps of width * (2, 4, 8, 8) channels.

    UsageError for width < 1, and for clips that its three poolings of time and four of space would leave empty.
    """

    def __init__(self, width: int = 64, pool: Pool = "avg") -> None:
        super().__init__()
        check_net(width, pool)
        self.pool, self.dim = pool, 8 * width
        before = 3
        for name, channels, _, _ in _C3D:
            convolution = TimePaddedConv3d(before, channels * width, (3, 3, 3), bias=True)
            self.add_module(f"conv{name}", convolution)
            self.add_module(f"bn{name}", nn.BatchNorm3d(channels * width))
            before = channels * width
        initialise(self)
        for module in self.modules():
            if isinstance(module, TimePaddedConv3d) and module.bias is not None:
                module.bias.requires_grad_(False)

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """conv2x: (B, 2 width, T, H/2, W/2); conv3x, conv4x, conv5x: half the sides each time; floors of odd sides."""
        require_video(x)
        if x.shape[2] < 8 or min(x.shape[3:]) < 16:
            raise UsageError(
                f"C3D got clips of {x.shape[2]} frames of {x.shape[3]} x {x.shape[4]}",
                "its poolings need at least 8 frames of 16 x 16",
                "give more --set frames=, or another network",
            )
        maps = {}
        for name, _, window, ends in _C3D:
            if window is not None:
                x = F.max_pool3d(x, window)
            x = F.relu(self.get_submodule(f"bn{name}")(self.get_submodule(f"conv{name}")(x)))
            if ends is not None:
                maps[ends] = x
        return maps
