"""Checkpoints: there whole or not at all, and what is loaded is what was saved, strides of the optimiser included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avstore.errors import ConflictError, CorruptError, MachineError, NotFoundError
from trainers import checkpoint as c
from trainers.config import TrainConfig
from trainers.metrics import MetricLog, read_metrics
from trainers.optimiser import channels_last, make_optimiser


class Net(nn.Module):
    """A method as far as checkpoints go: weights, batch statistics, and one tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (2, 3, 3), bias=False)
        self.norm = nn.BatchNorm3d(4)
        self.own = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).square().mean((1, 2, 3, 4)).sum()

    def method_state(self) -> dict[str, Tensor]:
        return {"own": self.own}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        self.own = state["own"].clone()


def made(seed: int, kind: str = "adam") -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    channels_last(net)
    return net, make_optimiser(net, TrainConfig(optimiser=kind, learning_rate=1e-2))  # type: ignore[arg-type]


def step(net: Net, optimiser: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimiser.zero_grad()
    net(x.contiguous(memory_format=torch.channels_last_3d)).backward()
    optimiser.step()
    net.own += 1


def everything(net: Net, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**net.state_dict(), **net.method_state(), **c.flat_optimiser(net, optimiser)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_going_on_is_bitwise_the_same(tmp_path: Path, kind: str) -> None:
    net, optimiser = made(0, kind)
    for i in range(3):
        step(net, optimiser, i)
    saved = c.save(tmp_path, 3, net, optimiser, net.method_state(), {"total_steps": 5, "epoch": 0})
    other, optimiser2 = made(1, kind)
    state = c.load(saved, other, optimiser2)
    assert state["step"] == 3 and state["total_steps"] == 5
    assert equal(everything(net, optimiser), everything(other, optimiser2))
    for i in range(3, 6):
        step(net, optimiser, i)
        step(other, optimiser2, i)
    assert equal(everything(net, optimiser), everything(other, optimiser2))


def test_the_trap_that_strides_are_kept_for(tmp_path: Path) -> None:
    """Loaded as the file has them, the moments of a channels-last weight have other strides than the weight."""
    net, optimiser = made(0)
    step(net, optimiser, 0)
    saved = c.save(tmp_path, 1, net, optimiser, net.method_state(), {})
    other, optimiser2 = made(1)
    c.load(saved, other, optimiser2)
    weight = other.conv.weight
    assert optimiser2.state[weight]["exp_avg"].stride() == weight.stride()
    plain = load_file(saved.path / "optimizer.safetensors")["conv.weight/exp_avg"]
    assert plain.stride() != weight.stride()
    step(net, optimiser, 1)
    step(other, optimiser2, 1)
    good = other.conv.weight.detach().clone()
    c.load(saved, other, optimiser2)
    optimiser2.state[weight]["exp_avg"] = plain
    step(other, optimiser2, 1)
    assert torch.equal(net.conv.weight, good)
    assert not torch.equal(other.conv.weight, good)  # silently wrong: why the copy is made


def test_a_checkpoint_is_named_last_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimiser = made(0)
    step(net, optimiser, 0)
    first = c.save(tmp_path, 7, net, optimiser, net.method_state(), {"x": 1})
    assert first.path.name == "step-000007" and sorted(p.name for p in tmp_path.iterdir()) == ["step-000007"]
    digest = first.digest
    step(net, optimiser, 1)
    assert c.save(tmp_path, 7, net, optimiser, net.method_state(), {"x": 2}).digest == digest  # nothing overwritten

    def full(*a: object, **k: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(c, "_sync", full)
    with pytest.raises(MachineError, match="full"):
        c.save(tmp_path, 8, net, optimiser, net.method_state(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000007"]


def test_prune_and_sweep(tmp_path: Path) -> None:
    for step_ in (1, 2, 3, 4, 5, 6):
        c.folder_of(tmp_path, step_).mkdir()
    (tmp_path / ".step-000009.tmp.77").mkdir()
    assert c.prune(tmp_path, keep_last=2, keep_every=3) == [1, 2, 4]
    assert [x.step for x in c.list_checkpoints(tmp_path)] == [3, 5, 6]
    c.sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_damage_and_other_nets_are_told(tmp_path: Path) -> None:
    net, optimiser = made(0)
    step(net, optimiser, 0)
    saved = c.save(tmp_path, 1, net, optimiser, net.method_state(), {})
    other = Net()
    other.norm = nn.BatchNorm3d(4, affine=False)
    with pytest.raises(ConflictError, match=r"norm\.bias"):
        c.load(saved, other)
    file = saved.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.safetensors is damaged"):
        c.load(saved, net)
    file.unlink()
    with pytest.raises(NotFoundError):
        c.load(saved, net)


def test_environment_differences_are_named() -> None:
    now = c.environment()
    assert now["threads"] == torch.get_num_threads() and now["torch"] == torch.__version__
    assert c.differences(now, dict(now)) == []
    assert c.differences({**now, "threads": 99}, now) == [f"threads was 99, is {now['threads']}"]


def test_metrics_of_steps_done_again_are_dropped(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log:
        for i in (1, 2, 3):
            log.write(i, {"loss": i / 2, "bad": float("nan"), "words": "x"})
    with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 4, "lo')  # killed in the middle of a line
    with MetricLog(tmp_path, resume_at=2) as log:
        log.write(3, {"loss": 9.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["loss"]) for x in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert lines[0]["bad"] is None
    (tmp_path / "metrics.jsonl").write_text("{}\n" + json.dumps({"step": 1}) + "\n")
    with pytest.raises(CorruptError, match="line 1"):
        read_metrics(tmp_path / "metrics.jsonl")
