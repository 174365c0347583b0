"""What the tensors of published checkpoints are called, and what we call them: facts, as tables; no file is read here.

AVID, AVID-CMA   video_model.conv2x.0.spt_conv1.weight ...    audio_model.block1.conv1.weight ...
                 video_proj.projection.0.weight ...           (depth 10 has no block number: conv2x.spt_conv1)
CrissCross       the same video network, bare or as video_backbone.*; sound: conv1.0, conv1.1, block1.0.conv1 ...
                 video_projector.layer1.0.weight ...
torchvision, VCOP family   names as in `resnet3d.py` and `vcop.py`, bare
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Rename = Callable[[str], str | None]  # a name inside their network -> ours; None: a classifier, not taken

# first match wins: (their prefix, the slot of ours, why it is left out where there is none)
PREFIXES: tuple[tuple[str, str | None, str], ...] = (
    ("video_model.", "video", ""),
    ("audio_model.", "audio", ""),
    ("video_proj.projection.", "video_head", ""),
    ("audio_proj.projection.", "audio_head", ""),
    ("video_backbone.", "video", ""),
    ("audio_backbone.", "audio", ""),
    ("video_projector.", "video_head", ""),
    ("audio_projector.", "audio_head", ""),
    ("video_encoder.", None, "the backbone and projector a second time"),
    ("audio_encoder.", None, "the backbone and projector a second time"),
    ("video_predictor.", None, "a predictor: it serves the loss alone"),
    ("audio_predictor.", None, "a predictor: it serves the loss alone"),
)
# bare names that only a network of spectrograms has here; all other bare names are a video network's
_BARE_AUDIO = re.compile(r"block[1-4]\.")


@dataclass(frozen=True)
class Family:
    """A network that was recognised: its values of `published.Config`, and how its names and tensors become ours."""

    name: str
    values: dict[str, Any]
    rename: Rename
    transform: Callable[[Tensor], Tensor] = field(default=lambda x: as_ours(x))


def as_ours(x: Tensor) -> Tensor:
    """float32 (counters stay whole), contiguous, of no graph."""
    return x.detach().float().contiguous() if x.is_floating_point() else x.detach().contiguous()


def transposed(x: Tensor) -> Tensor:
    """A 2-D kernel of a network that sees (bins, frames) for one that sees (frames, bins): the same function."""
    return as_ours(x.transpose(2, 3) if x.dim() == 4 else x)


@dataclass(frozen=True)
class Slots:
    """Names of a state dict, sorted. slots: {ours: {name inside the network: whole name}}; left: (name, why it is not
    taken); avid: whether the video network is called as in AVID's own checkpoints."""

    slots: dict[str, dict[str, str]]
    left: list[tuple[str, str]]
    avid: bool


def sort_names(names: Iterable[str]) -> Slots:
    """Which network each tensor belongs to, by its prefix; bare names are one network's."""
    slots: dict[str, dict[str, str]] = {}
    left: list[tuple[str, str]] = []
    bare: dict[str, str] = {}
    names = list(names)
    for name in names:
        for prefix, slot, why in PREFIXES:
            if name.startswith(prefix):
                if slot is None:
                    left.append((name, why))
                else:
                    slots.setdefault(slot, {})[name.removeprefix(prefix)] = name
                break
        else:
            bare[name.removeprefix("backbone.")] = name
    if bare and not slots:
        slots["audio" if any(_BARE_AUDIO.match(k) for k in bare) else "video"] = bare
    else:
        left += [(name, "of no network known here") for name in bare.values()]
    return Slots(slots, left, any(name.startswith("video_model.") for name in names))


_AVID_BLOCK = {
    "spt_conv1": "spatial1",
    "spt_bn1": "spatial_norm1",
    "tmp_conv1": "temporal1",
    "tmp_bn1": "temporal_norm1",
    "spt_conv2": "spatial2",
    "spt_bn2": "spatial_norm2",
    "tmp_conv2": "temporal2",
    "out_bn": "out_norm",
    "res_conv": "shortcut",
}
_CLASSIFIERS = ("fc", "linear", "classifier")


def _avid_video(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] in _CLASSIFIERS:
        return None
    if len(parts) > 2 and parts[1] in _AVID_BLOCK:
        parts.insert(1, "0")  # depth 10: a stage is its one block
    if len(parts) > 3 and parts[2] in _AVID_BLOCK:
        parts[2] = _AVID_BLOCK[parts[2]]
    return ".".join(parts)


def _avid_audio(name: str) -> str | None:
    found = re.fullmatch(r"block([1-4])\.(conv|bn)([12])\.(.+)", name)
    if found is None:
        return None if name.split(".")[0] in _CLASSIFIERS else name
    stage, kind, which, rest = found.groups()
    return f"conv{int(stage) + 1}x.{3 * (int(which) - 1) + (kind == 'bn')}.{rest}"


def _crisscross_audio(name: str) -> str | None:
    if name.split(".")[0] in _CLASSIFIERS:
        return None
    name = re.sub(r"^conv1\.0\.", "conv1.", re.sub(r"^conv1\.1\.", "bn1.", name))
    return re.sub(r"^block([1-4])\.", r"layer\1.", name)


def _same(name: str) -> str | None:
    return None if name.split(".")[0] in _CLASSIFIERS else name


def family_of(kind: str, state: Mapping[str, Tensor], avid: bool = True) -> Family | None:
    """Which network tensors of these names are; None: none that is known here. Only what tells them apart is looked at:
    whether all names and shapes fit is for the caller to check.

    AVID's and CrissCross' video networks are one, but for pooling and clips: `avid` says whose (`Slots.avid`).
    """
    if kind == "audio":
        if "conv1.0.weight" not in state:
            return None
        width = int(state["conv1.0.weight"].shape[0])
        if "block1.conv1.weight" in state:
            values: dict[str, Any] = {
                "audio_net": "avid-conv2d-10",
                "audio_width": width,
                "audio_pool": "max",
                "seconds": 2.0,
            }
            return Family("avid-audio", values | {"front_end": "avid-linear257"}, _avid_audio)
        if "block1.0.conv1.weight" in state:
            values = {"audio_net": "resnet-18", "audio_width": width, "audio_pool": "avg", "seconds": 2.0}
            return Family("crisscross-audio", values | {"front_end": "crisscross-mel80"}, _crisscross_audio, transposed)
        return None
    clip: dict[str, Any] = {
        "frames": 16,
        "fps": 16,
        "size": 112,
        "video_pool": "avg",
    }  # torchvision's and VCOP's: 16 frames of 112
    if "stem.0.weight" in state and "layer1.0.conv1.1.weight" in state:
        width = int(state["layer1.0.conv1.1.weight"].shape[0])
        name = "r2plus1d-18" if "stem.3.weight" in state else "r3d-18"
        if name == "r3d-18" and "layer2.0.conv1.0.weight" in state and state["layer2.0.conv1.0.weight"].shape[2] == 1:
            name = "mc3-18"
        return Family(f"torchvision-{name}", clip | {"video_net": name, "video_width": width}, _same)
    for key, name in (
        ("conv1.temporal_spatial_conv.weight", "vcop-r3d"),
        ("conv1.spatial_conv.weight", "vcop-r2plus1d"),
        ("conv3a.weight", "vcop-c3d"),
    ):
        if key in state and "bn1.weight" in state:
            width = int(state["bn1.weight"].shape[0])
            return Family(name, clip | {"video_net": name, "video_width": width}, _same)
    blocks = {k.rpartition(".spt_conv1.")[0] for k in state if ".spt_conv1." in k}
    depth = {4: 10, 8: 18, 16: 34}.get(len(blocks))
    if depth is None or "conv1.0.weight" not in state:
        return None
    found: dict[str, Any] = {
        "video_net": f"avid-r2plus1d-{depth}",
        "video_width": int(state["conv1.0.weight"].shape[0]),
    }
    if not avid:
        clip = {"frames": 8, "fps": 16, "size": 112, "video_pool": "avg"}
        return Family("crisscross-video", found | clip, _avid_video)
    return Family("avid-video", found | {"frames": 8, "fps": 16, "size": 224, "video_pool": "max"}, _avid_video)
