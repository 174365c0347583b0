"""The published variant of AVID's linear probe of video: its code leaves the frozen network in train mode.

    learn, asked = moved_features(method, run, store, numbers, part, clips=10, grids=PICTURE_GRIDS)

While the probe is trained, the network's batch normalisations use the statistics of each shuffled batch of 128 training
clips, and their running statistics move with them; the test videos are then seen in eval mode with the moved statistics
(methods.md 6.2). Which classes there are is not used, but the frozen network is no longer that of pre-training.
Test videos move nothing. Afterwards the network is as it was.

Ours: the training clips are the evenly spaced ones, seen in as many passes as it takes to move the statistics 50 times
(by then .5 % of the old ones are left), at most as many as the probe has epochs; it learns on the last pass' features.
"""

# legend: n videos, K clips of each, D values of a pooled map

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from benchmarks import blocks
from benchmarks.probing import Part

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

BATCH = 128  # [C] clips of a step of the probe
UPDATES = 50  # of the running statistics, at momentum .1


def passes_of(videos: int, clips: int, epochs: int) -> int:
    """How often the training clips are seen: 1 ... epochs."""
    return max(1, min(epochs, math.ceil(UPDATES / math.ceil(videos * clips / BATCH))))


def moved_features(
    method: nn.Module,
    run: Run,
    store: Store,
    numbers: np.ndarray,
    part: Part,
    *,
    clips: int,
    grids: Mapping[str, int],
    epochs: int,
    seed: int = 0,
    device: str = "auto",
    progress: blocks.Progress = blocks.quiet,
    **how: Any,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({block: float32 (n, K, D)} to train on, the same to test on) of one part; the rows of other videos are zero."""
    net = blocks.trunk(method, "v")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    training = [(m, m.training) for m in net.modules()]
    places = part.learned_on()[0]
    options: dict[str, Any] = {"clips": clips, "grids": grids, "device": device, "progress": progress, **how}
    total = len(places) * clips  # a last batch of one clip may have no statistics
    batch = next((b for b in range(BATCH, 1, -1) if total % b != 1), BATCH)
    try:
        for i in range(passes_of(len(places), clips, epochs)):
            learned = blocks.picture_blocks(
                method, run, store, numbers[places], batch=batch, moving=seed + i, **options
            )
        asked = blocks.picture_blocks(method, run, store, numbers[part.test], **options)
    finally:
        net.load_state_dict(before)
        for m, mode in training:
            m.training = mode
    return _spread(learned, places, len(numbers)), _spread(asked, part.test, len(numbers))


def _spread(found: Mapping[str, np.ndarray], places: np.ndarray, n: int) -> dict[str, np.ndarray]:
    out = {}
    for name, x in found.items():
        out[name] = np.zeros((n, *x.shape[1:]), np.float32)
        out[name][places] = x
    return out
