"""What a run's networks weigh and what computed them: noted in its folder when a training starts, for whoever reports.

    runs/avid/machine.json    {"parameters": {"trained": n, "frozen": n, "networks": {"towers.video": n, ...}},
                               "starts": [{"step": 0, "devices": ["NVIDIA H100 80GB HBM3", ...], "precision": "bf16",
                                           "threads": 8, "torch": "2.13.0"}, ...]}

A line of `starts` for each change: a run that goes on elsewhere has two. Networks: the encoders, all their numbers,
trained or not. Not here: what a run was asked (`config.json`) and measured (`metrics.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from avstore.durable import canonical_json, read_json, write_atomic
from avstore.errors import CorruptError
from trainers import distributed
from trainers.encoders import Encoder, count_parameters

FILE = "machine.json"


def note_machine(path: Path, method: nn.Module, device: torch.device, precision: str, step: int) -> None:
    """Notes a start at `step` in the run's folder; the first process writes. Collective: every process calls it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    devices: list[Any] = [name]
    if distributed.world() > 1:
        devices = [None] * distributed.world()
        dist.all_gather_object(devices, name)
    if distributed.rank():
        return
    start = {"devices": devices, "precision": precision, "threads": torch.get_num_threads(), "torch": torch.__version__}
    starts = [s for s in (read_machine(path) or {"starts": []})["starts"] if s["step"] <= step]
    if not starts or {k: v for k, v in starts[-1].items() if k != "step"} != start:
        starts = [*(s for s in starts if s["step"] < step), {"step": step, **start}]
    write_atomic(path / FILE, canonical_json({"parameters": parameters(method), "starts": starts}))


def parameters(method: nn.Module) -> dict[str, Any]:
    """{'trained': n, 'frozen': n, 'networks': {name: n}} of a method; an encoder inside another counts with it."""
    every, trained = sum(p.numel() for p in method.parameters()), count_parameters(method)
    networks: dict[str, int] = {}
    for name, module in method.named_modules():
        if isinstance(module, Encoder) and not any(name.startswith(f"{other}.") for other in networks):
            networks[name] = sum(p.numel() for p in module.parameters())
    return {"trained": trained, "frozen": every - trained, "networks": networks}


def read_machine(path: Path) -> dict[str, Any] | None:
    """What is noted in a run's folder; None of a run that noted nothing (of an older version, or converted weights).
    CorruptError where the file cannot be read as this."""
    file = path / FILE
    if not file.is_file():
        return None
    value = read_json(file)
    counts, starts = (value.get(k) if isinstance(value, dict) else None for k in ("parameters", "starts"))
    fits = isinstance(counts, dict) and {"trained", "frozen", "networks"} <= set(counts) and isinstance(starts, list)
    if not fits or not starts or not all(isinstance(s, dict) and {"step", "devices"} <= set(s) for s in starts):
        raise CorruptError(f"{file} is damaged", "it holds no parameters and starts", "remove it")
    return {"parameters": counts, "starts": starts}


def short(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, words): what is trained, and the devices of the last start."""
    return [("parameters", _millions(found["parameters"]["trained"])), ("devices", _devices(found["starts"][-1]))]


def sentence(found: dict[str, Any]) -> str:
    """The same in full: networks, frozen parts, every start."""
    counts = found["parameters"]
    nets = ", ".join(f"{name.rsplit('.', 1)[-1]} {_millions(n)}" for name, n in counts["networks"].items())
    frozen = f", {_millions(counts['frozen'])} frozen" if counts["frozen"] else ""
    starts = [_devices(s) + (f", {s['precision']}" if s.get("precision") else "")
              + (f" from step {s['step']:,}" if s["step"] else "") for s in found["starts"]]  # fmt: skip
    return f"{_millions(counts['trained'])} parameters{frozen}{f' ({nets})' if nets else ''}, on {'; '.join(starts)}"


def _devices(start: dict[str, Any]) -> str:
    return " + ".join(f"{start['devices'].count(k)} x {k}" for k in dict.fromkeys(start["devices"]))


def _millions(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n:,}"
