"""Two processes are one: with batch statistics over both, float64 and SGD, they end where a single process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_run import config, store_in, tensors

from trainers import loop, trainer
from trainers.config import RunConfig, resolve
from trainers.metrics import read_metrics
from trainers.run import Run

CHILD = """
import json, sys
sys.path[:0] = [{tests!r}, {root!r}]
import avstore, test_processes
from trainers.config import RunConfig
from trainers.loop import train
test_processes.with_global_statistics()
config = RunConfig.from_json(json.loads({config!r}))
{before}
notes = []
result = train(config.name, avstore.open({store!r}), config, {run!r}, on_event=notes.append)
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
    honest = trainer.build
    trainer.build = lambda *a: converted(honest(*a))


class Said(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    out: str
    wrong: str


def launch(store: Path, run: Path, config: RunConfig, world: int, before: str = "") -> list[Said]:
    """What `torchrun --nproc-per-node world` does, with the output of every process. before: a line that each runs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = Path(__file__).resolve().parent
    code = CHILD.format(tests=str(here), root=str(here.parent), store=str(store), run=str(run), before=before,
                        config=json.dumps(config.to_json()))  # fmt: skip
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


def nearly(one: Run, two: Run) -> None:
    """Every tensor of the last checkpoints, to 1e-12 of its size."""
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys() and "method.safetensors:bank.memory" in a
    worst = max((float((a[k].double() - b[k].double()).abs().max() / (1 + a[k].double().abs().max())), k) for k in a)
    assert worst[0] < 1e-12, worst


def test_two_processes_end_where_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path)
    honest = trainer.build
    monkeypatch.setattr(trainer, "build", lambda *a: converted(honest(*a)))
    one = loop.train("avid", store, config(*SETS), tmp_path / "one").run
    said = launch(store.path, tmp_path / "two", config(*SETS), 2)
    assert [(s.code, s.out[:1]) for s in said] == [(0, "6"), (0, "6")], said[0].wrong + said[1].wrong
    nearly(one, Run(tmp_path / "two"))
    again = launch(store.path, tmp_path / "two", config(*SETS), 2)  # finished: both see that there is nothing to do
    assert [(s.code, s.out[:1]) for s in again] == [(0, "6"), (0, "6")], again[0].wrong


@pytest.mark.slow
def test_parameters_that_a_step_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSCL's student waits while its teacher learns, then both learn: `unused_parameters` tells the loop, and without
    it DDP refuses the second step."""
    store = store_in(tmp_path)
    c = resolve("sscl-stage-1", preset="tiny").replace(
        width=4, hidden=8, dim=8, head_batch_norm=False, temperature=0.5, frames=4, fps=8, size=32, seconds=0.5,
        negatives=6, batch=6, draws=1, epochs=4, teacher_epochs=2, learning_rate=1e-4, schedule="constant",
        warmup_steps=0, precision="fp64", optimiser="sgd", drop_last=True, statistics_clips=16, in_process=True,
        threads=1, log_every=1,
    )  # fmt: skip
    without = "from trainers.sscl import Sscl; del Sscl.unused_parameters"
    refused = launch(store.path, tmp_path / "refused", c, 2, without)
    assert all(s.code != 0 for s in refused) and "find_unused_parameters" in refused[0].wrong, refused[0].wrong
    honest = trainer.build
    monkeypatch.setattr(trainer, "build", lambda *a: converted(honest(*a)))
    one = loop.train(c.name, store, c, tmp_path / "one").run
    said = launch(store.path, tmp_path / "two", c, 2)
    assert [(s.code, s.out[:1]) for s in said] == [(0, "4"), (0, "4")], said[0].wrong + said[1].wrong
    nearly(one, Run(tmp_path / "two"))
    joint = [line["epoch/joint"] for line in read_metrics(tmp_path / "two" / "metrics.jsonl") if "epoch/joint" in line]
    assert joint == [0, 0, 1, 1]


def test_an_error_of_the_first_process_ends_all(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    loop.train("avid", store, config("steps=1"), tmp_path / "run")
    for said in launch(store.path, tmp_path / "run", config(*SETS, "seed=7"), 2):
        assert said.code == 1 and "has another configuration" in said.wrong
