"""Sums, gathers and means over the processes of a `torchrun`; without a process group each is the local operation.

The convention of the whole package: a rank's loss is `world * local sum / global count`. DistributedDataParallel
averages gradients over ranks, so what comes out is the gradient of the mean over the *global* batch, also where ranks
hold different numbers of valid samples. The mean over ranks of any metric made here is likewise its global value.
Nothing here starts or ends a process group.
"""

# legend: B batch of this rank, T terms of a loss

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avstore.errors import ConflictError


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    return dist.get_world_size() if active() else 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient; `x` itself is left alone."""
    if world() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def all_gather_rows(x: Tensor) -> Tensor:
    """The ranks' tensors concatenated along dimension 0 in rank order; their lengths may differ. Without gradient."""
    x = x.detach()
    if world() == 1:
        return x
    return _gather(x, _lengths(x))


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backwards, each rank's rows get the sum over ranks of the gradients that reached them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: rank()])
        return total[start : start + ctx.sizes[rank()]], None


def gather_with_grad(x: Tensor) -> Tensor:
    """`all_gather_rows` through which gradients flow back to the ranks that the rows came from; collective, forwards
    and backwards. Lengths may differ.

    A loss of the whole gathered batch, computed on every rank, counts `world` times: each rank's rows get the gradient
    of the *sum* over ranks of their losses, and DistributedDataParallel divides by `world` once. So by the package's
    convention either every rank returns the whole batch' mean (the gathered rows' gradient is then world times it, and
    the average right), or its own rows' share, times world: `world * sum over own rows / global count`.
    """
    if world() == 1:
        return x
    return _Gather.apply(x, _lengths(x))


def _lengths(x: Tensor) -> list[int]:
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.empty_like(length) for _ in range(world())]
    dist.all_gather(lengths, length)
    return [int(n) for n in torch.cat(lengths)]


def _gather(x: Tensor, sizes: list[int]) -> Tensor:
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def global_means(loss_TB: Tensor, mask_TB: Tensor) -> Tensor:
    """(T,): for each term `world * sum over this rank's valid samples / number of valid samples of all ranks`.

    A masked sample contributes neither value nor gradient; a term without a valid sample anywhere is 0.
    """
    count_T = all_reduce_sum(mask_TB.sum(1).to(loss_TB.dtype))
    sum_T = torch.where(mask_TB, loss_TB, torch.zeros_like(loss_TB)).sum(1)
    return sum_T * world() / count_T.clamp(min=1)


def require_equal(number: int, what: str) -> None:
    """Raise ConflictError on every rank unless `number` (within int64) is the same on all of them."""
    if world() == 1:
        return
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    numbers = all_gather_rows(torch.tensor([number], device=device)).tolist()
    if len(set(numbers)) > 1:
        raise ConflictError(
            f"{what} differs between processes (checksums by rank: {numbers})",
            "all ranks must hold the same bits, or they would mine different positives",
            "resume all ranks from the same checkpoint",
        )
