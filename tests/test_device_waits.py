"""How often a step makes the host wait for the device: each time, nothing is launched until the device has caught up.

Counted on `two_devices`, as CUDA would wait: a number or a mask that the host must see, and a copy that is not told to
go on without it. What is here may fall; where it rises, a step got a wait that it had not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from test_methods import ROWS, build, smaller
from torch.utils._pytree import tree_leaves
from two_devices import FAR, Far, TwoDevices

from benchmarks.step import synthetic
from trainers.bank import MemoryBank
from trainers.config import resolve

aten = torch.ops.aten
SEEN = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal)
MASKED = (aten.index, aten.index_put, aten.index_put_)
# forward, backward, after. Forward: `present.all()` of each pass of a network, the excluded rows, small lists that
# become tensors; after: the bank's checks and rounds
MOST = {"avid": (4, 0, 8), "avid-cma": (8, 0, 8), "crisscross": (9, 0, 0), "simclr": (4, 2, 0)}


class Waits(TwoDevices):
    """Counts, by phase, what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.count = "", Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, told = func.overloadpacket, kwargs or {}
        far = any(isinstance(x, Far) for x in tree_leaves((args, told)))
        if kind is aten._to_copy and told.get("device") is not None:
            crosses = far != (torch.device(told["device"]).type == FAR.type)
            self.count[self.phase] += crosses and (far or not told.get("non_blocking"))
        elif far and kind is aten.copy_:
            self.count[self.phase] += isinstance(args[0], Far) != isinstance(args[1], Far)
        elif far and kind in MASKED:
            self.count[self.phase] += any(isinstance(x, Far) and x.dtype == torch.bool for x in tree_leaves(args[1]))
        elif far and kind in SEEN:
            self.count[self.phase] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_waits_are_counted() -> None:
    with Waits() as waits:
        a = torch.ones(4, device=FAR)
        near = torch.ones(4)
        waits.phase = "none"
        _ = (a * 2).sum() + torch.where(a > 0, a, 0).max()
        near.to(FAR, non_blocking=True)
        waits.phase = "each"
        a.sum().item()  # 1
        a[a > 0]  # 2
        a.nonzero()  # 3
        near.to(FAR)  # 4
        a.cpu()  # 5
        a.new_tensor([1.0])  # 6
    assert waits.count["each"] == 6 and not waits.count["none"]


@pytest.mark.parametrize("name", MOST)
def test_a_step_waits_no_more_often(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # knows no such device
    cfg = smaller(resolve(name, preset="tiny")).replace(batch=6)
    method: Any = build(cfg, ROWS)
    near = synthetic(cfg, 6, ROWS, torch.device("cpu"))
    for module in method.modules():
        if isinstance(module, MemoryBank):
            module.seen.fill_(True)
    with Waits() as waits:
        method.to(FAR).train()
        there = {f.name: getattr(near, f.name) for f in dataclasses.fields(near)}
        batch = dataclasses.replace(
            near, **{k: x.to(FAR) if isinstance(x, torch.Tensor) else x for k, x in there.items()}
        )
        method.start_epoch(0)
        for _ in range(2):  # the first one has more to do: a partition constant
            waits.count.clear()
            waits.phase = "forward"
            loss, _ = method(batch)
            waits.phase = "backward"
            loss.backward()
            waits.phase = "after"
            method.after_step()
            waits.phase = ""
    found = tuple(waits.count[phase] for phase in ("forward", "backward", "after"))
    assert all(n <= most for n, most in zip(found, MOST[name], strict=True)), found
