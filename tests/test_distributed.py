"""Gathering with gradients: two processes get what one gets, in float64."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainers.distributed import gather_with_grad, global_means

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from trainers.distributed import gather_with_grad, rank, world
dist.init_process_group("gloo")
g = torch.Generator().manual_seed(0)
x, w = torch.randn(7, 4, generator=g, dtype=torch.float64), torch.randn(4, 4, generator=g, dtype=torch.float64)
def contrast(own, all_, first):
    score = own @ all_.T
    target = first + torch.arange(len(own))
    return torch.nn.functional.cross_entropy(score, target, reduction="sum") / len(all_)
bounds = (0, 7) if world() == 1 else (0, 3, 7)  # uneven on purpose
part = slice(bounds[rank()], bounds[rank() + 1])
for form in ("own", "whole"):
    weight = w.clone().requires_grad_()
    net = lambda t: torch.tanh(t @ weight)
    z = net(x[part])
    every = gather_with_grad(z)
    assert every.shape == (7, 4)
    if form == "own":
        loss = world() * contrast(z, every, part.start)
    else:
        loss = contrast(every, every, 0)
    loss.backward()
    total = weight.grad.clone()
    dist.all_reduce(total)
    if rank() == 0:
        print(form, [float(v) for v in (total / world()).flatten()])  # as DistributedDataParallel averages
dist.barrier()
dist.destroy_process_group()
"""


def launch(world: int) -> dict[str, torch.Tensor]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port)}  # fmt: skip
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD.format(root=str(ROOT))], env={**env, "RANK": str(rank)},
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(world)
    ]  # fmt: skip
    said = [child.communicate(timeout=120) for child in children]
    assert all(child.returncode == 0 for child in children), said
    return {line.split(" ", 1)[0]: torch.tensor(json.loads(line.split(" ", 1)[1]), dtype=torch.float64)
            for line in said[0][0].splitlines()}  # fmt: skip


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one() -> None:
    one, two = launch(1), launch(2)
    assert one.keys() == two.keys() == {"own", "whole"}
    torch.testing.assert_close(one["own"], one["whole"], rtol=0, atol=1e-14)
    for form in one:
        torch.testing.assert_close(two[form], one[form], rtol=0, atol=1e-13)


def test_alone_it_is_the_tensor_itself() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_grad(x) is x


def test_means_leave_out_what_is_masked() -> None:
    loss = torch.tensor([[1.0, torch.nan, 3.0], [torch.inf, torch.inf, torch.inf]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert global_means(loss, mask).tolist() == [2.0, 0.0]
