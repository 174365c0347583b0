"""Synthetic checkpoints with the names and shapes of the published ones, written down from their description; and what
those networks compute, as plain functions of such a state dict: the converter is held to both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def _norm(name: str, channels: int, g: torch.Generator) -> State:
    return {
        f"{name}.weight": 1 + 0.2 * torch.randn(channels, generator=g),
        f"{name}.bias": 0.2 * torch.randn(channels, generator=g),
        f"{name}.running_mean": 0.1 * torch.randn(channels, generator=g),
        f"{name}.running_var": 0.5 + torch.rand(channels, generator=g),
        f"{name}.num_batches_tracked": torch.tensor(100),
    }


def _conv(name: str, g: torch.Generator, *shape: int) -> State:
    fan = shape[1] * torch.Size(shape[2:]).numel()
    return {f"{name}.weight": torch.randn(shape, generator=g) * (2 / fan) ** 0.5}


def _linear(name: str, g: torch.Generator, inputs: int, outputs: int) -> State:
    return {
        f"{name}.weight": torch.randn(outputs, inputs, generator=g) * (2 / inputs) ** 0.5,
        f"{name}.bias": 0.1 * torch.randn(outputs, generator=g),
    }


def avid_video(width: int, blocks: tuple[int, ...], g: torch.Generator) -> State:
    out = _conv("conv1.0", g, width, 3, 3, 7, 7) | _norm("conv1.1", width, g)
    before = width
    for stage, n in enumerate(blocks):
        channels = width * 2**stage
        for block in range(n):
            name = f"conv{stage + 2}x" + (f".{block}" if blocks != (1, 1, 1, 1) else "")
            inputs = before if block == 0 else channels
            out |= _conv(f"{name}.spt_conv1", g, channels, inputs, 1, 3, 3) | _norm(f"{name}.spt_bn1", channels, g)
            out |= _conv(f"{name}.tmp_conv1", g, channels, channels, 3, 1, 1) | _norm(f"{name}.tmp_bn1", channels, g)
            out |= _conv(f"{name}.spt_conv2", g, channels, channels, 1, 3, 3) | _norm(f"{name}.spt_bn2", channels, g)
            out |= _conv(f"{name}.tmp_conv2", g, channels, channels, 3, 1, 1) | _norm(f"{name}.out_bn", channels, g)
            if inputs != channels:
                out |= _conv(f"{name}.res_conv", g, channels, inputs, 1, 1, 1)
        before = channels
    return out


def avid_audio(width: int, g: torch.Generator) -> State:
    out = _conv("conv1.0", g, width, 1, 7, 7) | _norm("conv1.1", width, g)
    before = width
    for stage in range(4):
        channels, name = width * 2**stage, f"block{stage + 1}"
        out |= _conv(f"{name}.conv1", g, channels, before, 3, 3) | _norm(f"{name}.bn1", channels, g)
        out |= _conv(f"{name}.conv2", g, channels, channels, 3, 3) | _norm(f"{name}.bn2", channels, g)
        before = channels
    return out


def crisscross_audio(width: int, g: torch.Generator) -> State:
    out = _conv("conv1.0", g, width, 1, 7, 7) | _norm("conv1.1", width, g)
    before = width
    for stage in range(4):
        channels = width * 2**stage
        for block in range(2):
            inputs, name = before if block == 0 else channels, f"block{stage + 1}.{block}"
            out |= _conv(f"{name}.conv1", g, channels, inputs, 3, 3) | _norm(f"{name}.bn1", channels, g)
            out |= _conv(f"{name}.conv2", g, channels, channels, 3, 3) | _norm(f"{name}.bn2", channels, g)
            if inputs != channels:
                out |= _conv(f"{name}.downsample.0", g, channels, inputs, 1, 1) | _norm(
                    f"{name}.downsample.1", channels, g
                )
        before = channels
    return out


def avid_head(inputs: int, sizes: tuple[int, ...], g: torch.Generator) -> State:
    out: State = {}
    for n, size in enumerate(sizes):
        out |= _linear(f"projection.{2 * n}", g, inputs, size)
        inputs = size
    return out


def crisscross_head(inputs: int, hidden: int, g: torch.Generator) -> State:
    out: State = {}
    for layer in (1, 2, 3):
        out |= _linear(f"layer{layer}.0", g, inputs, hidden) | _norm(f"layer{layer}.1", hidden, g)
        inputs = hidden
    return out


def under(prefix: str, state: State) -> State:
    return {f"{prefix}.{k}": x for k, x in state.items()}


def avid_checkpoint(
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    head: tuple[int, ...] = (512, 512, 128),
    videos: int = 5,
    parallel: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """What AVID-CMA's training writes: DataParallel's prefix, both heads, the criterion's banks and constants."""
    g = torch.Generator().manual_seed(seed)
    model = under("video_model", avid_video(width, blocks, g)) | under("audio_model", avid_audio(width, g))
    for kind in ("video", "audio"):
        model |= under(f"{kind}_proj", avid_head(8 * width, head, g))
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    return {
        "epoch": 30,
        "model": under("module", model) if parallel else model,
        "optimizer": optimiser.state_dict(),
        "train_criterion": {
            "nce_average.view1_mem": torch.randn(videos, head[-1], generator=g),
            "nce_average.view2_mem": torch.randn(videos, head[-1], generator=g),
            "nce_average.positive_set": torch.zeros(videos, 32, dtype=torch.int32),
            "criterion.avg_exp_score": torch.tensor(2.25),
        },
    }


def crisscross_checkpoint(width: int = 64, hidden: int = 2048, seed: int = 0) -> dict[str, Any]:
    """What CrissCross' training writes: backbones, projectors, the two again as encoders, predictors."""
    g = torch.Generator().manual_seed(seed)
    model: State = {}
    for kind, net in (("video", avid_video(width, (2, 2, 2, 2), g)), ("audio", crisscross_audio(width, g))):
        head = crisscross_head(8 * width, hidden, g)
        model |= under(f"{kind}_backbone", net) | under(f"{kind}_projector", head)
        model |= under(f"{kind}_encoder.0", net) | under(f"{kind}_encoder.2", head)
        model |= under(f"{kind}_predictor", _linear("layer1.0", g, hidden, 8) | _linear("layer2", g, 8, hidden))
    return {"model": under("module", model), "optimizer": {}, "lr_scheduler": {}, "epoch": 100}


# ---- what they compute, in eval mode ---------------------------------------------------------------------------------


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, *(state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), training=False
    )


def run_avid_video(s: State, x: Tensor, pool: str) -> Tensor:
    """(B, 3, T, H, W) -> pooled features, from the names of the checkpoint."""
    x = F.relu(norm(s, "conv1.1", F.conv3d(x, s["conv1.0.weight"], None, (1, 2, 2), (1, 3, 3))))
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage in range(2, 6):
        names = sorted({k.rpartition(".spt_conv1")[0] for k in s if k.startswith(f"conv{stage}x") and "spt_conv1" in k})
        for n, name in enumerate(names):
            t = 2 if stage > 2 and n == 0 else 1
            y = F.conv3d(x, s[f"{name}.spt_conv1.weight"], None, (1, t, t), (0, 1, 1))
            y = F.conv3d(
                F.relu(norm(s, f"{name}.spt_bn1", y)), s[f"{name}.tmp_conv1.weight"], None, (t, 1, 1), (1, 0, 0)
            )
            y = F.conv3d(F.relu(norm(s, f"{name}.tmp_bn1", y)), s[f"{name}.spt_conv2.weight"], None, 1, (0, 1, 1))
            y = F.conv3d(F.relu(norm(s, f"{name}.spt_bn2", y)), s[f"{name}.tmp_conv2.weight"], None, 1, (1, 0, 0))
            key = f"{name}.res_conv.weight"
            x = F.relu(norm(s, f"{name}.out_bn", y + (F.conv3d(x, s[key], None, t) if key in s else x)))
    return x.flatten(2).amax(2) if pool == "max" else x.flatten(2).mean(2)


def run_avid_audio(s: State, x: Tensor) -> Tensor:
    """(B, 1, frames, bins) -> max-pooled features."""
    x = F.relu(norm(s, "conv1.1", F.conv2d(x, s["conv1.0.weight"], None, 2, 3)))
    for stage in range(1, 5):
        name = f"block{stage}"
        x = F.relu(norm(s, f"{name}.bn1", F.conv2d(x, s[f"{name}.conv1.weight"], None, 1 if stage == 4 else 2, 1)))
        x = F.relu(norm(s, f"{name}.bn2", F.conv2d(x, s[f"{name}.conv2.weight"], None, 1, 1)))
    return x.flatten(2).amax(2)


def run_crisscross_audio(s: State, x: Tensor) -> Tensor:
    """(B, 1, bins, frames), bins first -> average-pooled features."""
    x = F.relu(norm(s, "conv1.1", F.conv2d(x, s["conv1.0.weight"], None, 2, 3)))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, t = f"block{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(s, f"{name}.bn1", F.conv2d(x, s[f"{name}.conv1.weight"], None, t, 1)))
            y = norm(s, f"{name}.bn2", F.conv2d(y, s[f"{name}.conv2.weight"], None, 1, 1))
            key = f"{name}.downsample.0.weight"
            x = F.relu(y + (norm(s, f"{name}.downsample.1", F.conv2d(x, s[key], None, t)) if key in s else x))
    return x.flatten(2).mean(2)


def run_avid_head(s: State, x: Tensor) -> Tensor:
    for n in (0, 2, 4):
        x = F.linear(x, s[f"projection.{n}.weight"], s[f"projection.{n}.bias"])
        x = F.relu(x) if n < 4 else x
    return x


def run_crisscross_head(s: State, x: Tensor) -> Tensor:
    for n in (1, 2, 3):
        x = norm(s, f"layer{n}.1", F.linear(x, s[f"layer{n}.0.weight"], s[f"layer{n}.0.bias"]))
        x = F.relu(x) if n < 3 else x
    return x


def part(state: State, prefix: str) -> State:
    return {k.removeprefix(f"{prefix}."): x for k, x in state.items() if k.startswith(f"{prefix}.")}
