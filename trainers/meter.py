"""Where the time of a training goes: seconds for data, preparing and computing, on the lines of its metrics.

Summed here, averaged over ranks and over the steps since the last line; `metrics.py` writes the lines. These are the
host's clocks; what the device waits for a batch that was launched ahead is `prefetch.device_wait`, on the same lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers import distributed


@dataclass
class Meter:
    """Seconds since the last line: waiting for data, preparing it on the device, computing; and clips."""

    world: int
    data: float = 0.0
    prepare: float = 0.0
    compute: float = 0.0
    clips: int = 0
    steps: int = 0

    def line(self, values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The metrics of a step (means over ranks) with the means of the times since the last line."""
        names = [k for k, v in values.items() if isinstance(v, Tensor) or (isinstance(v, float) and k not in ("lr",))]
        stacked = torch.stack(
            [torch.as_tensor(values[k], dtype=torch.float64, device=device).reshape(()) for k in names]
        )
        means = (distributed.all_reduce_sum(stacked) / self.world).tolist() if names else []
        out: dict[str, Any] = {k: v for k, v in values.items() if k not in names}
        out |= dict(zip(names, means, strict=True))
        total = self.data + self.prepare + self.compute
        n = max(self.steps, 1)
        out |= {
            "data_wait_s": self.data / n,
            "prepare_s": self.prepare / n,
            "compute_s": self.compute / n,
            "clips_per_s": self.clips * self.world / total if total else 0.0,
        }
        self.data = self.prepare = self.compute = 0.0
        self.clips = self.steps = 0
        return out
