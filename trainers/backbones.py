"""Every encoder by its name: `video_net`, `audio_net`, `image_net`. One literal dict per kind.

    net = video_net("r2plus1d-18", width=16)    # an `encoders.Encoder`
    net(clips)                                  # (B, net.dim), pooled
    net.forward_blocks(clips)["conv5x"]         # the maps behind it: conv2x ... conv5x

Initial weights are He normal (fan out) under the caller's generator state, whatever the family: `towers.Towers` builds
its networks from a seed. Each file of a family says what its network is and whose names its state has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from avstore.errors import ConflictError, UsageError, did_you_mean
from trainers.encoders import AudioNet, Encoder, Pool, VideoNet
from trainers.resnet2d import FoldedResNet2d, ResNet2d
from trainers.resnet3d import VideoResNet
from trainers.vcop import C3d, VcopResNet
from trainers.vgg2d import Vgg2d


@dataclass(frozen=True)
class Backbone:
    """A line of VIDEO, AUDIO or IMAGE. `make(width=, pool=, ...)`; `width` and `pool` are its paper's."""

    make: Callable[..., Encoder]
    what: str
    pool: Pool = "avg"
    width: int = 64
    options: tuple[str, ...] = ()  # further keywords that `make` takes


VIDEO: dict[str, Backbone] = {
    "avid-r2plus1d-10": Backbone(lambda **k: VideoNet(10, **k), "AVID's R(2+1)D, depth 10", "max", options=("small",)),
    "avid-r2plus1d-18": Backbone(lambda **k: VideoNet(18, **k), "AVID's R(2+1)D, depth 18", "max", options=("small",)),
    "avid-r2plus1d-34": Backbone(lambda **k: VideoNet(34, **k), "AVID's R(2+1)D, depth 34", "max", options=("small",)),
    "r2plus1d-18": Backbone(lambda **k: VideoResNet("r2plus1d", **k), "torchvision's", options=("classes",)),
    "r3d-18": Backbone(lambda **k: VideoResNet("r3d", **k), "torchvision's", options=("classes",)),
    "mc3-18": Backbone(lambda **k: VideoResNet("mc3", **k), "torchvision's", options=("classes",)),
    "vcop-c3d": Backbone(lambda **k: C3d(**k), "C3D with pooling for its linear layers"),
    "vcop-r3d": Backbone(lambda **k: VcopResNet(False, **k), "R3D, one block per stage"),
    "vcop-r2plus1d": Backbone(lambda **k: VcopResNet(True, **k), "R(2+1)D, one block per stage"),
}
AUDIO: dict[str, Backbone] = {
    "avid-conv2d-10": Backbone(lambda **k: AudioNet(10, **k), "AVID's nine convolutions", "max", options=("small",)),
    "resnet-9": Backbone(lambda **k: ResNet2d(9, inputs=1, **k), "SeLaVi's and GDT's"),
    "resnet-10": Backbone(lambda **k: ResNet2d(10, inputs=1, **k), "SSCL's; the trunk of resnet-9"),
    "resnet-18": Backbone(lambda **k: ResNet2d(18, inputs=1, **k), "CrissCross'"),
    "l2l-resnet-18": Backbone(
        lambda **k: FoldedResNet2d(18, **k), "Listen-to-Look's, stem of stride 1, bins folded", "max", options=("bins",)
    ),
    "vgg-9": Backbone(lambda **k: Vgg2d(**k), "AVTS', VGG-like"),
}
IMAGE: dict[str, Backbone] = {
    "image-resnet-18": Backbone(lambda **k: ResNet2d(18, **k), "torchvision's", options=("classes",)),
    "image-resnet-34": Backbone(lambda **k: ResNet2d(34, **k), "torchvision's", options=("classes",)),
}


def video_net(name: str, width: int | None = None, *, pool: Pool | None = None, **options: Any) -> Encoder:
    """The video network of this name: (B, 3, T, H, W) float -> (B, dim).

    width: channels of the first stage; pool: 'max' or 'avg'; None: the paper's. options: `small` (avid-*: no max-pool
    in the stem), `classes` (torchvision's: a layer `fc`). UsageError, with the closest names, for anything unknown.
    """
    return _make(VIDEO, "video", name, width, pool, options)


def audio_net(name: str, width: int | None = None, *, pool: Pool | None = None, **options: Any) -> Encoder:
    """The sound network of this name: (B, 1, F, M) float -> (B, dim). As `video_net`; `small` for avid-conv2d-10,
    `bins` for l2l-resnet-18."""
    return _make(AUDIO, "sound", name, width, pool, options)


def image_net(name: str, width: int | None = None, *, pool: Pool | None = None, **options: Any) -> Encoder:
    """The network for single pictures of this name: (B, 3, H, W) float -> (B, dim). As `video_net`."""
    return _make(IMAGE, "image", name, width, pool, options)


def _make(
    of: Mapping[str, Backbone], kind: str, name: str, width: int | None, pool: Pool | None, options: Mapping[str, Any]
) -> Encoder:
    if name not in of:
        raise UsageError(f"no {kind} network is called {name!r}", did_you_mean(name, of))
    line = of[name]
    for option in options.keys() - set(line.options):
        raise UsageError(f"{name} takes no {option!r}", did_you_mean(option, line.options) or "it has no options")
    return line.make(width=line.width if width is None else width, pool=pool or line.pool, **options)


def load_trunk(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Puts a published state dict of the same names into `net`; returns the names of its classifier that were left out
    (`fc.*`, `linear.*`, where the net has none). ConflictError for anything else that is missing, too many, or of
    another shape; then the net is as it was."""
    mine = net.state_dict()
    left = [k for k in state if k not in mine and k.split(".")[0] in ("fc", "linear")]
    kept = {k: x for k, x in state.items() if k not in left}
    wrong = [k for k in sorted({*mine, *kept}) if k not in mine or k not in kept or mine[k].shape != kept[k].shape]
    if wrong:
        raise ConflictError(
            "these weights are of another network",
            f"{len(wrong)} tensors differ, first {wrong[0]}",
            "name the network that they were trained with",
        )
    net.load_state_dict(kept)
    return left
