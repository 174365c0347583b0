"""Published protocols of video retrieval, which differ from ours, and the figures printed under them.

    vectors = video_vectors(PROTOCOLS["VCOP"], method, run, store, numbers)       # (n, D), ranked by its `by`

Read in their code, in our words (methods.md 6.3); both on UCF101 or HMDB51, split 1, ten evenly spaced clips a video:

SeLaVi  32 frames at 30 fps, 112 pixels; the last map, maximum over cubes of 2 x 2 x 2, flattened; each clip to unit
        length, mean over clips, not normalised again; Euclidean distance
VCOP    16 consecutive frames, 112 pixels; the last map, maximum over squares of 2 x 2, each step of time kept,
        flattened; mean over clips as they are; cosine (also IIC, TCGL, PRP)

Left out on purpose: SeLaVi's random crops, jitter and flips of both sides (ours are centre crops), and the last
incomplete batch that VCOP's loader drops. A tape of fewer frames a second than asked, or smaller frames, gives what it
has: `what_differs` says so. Not here: ranks, and our own protocol (`vectors.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError, did_you_mean
from avstore.index import normalised
from benchmarks import blocks
from trainers.encoders import BLOCKS, Encoder
from trainers.fit import largest_size, needs_of
from trainers.needs import Needs
from trainers.run import Run

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.config import RunConfig


@dataclass(frozen=True)
class Protocol:
    """cell: (time, height, width) over which the last map's maximum is taken; unit: clips to unit length before the
    mean; by: the distance of video vectors."""

    name: str
    frames: int
    fps: int | Literal["native"]
    cell: tuple[int, int, int]
    unit: bool
    by: Literal["cosine", "euclidean"]
    size: int = 112
    clips: int = 10


PROTOCOLS = {
    "SeLaVi": Protocol("SeLaVi", 32, 30, (2, 2, 2), True, "euclidean"),
    "VCOP": Protocol("VCOP", 16, "native", (1, 2, 2), False, "cosine"),
}

# R@1, 5, 10, 20, 50 of class-level v-v, split 1, as their papers and repositories print them (methods.md 5.7)
_ROWS: dict[str, tuple[tuple[str, tuple[float, ...]], ...]] = {
    "UCF101": (
        ("R3D, random init", (9.9, 18.9, 26.0, 35.5, 51.9)),
        ("Jigsaw", (19.7, 28.5, 33.5, 40.0, 49.4)),
        ("OPN", (19.9, 28.7, 34.0, 40.6, 51.6)),
        ("VCOP", (14.1, 30.3, 40.4, 51.1, 66.5)),
        ("VCP", (18.6, 33.6, 42.5, 53.5, 68.1)),
        ("PRP", (22.8, 38.5, 46.7, 55.2, 69.1)),
        ("CMC", (26.4, 37.7, 45.1, 53.2, 66.3)),
        ("IIC, repeat and residual", (36.5, 54.1, 62.9, 72.4, 83.4)),
        ("IIC, repeat and flow", (41.8, 60.4, 69.5, 78.4, 87.7)),
    ),
    "HMDB51": (("IIC, repeat", (15.5, 34.4, 48.9, 63.8, 83.8)),),
}
# R@1, 5, 20 quoted from memory in methods.md, not checked against a paper: the label says so
_UNCHECKED: dict[str, tuple[tuple[str, tuple[float, ...]], ...]] = {
    "UCF101": (("SeLaVi", (52.0, 68.6, 84.5)), ("GDT", (57.4, 73.4, 88.1)), ("CrissCross", (63.8, 78.7, 89.9))),
    "HMDB51": (("SeLaVi", (24.8, 47.6, 75.5)), ("GDT", (25.4, 51.4, 75.0)), ("CrissCross", (26.4, 50.5, 77.7))),
}
PUBLISHED = tuple(_ROWS)


def protocol(name: str) -> Protocol:
    """By its name. UsageError with the closest one for another."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol {name!r}", did_you_mean(name, PROTOCOLS), f"one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def published_rows(name: str) -> list[dict[str, Any]]:
    """The published figures on a set, labelled, as rows of the table. UsageError for another set."""
    if name not in PUBLISHED:
        raise UsageError(
            f"no published figures of {name!r}", did_you_mean(name, PUBLISHED), f"--published {PUBLISHED[0]}"
        )
    out = []
    for rows, ks, told in ((_ROWS, (1, 5, 10, 20, 50), "published"), (_UNCHECKED, (1, 5, 20), "published, unchecked")):
        for method, values in rows[name]:
            recall = {f"R@{k}": round(v / 100, 4) for k, v in zip(ks, values, strict=True)}
            out.append({"level": "class", "pair": "v-v", "features": f"{told}: {method}", **recall})
    return out


def clip_of(of: Protocol, run: Run, store: Store) -> Needs:
    """The clip that the protocol asks for, as far as the store has it. ConflictError for a run without pictures."""
    if not needs_of(run.config).picture or not store.spec.picture:
        raise ConflictError(f"{run.path} or {store.path} has no pictures", f"{of.name}'s protocol is of sight")
    fps: int | Literal["native"] = of.fps if of.fps == "native" else min(of.fps, store.spec.fps)
    size = min(of.size, largest_size(store.spec.height))
    return Needs(frames=of.frames, fps=fps, size=size, seconds=0.0, front_end=None, picture=True, sound=False)


def what_differs(of: Protocol, store: Store) -> str:
    """A line for the table: how the protocol is followed on this store."""
    size, rate = min(of.size, largest_size(store.spec.height)), store.spec.fps
    told = [f"{of.frames} frames" + (" in a row" if of.fps == "native" else f" at {min(of.fps, rate)} fps"),
            f"{size} pixels", f"{of.clips} clips", f"last map, maximum over {' x '.join(map(str, of.cell))}",
            "clips to unit length, mean" if of.unit else "mean of clips", of.by]  # fmt: skip
    less = []
    if of.fps != "native" and rate < of.fps:
        less.append(f"theirs {of.fps} fps: the tape has {rate}")
    if of.fps == "native":
        less.append(f"rows of a {rate}-fps tape: all of a source's frames only up to its rate")
    if size < of.size:
        less.append(f"theirs {of.size} pixels: the store's frames are {store.spec.height} high")
    return f"as {of.name}: {', '.join(told)}{'; approximate: ' if less else ''}{'; '.join(less)}"


class _Cells(Encoder):
    """An encoder whose last map is the maximum over cells of the wrapped one's, flattened to (B, D, 1, 1, 1), so that
    `blocks.picture_blocks` carries it unchanged. A side shorter than the cell is one cell."""

    def __init__(self, net: Encoder, cell: tuple[int, int, int]) -> None:
        super().__init__()
        self.net, self.cell, self.dim, self.pool = net, cell, net.dim, net.pool

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        return {BLOCKS[-1]: cells(self.net.forward_blocks(x)[BLOCKS[-1]], self.cell)[:, :, None, None, None]}


class _Seen(nn.Module):
    def __init__(self, video: Encoder) -> None:
        super().__init__()
        self.video = video


@dataclass(frozen=True)
class _Asks:
    """In the place of a method's settings: asks for this clip."""

    clip: Needs

    def needs(self) -> Needs:
        return self.clip


@dataclass(frozen=True)
class _Shown:
    """In the place of a run, for `blocks`: its configuration asks for the protocol's clip."""

    config: RunConfig
    snapshot: Any


def cells(maps: Tensor, cell: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) -> (B, C * cells): the maximum over cells side by side, what is left at an end dropped."""
    size = tuple(min(k, n) for k, n in zip(cell, maps.shape[2:], strict=True))
    return F.max_pool3d(maps, size, stride=size).flatten(1)


def over_clips(x: np.ndarray, unit: bool) -> np.ndarray:
    """(n, K, D) -> float32 (n, D): the mean over clips, each to unit length before it or as it is."""
    n, k, d = x.shape
    return (normalised(x.reshape(n * k, d)).reshape(n, k, d) if unit else x).mean(1).astype(np.float32)


def video_vectors(
    of: Protocol,
    method: nn.Module,
    run: Run,
    store: Store,
    numbers: np.ndarray,
    *,
    device: str = "auto",
    progress: blocks.Progress = blocks.quiet,
) -> np.ndarray:
    """float32 (n, D) of videos that have pictures, `method`: the run's module with whatever weights."""
    asked: Any = _Shown(dataclasses.replace(run.config, method=_Asks(clip_of(of, run, store))), run.snapshot)
    seen = _Seen(_Cells(blocks.trunk(method, "v"), of.cell))
    grids: Mapping[str, int] = {BLOCKS[-1]: 1}
    found = blocks.picture_blocks(seen, asked, store, numbers, clips=of.clips, grids=grids, device=device,
                                  batch=4, progress=progress)  # fmt: skip
    return over_clips(found[BLOCKS[-1]], of.unit)
