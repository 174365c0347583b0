"""Runs that take a second: a store of a dozen videos, and networks of four channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.store import Store
from trainers.config import RunConfig, resolve
from trainers.run import Run

SETS = (
    "video_depth=10", "width=4", "hidden=8", "dim=8", "head_batch_norm=true", "small=true", "frames=4", "fps=8",
    "size=32", "seconds=0.5", "front_end=avid-linear129", "negatives=6", "batch=6", "draws=1", "epochs=3",
    "learning_rate=0.002", "schedule=cosine", "warmup_steps=2", "statistics_clips=16", "in_process=true", "threads=1",
    "log_every=1", "checkpoint_every=100", "precision=fp32",
)  # fmt: skip


def store_in(folder: Path, videos: int = 12, **spec: Any) -> Store:
    """`videos` of 2 s, half of class a; the last two are held out."""
    made = [
        Tiny(2.0 if i % 3 else 1.25, key=f"{i:03d}.mp4", label="ab"[i % 2], split="train" if i < videos - 2 else "test")
        for i in range(videos)
    ]
    return avstore.open(make_store(folder / "tiny.zarr", made, default_spec(**{"sample_rate": 24000, **spec})))


def config(*sets: str, name: str = "avid") -> RunConfig:
    mine = [s for s in SETS if name == "avid" or s.split("=")[0] not in ("epochs",)]
    extra = () if name == "avid" else ("positives=2", "within_negatives=0", "epochs=2", "refresh_epochs=1")
    return resolve(name, sets=[*mine, *extra, *sets])


def tensors(run: Run, which: str | int = "latest") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    from trainers.checkpoint import FILES, read_tensors

    return {f"{f}:{k}": x for f in FILES for k, x in read_tensors(run.checkpoint(which), f).items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return sorted(k for k in {*a, *b} if k not in a or k not in b or not torch.equal(a[k], b[k]))
