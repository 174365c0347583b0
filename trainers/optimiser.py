"""Optimisers, the learning rate as a function of the step, and the memory format of weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from avstore.errors import UsageError
from trainers.config import TrainConfig


def learning_rate_at(step: int, total: int, steps_per_epoch: float, config: TrainConfig) -> float:
    """The rate of optimiser step `step` (from 0) of `total`: a pure function, so that resuming needs no state.

    Linear warm-up from 1 / (warmup_steps + 1) of the rate; then constant, cosine to 0 at `total`, or multistep.
    """
    base = config.learning_rate
    if step < config.warmup_steps:
        return base * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, total - config.warmup_steps)))
    if config.schedule == "multistep":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return base * config.decay**passed
    return base


def make_optimiser(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Over the parameters that take a gradient (momentum copies and teachers do not), in the order of the module; fused
    where torch has it. UsageError where there is none."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError("nothing to train", "no parameter of this method takes a gradient")
    if config.optimiser == "sgd":
        return torch.optim.SGD(
            parameters,
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    return kind(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True)


def channels_last(module: nn.Module) -> None:
    """Convolution weights into the memory format that their kernels want (numbers stay)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
