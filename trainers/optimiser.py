"""Optimisers, the learning rate as a function of the step, and the memory format of weights.

Every parameter follows the schedule, but for those to which a method gives a constant rate of their own: its
`own_rates()`, where it has one, maps beginnings of parameter names to rates. LARC (`larc`) scales each tensor's
gradient before any optimiser. Both act at the optimiser's step, so the loop knows of neither.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from avstore.errors import UsageError
from trainers.config import TrainConfig

LARC_EPS = 1e-8  # [C] CrissCross'; of NVIDIA's apex too


def learning_rate_at(step: int, total: int, steps_per_epoch: float, config: TrainConfig) -> float:
    """The rate of optimiser step `step` (from 0) of `total`: a pure function, so that resuming needs no state.

    Linear warm-up from 1 / (warmup_steps + 1) of the rate; then constant, cosine to `final_rate` at `total`, or
    multistep.
    """
    base = config.learning_rate
    if step < config.warmup_steps:
        return base * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        part = 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, total - config.warmup_steps)))
        return base * part if not config.final_rate else config.final_rate + (base - config.final_rate) * part
    if config.schedule == "multistep":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return base * config.decay**passed
    return base


def make_optimiser(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Over the parameters that take a gradient (momentum copies and teachers do not), in the order of the module; fused
    where torch has it. UsageError where there is none, and where `own_rates` names what the module does not have."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError("nothing to train", "no parameter of this method takes a gradient")
    groups = _groups(module, named)
    decay = 0.0 if config.larc else config.weight_decay  # LARC has it in its formula
    if config.optimiser == "sgd":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(
            groups,
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=decay,
            nesterov=config.nesterov,
            fused=True,
        )
        if config.momentum:
            optimiser.register_step_pre_hook(_late_buffers)
    else:
        kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
        optimiser = kind(groups, config.learning_rate, weight_decay=decay, fused=True)
    if any("own_rate" in group for group in groups):
        optimiser.register_step_pre_hook(_own_rates)
    if config.larc:
        optimiser.register_step_pre_hook(functools.partial(_larc, trust=config.larc, decay=config.weight_decay))
    return optimiser


def _late_buffers(optimiser: torch.optim.Optimizer, *_: object) -> None:
    """A momentum of zeros for parameters whose first gradient comes after others' (a student that waited): torch's
    fused SGD refuses a group of which some have one. Its unfused one begins with the gradient: 0 * momentum + g."""
    for group in optimiser.param_groups:
        given = [p for p in group["params"] if p.grad is not None]
        late = [p for p in given if optimiser.state.get(p, {}).get("momentum_buffer") is None]
        if len(late) < len(given):
            for p in late:
                optimiser.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)


def larc_(parameter: Tensor, gradient: Tensor, rate: float, trust: float, decay: float) -> None:
    """LARC of one tensor, in place: g <- min(r / rate, 1) (g + decay w) with r = trust |w| / (|g| + decay |w| + eps).

    r is the local rate of LARS (You, Gitman, Ginsburg, arXiv 1708.03888), the minimum NVIDIA's clip: a tensor never
    moves faster than at `rate`, and slower where its gradient is large beside its weights. Where |w| or |g| is 0 the
    gradient is left as it is. Never waits for the device.
    """
    w, g = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
    moves = (w > 0) & (g > 0)
    scale = trust * w / (g + decay * w + LARC_EPS) / max(rate, torch.finfo(torch.float32).tiny)
    gradient.add_(parameter * (decay * moves.to(parameter.dtype)))
    gradient.mul_(torch.where(moves, scale.clamp(max=1), 1.0))


def _groups(module: nn.Module, named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """The parameters of the schedule, then one group for each rate of the method's own."""
    own: dict[str, float] = getattr(module, "own_rates", dict)()
    unknown = [start for start in own if not any(name.startswith(start) for name, _ in named)]
    if unknown:
        raise UsageError(f"a rate for parameters named {unknown[0]}...", "this method trains none of that name")
    by_rate: dict[float | None, list[nn.Parameter]] = {None: []}
    for name, parameter in named:
        rate = next((rate for start, rate in own.items() if name.startswith(start)), None)
        by_rate.setdefault(rate, []).append(parameter)
    return [{"params": p} if rate is None else {"params": p, "own_rate": rate} for rate, p in by_rate.items() if p]


def _own_rates(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: the loop has given every group the schedule's rate."""
    for group in optimiser.param_groups:
        group["lr"] = group.get("own_rate", group["lr"])


@torch.no_grad()
def _larc(optimiser: torch.optim.Optimizer, *_: Any, trust: float, decay: float) -> None:
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                larc_(parameter, parameter.grad, float(group["lr"]), trust, decay)


def channels_last(module: nn.Module) -> None:
    """Convolution weights into the memory format that their kernels want (numbers stay)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
