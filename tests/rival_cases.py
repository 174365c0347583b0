"""What the rivals' tests share: each method small enough for a second, and a batch as it wants it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from method_runs import views_batch

from trainers.batch import Batch
from trainers.methods import METHODS

NAMES = (
    "simclr", "moco", "byol", "simsiam", "barlow-twins", "iic", "l3", "avts", "xdc", "cm-acc", "supervised",
)  # fmt: skip
ROWS, CLASSES = 40, ("a", "b", "c")
NETS: dict[str, Any] = {"width": 4, "frames": 2, "size": 16, "batch": 6, "epochs": 4, "draws": 1}
OWN: dict[str, dict[str, Any]] = {
    "simclr": {"hidden": 16, "dim": 8},
    "moco": {"hidden": 16, "dim": 8, "key_momentum": 0.9},
    "byol": {"hidden": 16, "predictor_hidden": 8, "dim": 8},
    "simsiam": {"dim": 16, "predictor_hidden": 8},
    "barlow-twins": {"dim": 8},
    "iic": {"hidden": 16, "dim": 8, "negatives": 6, "blocks": 4},
    "l3": {"hidden": 16},
    "avts": {"hidden": 16, "dim": 8, "hard_share": 0.5},
    "xdc": {"clusters": 3, "round_epochs": 1, "whiten": 0, "feature_momentum": 0.0},
    "cm-acc": {"hidden": 16, "dim": 8, "candidates": 2, "key_momentum": 0.9},
    "supervised": {"hidden": 16, "dropout": 0.0},
}


def small(name: str, **changes: Any) -> Any:
    """The configuration of a test: AVID's kind of networks, four channels wide."""
    return replace(METHODS[name].load().presets["tiny"], **{**NETS, **OWN[name], **changes})


def make(name: str, rows: int = ROWS, **changes: Any) -> Any:
    """The method on `rows` videos, in train mode."""
    line = METHODS[name]
    more = (CLASSES,) if line.labels else ()
    return line.load().make(small(name, **changes), rows, *more).train()


def batch_for(name: str, rows: Any = (3, 1, 4, 15, 9, 2), **options: Any) -> Batch:
    """Clips of these rows, with labels where the method asks for them and two views where it compares them."""
    made = views_batch(rows, METHODS[name].views, **options)
    return replace(made, labels=made.row % len(CLASSES)) if METHODS[name].labels else made


def ready(name: str, method: Any) -> Any:
    """The method where its loss is that of training: XDC's first epoch, which only collects, is behind it."""
    if name == "xdc":
        method.start_epoch(0)
        with torch.no_grad():
            for first in range(0, ROWS, 8):
                method(batch_for(name, range(first, first + 8)))
                method.after_step()
        method.start_epoch(1)
    return method
