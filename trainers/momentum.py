"""Momentum copies of networks: the same weights, a step behind, that no optimiser touches.

    target = momentum_copy(net)    # a submodule of the method: checkpoints keep it, DDP and optimisers skip it
    follow(target, net, 0.99)      # after the optimiser's step: target <- .99 target + .01 net

Only parameters follow. The batch statistics of a copy are those of its own passes, as in MoCo's and BYOL's code: both
run it in train mode.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from avstore.errors import UsageError

Net = TypeVar("Net", bound=nn.Module)


def momentum_copy(net: Net) -> Net:
    """A copy of `net` of equal weights, none of which takes a gradient."""
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, net: nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * net, parameter by parameter.

    Raises UsageError for a momentum outside [0, 1] and for networks of other parameters.
    """
    if not 0 <= momentum <= 1:
        raise UsageError(f"a momentum of {momentum}", "it must lie in [0, 1]")
    mine, theirs = dict(target.named_parameters()), dict(net.named_parameters())
    if mine.keys() != theirs.keys():
        raise UsageError("a momentum copy of another network", f"they differ in {sorted(mine.keys() ^ theirs.keys())}")
    for name, parameter in mine.items():
        parameter.lerp_(theirs[name], 1 - momentum)


def cosine_momentum(start: float, step: int, total: int) -> float:
    """BYOL, section 3.3: 1 - (1 - start) * (cos(pi k / K) + 1) / 2, from `start` to 1; 1 beyond step `total`."""
    return 1 - (1 - start) * (math.cos(math.pi * min(step, total) / max(total, 1)) + 1) / 2
