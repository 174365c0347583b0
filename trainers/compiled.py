"""Networks compiled where they lie: `compile=compile` (torch.compile), `compile=graphs` (its kernels in CUDA graphs).

    names = compile_networks(method, "compile", device)

What is compiled is each network's `forward_blocks`: convolutions, norms and sums, where the time is. All around it
(heads, bank, losses, `after_step`) stays plain Python, so that every method works as it does without, and checkpoints
know nothing of it. Numbers differ in the last bits, so `compile` belongs to what a run is; a resumed run compiles
again. A short last batch compiles once more, for its own shape.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any, Literal

import torch
from torch import nn

from avstore.errors import ExtraMissingError, UsageError
from trainers.encoders import Encoder

How = Literal["off", "compile", "graphs"]


def compile_networks(
    method: nn.Module, how: How, device: torch.device, processes: int = 1, parts: int = 1
) -> list[str]:
    """Compiles every network of `method` in place; their names, [] where `how` is off or there is none. parts: of a
    step, between which gradients are kept.

    UsageError for graphs on a CPU, in several processes or in several parts, ExtraMissingError where this machine lacks
    the compiler that torch.compile calls. The compiling itself happens at the first batch.
    """
    if how == "off":
        return []
    if how == "graphs" and device.type != "cuda":
        raise UsageError(
            f"compile=graphs on {device}", "CUDA graphs are a CUDA device's", "--set compile=compile, or off"
        )
    if how == "graphs" and processes > 1:
        raise UsageError(
            f"compile=graphs in {processes} processes",
            "a graph cannot wait for another process' batch statistics and gradients",
            "--set compile=compile, or one process",
        )
    if how == "graphs" and parts > 1:
        # torch takes a graph's own memory as the gradient, and the next replay writes over it: wrong sums, or an error
        # (pytorch/pytorch issues 169545 and 96693)
        raise UsageError(
            f"compile=graphs with accumulate={parts}",
            "gradients kept from one part of a batch to the next lie in memory that the next part's graph writes over",
            "--set accumulate=1, or compile=compile",
        )
    missing = why_not(device)
    if missing is not None:
        raise ExtraMissingError(f"compile={how} does not work here", missing, "--set compile=off")
    mode = "reduce-overhead" if how == "graphs" else None
    names = []
    for name, net in method.named_modules():
        if isinstance(net, Encoder):
            made: Any = torch.compile(net.forward_blocks, mode=mode, dynamic=False)
            net.forward_blocks = made  # type: ignore[method-assign]
            names.append(name)
    return names


def begin_part(how: How) -> None:
    """Before each forward pass: what graphs gave out in the pass before may now be written over."""
    if how == "graphs":
        torch.compiler.cudagraph_mark_step_begin()


def why_not(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine to make kernels for `device`; None where it has all."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (it comes with torch for CUDA on Linux)"
        return None
    asked = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([asked] if asked else ["g++", "clang++"])):
        return f"no C++ compiler ({asked or 'g++'}) is on the PATH"
    return None
