"""Every method on a device that is not the host's: networks, bank, labels and state move, and nothing mixes.

It runs on `two_devices`: what a GPU would refuse is refused here too. Kernels, streams and precision are `tests/gpu`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from test_methods import CLASSES, ROWS, build, smaller
from two_devices import FAR, Far, TwoDevices

from benchmarks.step import synthetic
from trainers.bank import MemoryBank
from trainers.config import METHODS, resolve
from trainers.teacher import Teacher

BATCH = 6


def test_what_mixes_is_refused() -> None:
    with TwoDevices():
        a, b = torch.ones(3, device=FAR), torch.ones(3)
        assert isinstance(a, Far) and a.device == FAR and not isinstance(a.cpu(), Far)
        assert (a + a).sum().item() == 6 and (a + torch.tensor(1.0)).tolist() == [2, 2, 2]
        assert a[torch.tensor([0, 2])].device == FAR
        for mixed in (lambda: a + b, lambda: b[a.long()], lambda: torch.stack([a, b])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        net = torch.nn.Linear(3, 2).to(FAR)
        net(a[None]).sum().backward()
        assert net.weight.grad is not None and net.weight.grad.device == FAR


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_and_its_state_on_another_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # knows no such device
    cfg = smaller(resolve(name, preset="tiny")).replace(batch=BATCH)
    method: Any = build(cfg, ROWS)  # after its stage, with teachers that answer
    near = synthetic(cfg, BATCH, ROWS, torch.device("cpu"))
    if near.labels is not None:
        near = dataclasses.replace(near, labels=near.labels % len(CLASSES))
    for module in method.modules():
        if isinstance(module, Teacher):
            module._answer = lambda batch, dim=module.dim: torch.ones(len(batch.row), dim).to(batch.row.device)
        if isinstance(module, MemoryBank):
            module.seen.fill_(True)
    with TwoDevices():
        method.to(FAR)
        for epoch in (0, 1):
            there = {
                f.name: x.to(FAR) if isinstance(x := getattr(near, f.name), torch.Tensor) else x
                for f in dataclasses.fields(near)
            }
            batch = dataclasses.replace(near, **{**there, "epoch": epoch})
            method.train()
            method.start_epoch(epoch)
            loss, metrics = method(batch)
            assert loss.device == FAR
            loss.backward()
            for p in method.parameters():
                assert p.grad is None or p.grad.device == FAR
            method.after_step()
            state = {k: x.cpu() for k, x in method.method_state().items()}
            method.load_method_state(state)
        assert {k: x.shape for k, x in method.method_state().items()} == {k: x.shape for k, x in state.items()}
        assert all(isinstance(x, int | float | torch.Tensor) for x in metrics.values())
