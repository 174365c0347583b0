"""Two processes are one: with batch statistics over both, float64 and SGD, they end where a single process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_run import config, store_in, tensors

from trainers import loop
from trainers.run import Run

CHILD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import avstore, test_processes
from tiny_run import config
from trainers.loop import train
test_processes.with_global_statistics()
notes = []
result = train("avid", avstore.open({store!r}), config({sets}), {run!r}, on_event=notes.append)
print(result.step, [n.text for n in notes if n.kind == "note"])
"""
# Well conditioned on purpose: at temperature 0.07 this toy's gradients are 900 long, and float64's rounding of 1e-14
# grows tenfold with each step of 0.01 (measured: 1e-6 after six), whatever the number of processes.
SETS = ("precision=fp64", "optimiser=sgd", "learning_rate=0.0001", "schedule=constant", "epochs=2", "draws=2",
        "drop_last=true", "temperature=0.5", "head_batch_norm=false")  # fmt: skip


class _Sum(torch.autograd.Function):
    """Sum over processes, forwards and backwards."""

    @staticmethod
    def forward(ctx, x):
        y = x.clone()
        torch.distributed.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        g = grad.clone()
        torch.distributed.all_reduce(g)
        return g


class GlobalBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batch of all processes: torch's own (SyncBatchNorm) refuses a CPU."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        n = _Sum.apply(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = _Sum.apply(x.sum(dims)) / n
        centred = x - mean.view(shape)
        var = _Sum.apply(centred.square().sum(dims)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return centred * (torch.rsqrt(var + self.eps) * self.weight).view(shape) + self.bias.view(shape)


def converted(module: torch.nn.Module) -> torch.nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
            new = GlobalBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
        else:
            converted(child)
    return module


def with_global_statistics() -> None:
    honest = loop.build
    loop.build = lambda *a: converted(honest(*a))


class Said(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    out: str
    wrong: str


def launch(store: Path, run: Path, sets: tuple[str, ...], world: int) -> list[Said]:
    """What `torchrun --nproc-per-node world` does, with the output of every process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = Path(__file__).resolve().parent
    code = CHILD.format(tests=str(here), root=str(here.parent), store=str(store), run=str(run),
                        sets=", ".join(map(repr, sets)))  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port)}  # fmt: skip
    children = []
    for rank in range(world):
        mine = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen([sys.executable, "-c", code], env=mine, text=True, **pipes))  # type: ignore[call-overload]
    try:
        said = [child.communicate(timeout=200) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return [Said(child.returncode, out, wrong) for child, (out, wrong) in zip(children, said, strict=True)]


def test_two_processes_end_where_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path)
    honest = loop.build
    monkeypatch.setattr(loop, "build", lambda *a: converted(honest(*a)))
    one = loop.train("avid", store, config(*SETS), tmp_path / "one").run
    said = launch(store.path, tmp_path / "two", SETS, 2)
    two = Run(tmp_path / "two")
    assert [(s.code, s.out[:1]) for s in said] == [(0, "6"), (0, "6")], said[0].wrong + said[1].wrong
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys() and "method.safetensors:bank.memory" in a
    worst = max((float((a[k].double() - b[k].double()).abs().max() / (1 + a[k].double().abs().max())), k) for k in a)
    assert worst[0] < 1e-12, worst
    again = launch(store.path, tmp_path / "two", SETS, 2)  # finished: both processes see that there is nothing to do
    assert [(s.code, s.out[:1]) for s in again] == [(0, "6"), (0, "6")], again[0].wrong


def test_an_error_of_the_first_process_ends_all(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    loop.train("avid", store, config("steps=1"), tmp_path / "run")
    for said in launch(store.path, tmp_path / "run", (*SETS, "seed=7"), 2):
        assert said.code == 1 and "has another configuration" in said.wrong
