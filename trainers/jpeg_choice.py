"""Where a run's pictures are decoded: by the reader's CPU threads, or on the device by one of `avstore.device_jpeg`.

    chosen = choose("auto", device, measure=rate)        # chosen.decode goes to the loader, chosen.why to the user

`auto` measures: clips a second of the coming batches, read, decoded and copied, by each way that works; the device is
taken where it is faster by MARGIN, since it decodes on what trains and the reader's threads do not. What was chosen is
in the checkpoint, and a run goes on with it: the pixels of two decoders are not equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from avstore import device_jpeg
from avstore.errors import ExtraMissingError, UsageError
from avstore.packed import Decode
from trainers import distributed

MARGIN = 1.2
Asked = Literal["cpu", "device", "auto"]


@dataclass(frozen=True)
class Choice:
    """`decoder`: "cpu" or a name of `device_jpeg`; `decode`: its function, None for the reader's threads; `why`: one
    line, '' where nothing was to be chosen."""

    decoder: str
    decode: Decode | None
    why: str


def choose(
    asked: Asked,
    device: torch.device,
    measure: Callable[[Decode | None], float],
    *,
    unfit: str | None = None,
    kept: str | None = None,
    candidates: dict[str, Decode | str] | None = None,
) -> Choice:
    """The decoder of a run.

    measure: clips a second with a decoder, None for the reader's threads. unfit: why this run's pictures cannot be
    decoded on a device. kept: the decoder of the checkpoint that the run goes on from. candidates: as
    `device_jpeg.available` gives them, the default. Under `torchrun` every rank takes rank 0's choice.

    UsageError and ExtraMissingError where asked is "device" and no device decodes.
    """
    if asked == "cpu":
        return Choice("cpu", None, _other("cpu", kept))
    if asked == "auto" and (device.type != "cuda" and candidates is None):
        return Choice("cpu", None, _other("cpu", kept))
    if unfit is not None:
        if asked == "device":
            raise UsageError("jpeg=device does not fit this run", unfit, "--set jpeg=cpu, or auto")
        return Choice("cpu", None, f"pictures are decoded on the CPU: {unfit}")
    found = device_jpeg.available(device) if candidates is None else candidates
    there = {name: x for name, x in found.items() if not isinstance(x, str)}
    missing = [f"{name}: {x}" for name, x in found.items() if isinstance(x, str)]
    if asked == "device" and not there:
        raise ExtraMissingError(
            f"jpeg=device: no decoder of JPEG works on {device}", "; ".join(missing), f"{device_jpeg.INSTALL}; jpeg=cpu"
        )
    if kept is not None:
        if kept == "cpu" and asked == "auto":
            return Choice("cpu", None, "")
        if kept in there:
            return Choice(kept, there[kept], f"pictures are decoded by {kept} on {device}, as before")
    if asked == "device":
        name = _agreed(next(iter(there)), there, missing)
        words = [f"pictures are decoded by {name} on {device}", _other(name, kept)]
        return Choice(name, there[name], "; ".join(w for w in words if w))
    rates = {"cpu": measure(None), **{name: measure(decode) for name, decode in there.items()}}
    best = max(there, key=lambda name: rates[name], default="cpu")
    name = _agreed(best if rates[best] > MARGIN * rates["cpu"] else "cpu", there, missing)
    told = ", ".join(f"{n} {r:.0f} clips/s" for n, r in rates.items())
    words = [f"pictures are decoded by {name}: measured {told}", *missing, _other(name, kept)]
    return Choice(name, there.get(name), "; ".join(w for w in words if w))


def _other(name: str, kept: str | None) -> str:
    if kept is None or kept == name:
        return ""
    return f"going on with {name} where {kept} decoded before: not equal to the bit to an uninterrupted run"


def _agreed(name: str, there: dict[str, Decode], missing: list[str]) -> str:
    """Rank 0's choice."""
    if distributed.world() > 1:
        box = [name]
        dist.broadcast_object_list(box)
        name = box[0]
    if name != "cpu" and name not in there:
        raise ExtraMissingError(f"rank 0 decodes by {name}, this process cannot", "; ".join(missing), "--set jpeg=cpu")
    return name
