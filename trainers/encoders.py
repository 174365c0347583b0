"""The two networks of the AVID family: R(2+1)D for pictures, Conv2D for spectrograms.

The R(2+1)D here is AVID's, not torchvision's: a full 3-D stem, no widened middle channels, batch normalisation after
the residual sum. It has 15.38 M parameters at depth 18 (torchvision's has 31.30 M). Both networks give a pooled vector
(`forward`, (B, 8 * width): 512 at width 64) and the four maps behind it (`forward_blocks`: conv2x ... conv5x).
No convolution has a bias: each one ends in a batch normalisation, where a bias has a true gradient of zero and an
optimiser would only amplify its rounding noise. Heads are in `heads.py`; the other families, and all of them by name,
in `backbones.py`: every network is an `Encoder`.

Initial weights (our choice, the papers are silent): He normal, fan out, under the caller's generator state.
"""

# legend: B clips, T frames, H x W pixels, F spectrogram frames, M bins, C channels

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean

BLOCKS = ("conv2x", "conv3x", "conv4x", "conv5x")
VIDEO_DEPTHS: dict[int, tuple[int, int, int, int]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
Pool = Literal["max", "avg"]


class TimePaddedConv3d(nn.Conv3d):
    """A Conv3d that pads time by hand; weights and state names are those of nn.Conv3d.

    With oneDNN and bf16, Conv3d with padding in time returns wrong weight gradients (often inf) wherever its temporal
    kernel is larger than the number of frames it sees, which every 8-frame R(2+1)D reaches in conv4x. Zeros appended
    with F.pad give the same function and the right gradients. A map smaller than the kernel in space (1 x 1 at
    stride 2: measured inf too) is padded by hand as well. `bias`: only where a published state dict has one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = (k // 2 for k in self.kernel_size)
        if self.kernel_size == (1, 1, 1) and any(n < s for n, s in zip(x.shape[2:], self.stride, strict=True)):
            a, b, c = self.stride  # what a kernel of one strides over is left out by hand: the same trap
            return F.conv3d(x[:, :, ::a, ::b, ::c], self.weight, self.bias)
        if x.shape[3] >= self.kernel_size[1] and x.shape[4] >= self.kernel_size[2]:
            return super().forward(F.pad(x, (0, 0, 0, 0, t, t)) if t else x)
        return F.conv3d(F.pad(x, (w, w, h, h, t, t)), self.weight, self.bias, self.stride)


class Encoder(nn.Module):
    """What every network of `backbones.py` is: maps, and their pool.

    forward(x)         (B, dim), the pool ('max' or 'avg') of the last map over everything but clips and channels
    forward_blocks(x)  {'conv2x', ..., 'conv5x'}: maps (B, C, ...), C = width * (1, 2, 4, 8) but where a class says so
    dim, out_channels  channels of the last map, both names
    """

    dim: int
    pool: Pool

    @property
    def out_channels(self) -> int:
        return self.dim

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """The four maps. UsageError for an input of another shape."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        last = self.forward_blocks(x)[BLOCKS[-1]]
        if last.dim() == 5:
            return (F.adaptive_max_pool3d(last, 1) if self.pool == "max" else F.adaptive_avg_pool3d(last, 1)).flatten(1)
        return (F.adaptive_max_pool2d(last, 1) if self.pool == "max" else F.adaptive_avg_pool2d(last, 1)).flatten(1)


class PaddedConv2d(nn.Conv2d):
    """A Conv2d without bias, zero padded by half its kernel; weights and state names are those of nn.Conv2d.

    A map smaller than the kernel is padded by hand: with oneDNN and bf16 a convolution of stride 2 gives wrong weight
    gradients there, mostly inf; outputs and input gradients are right (`tests/test_bf16.py`).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, stride = self.kernel_size[0], self.stride[0]
        if k == 1 and min(x.shape[2:]) < stride:  # what a 1 x 1 kernel strides over is left out by hand
            return F.conv2d(x[:, :, ::stride, ::stride], self.weight)
        if min(x.shape[2:]) >= k:
            return super().forward(x)
        return F.conv2d(F.pad(x, (k // 2,) * 4), self.weight, None, self.stride)


class _Residual(nn.Module):
    """Spatial, temporal, spatial, temporal; the sum with the shortcut, then its normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.spatial1 = TimePaddedConv3d(inputs, outputs, (1, 3, 3), (1, stride, stride))
        self.spatial_norm1 = nn.BatchNorm3d(outputs)
        self.temporal1 = TimePaddedConv3d(outputs, outputs, (3, 1, 1), (stride, 1, 1))
        self.temporal_norm1 = nn.BatchNorm3d(outputs)
        self.spatial2 = TimePaddedConv3d(outputs, outputs, (1, 3, 3))
        self.spatial_norm2 = nn.BatchNorm3d(outputs)
        self.temporal2 = TimePaddedConv3d(outputs, outputs, (3, 1, 1))
        self.out_norm = nn.BatchNorm3d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else TimePaddedConv3d(inputs, outputs, (1, 1, 1), (stride,) * 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.spatial_norm1(self.spatial1(x)))
        y = F.relu(self.temporal_norm1(self.temporal1(y)))
        y = F.relu(self.spatial_norm2(self.spatial2(y)))
        y = self.temporal2(y)
        return F.relu(self.out_norm(y + (x if self.shortcut is None else self.shortcut(x))))


class VideoNet(Encoder):
    """R(2+1)D of AVID. (B, 3, T, H, W) float -> (B, 8 * width).

    depth 10 ("9-layer" in the AVID workshop paper), 18 or 34; `small` leaves out the stem's max-pool (AVID's ablations
    on 112 x 112). Raises UsageError for another depth, width < 1, or an input of another shape.
    """

    def __init__(self, depth: int = 18, width: int = 64, small: bool = False, pool: Pool = "max") -> None:
        super().__init__()
        if depth not in VIDEO_DEPTHS:
            raise UsageError(f"no R(2+1)D of depth {depth}", did_you_mean(str(depth), map(str, VIDEO_DEPTHS)))
        check_net(width, pool)
        self.pool, self.dim = pool, 8 * width
        stem: list[nn.Module] = [
            TimePaddedConv3d(3, width, (3, 7, 7), (1, 2, 2)),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        ]
        if not small:
            stem.append(nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        self.conv1 = nn.Sequential(*stem)
        inputs = width
        for index, (name, blocks) in enumerate(zip(BLOCKS, VIDEO_DEPTHS[depth], strict=True)):
            outputs = width * 2**index
            layers = [
                _Residual(inputs if n == 0 else outputs, outputs, 2 if n == 0 and index else 1) for n in range(blocks)
            ]
            self.add_module(name, nn.Sequential(*layers))
            inputs = outputs
        initialise(self)

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """conv2x ... conv5x: (B, C, T', H', W') with C = width * (1, 2, 4, 8); conv3x on halve T, H and W."""
        require_video(x)
        return _blocks(self, x)


class AudioNet(Encoder):
    """Conv2D, depth 10 (AVID's "9-layer" sound network). (B, 1, F, M) float -> (B, 8 * width).

    A 7 x 7 stem of stride 2, then four stages of two 3 x 3 convolutions with strides 2, 2, 2, 1: 200 x 257 gives a
    13 x 17 map. `small` (AVID's ablations, inputs of 100 x 129): strides 1, 2, 2, 1, which end in the same 13 x 17.
    """

    def __init__(self, depth: int = 10, width: int = 64, small: bool = False, pool: Pool = "max") -> None:
        super().__init__()
        if depth != 10:
            raise UsageError(f"no sound network of depth {depth}", "there is: 10")
        check_net(width, pool)
        self.pool, self.dim = pool, 8 * width
        self.conv1 = nn.Sequential(*_conv2d(1, width, 7, 2))
        inputs = width
        for index, (name, stride) in enumerate(zip(BLOCKS, (1, 2, 2, 1) if small else (2, 2, 2, 1), strict=True)):
            outputs = width * 2**index
            layers = nn.Sequential(*_conv2d(inputs, outputs, 3, stride), *_conv2d(outputs, outputs, 3, 1))
            self.add_module(name, layers)
            inputs = outputs
        initialise(self)

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        """conv2x ... conv5x: (B, C, F', M') with C = width * (1, 2, 4, 8)."""
        require_audio(x)
        return _blocks(self, x)


def check_net(width: int, pool: str) -> None:
    """UsageError where no network can have this width or pooling."""
    if width < 1:
        raise UsageError(f"width {width} is not a number of channels", "the papers use 64, the tiny preset 16")
    if pool not in ("max", "avg"):
        raise UsageError(f"no pooling {pool!r}", did_you_mean(pool, ("max", "avg")))


def require_video(x: Tensor) -> None:
    """UsageError unless x is (B, 3, T, H, W)."""
    if x.dim() != 5 or x.shape[1] != 3:
        raise UsageError(
            f"the video network got a tensor of shape {tuple(x.shape)}", "it wants (clips, 3, frames, height, width)"
        )


def require_audio(x: Tensor) -> None:
    """UsageError unless x is (B, 1, F, M)."""
    if x.dim() != 4 or x.shape[1] != 1:
        raise UsageError(
            f"the sound network got a tensor of shape {tuple(x.shape)}", "it wants (clips, 1, frames, bins)"
        )


def _conv2d(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [PaddedConv2d(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def initialise(net: nn.Module) -> None:
    """He normal, fan out, every convolution; biases zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _blocks(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    maps, x = {}, net.get_submodule("conv1")(x)
    for name in BLOCKS:
        maps[name] = x = net.get_submodule(name)(x)
    return maps


def count_parameters(net: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def has_local_batch_norm(net: nn.Module) -> bool:
    """Whether some statistics are of this process alone (plain BatchNorm, not SyncBatchNorm or a like one)."""
    return any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) for m in net.modules())


def encode(nets: Sequence[nn.Module], x: Tensor, present_B: Tensor) -> Tensor:
    """(B, D) output of the nets in turn for the samples that are there; rows of zeros (no gradient) for the others.

    Blanks never enter a network: they would move its batch statistics. A process without any sample still takes
    part in a *global* batch normalisation, and its parameters still get their (zero) gradient, as DDP requires.
    The last net tells its width as `dim`.
    """
    if bool(present_B.all()):
        return _run(nets, x)
    if bool(present_B.any()) or not any(has_local_batch_norm(net) for net in nets):
        kept = _run(nets, x[present_B])
        return kept.new_zeros(len(x), kept.shape[1]).index_put((present_B.nonzero()[:, 0],), kept)
    nothing = torch.stack([p.sum() for net in nets for p in net.parameters()]).sum() * 0
    width = int(nets[-1].dim)  # type: ignore[arg-type]
    return x.new_zeros(len(x), width) + nothing


def _run(nets: Sequence[nn.Module], x: Tensor) -> Tensor:
    for net in nets:
        x = net(x)
    return x
