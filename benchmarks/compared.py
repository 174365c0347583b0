"""Which features of a run are compared in a retrieval, in turn, and those of random networks of the same shape.

    for step, suffix, features in of_run(store, "avid", path, numbers, shown=("heads", "conv5x"), protocols=("VCOP",)):

`shown`: heads and trunks (embeddings in the store, or of a checkpoint), blocks conv2x ... conv5x; `protocols`: those of
`protocols.py`. The suffix goes behind the run's name in the table. Not here: how a vector is made (`vectors.py`), who
asks (`sides.py`), ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore.errors import AvstoreError, UsageError, did_you_mean
from benchmarks.kept import Kept
from benchmarks.rankings import LEVELS, Rankings
from benchmarks.sides import Sides
from benchmarks.vectors import BLOCKS, CLIPS, PAIRS, WITHIN, Features, Networks, run_features, shape_of

if TYPE_CHECKING:
    from avstore.store import Store

SHOWN = ("heads", "trunks", *BLOCKS)
DEFAULT = ("heads", "trunks")
SUFFIXES = {"heads": "", "trunks": " trunks"}

Progress = Callable[[str, int, int], None]


def require(
    levels: Sequence[str], shown: Sequence[str], protocols: Sequence[str], seeds: int, clips: int | None
) -> None:
    """UsageError for a level, block or protocol that is not there, for numbers that make no table."""
    for level in levels:
        if level not in LEVELS:
            raise UsageError(f"no level {level!r}", f"there is: {', '.join(LEVELS)}")
    if seeds < 0:
        raise UsageError(f"{seeds} seeds", "0 or more")
    if clips is not None and clips < 1:
        raise UsageError(f"{clips} clips", "at least one of each video")
    for block in shown:
        if block not in SHOWN:
            raise UsageError(f"no block {block!r}", did_you_mean(block, SHOWN), f"one of {', '.join(SHOWN)}")
    if not shown and not protocols:
        raise UsageError("nothing to compare", "no block and no protocol is named", f"one of {', '.join(SHOWN)}")
    if protocols:
        from benchmarks.protocols import protocol

        for name in protocols:
            protocol(name)


def scope(suffix: str, levels: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """(pairs, levels) that features of this suffix are ranked for: published protocols are of sight and classes, heads
    alone share a space across modalities."""
    if suffix.startswith(" as "):
        return ("v-v",), ("class",)
    return (WITHIN if suffix else PAIRS), levels


def of_run(
    store: Store,
    run: str,
    path: Path,
    everyone: np.ndarray,
    shown: Sequence[str],
    clips: int | None,
    protocols: Sequence[str],
    checkpoints: Sequence[str | int],
    kept: Kept,
    device: str,
    progress: Progress,
) -> Iterator[tuple[tuple[int, float] | None, str, Features]]:
    """((step, epoch) of a checkpoint or None, suffix of the row's name, features)."""
    towers = [s for s in SUFFIXES if s in shown]
    if not checkpoints and towers:
        found = run_features(store, run, clips)
        yield from ((None, SUFFIXES[s], found[SUFFIXES[s]]) for s in towers if SUFFIXES[s] in found)
    if not checkpoints and len(towers) == len(shown) and not protocols:
        return
    from benchmarks.curve import place_of
    from trainers.run import Run

    opened = Run(path)
    for i, which in enumerate(checkpoints or ("latest",)):
        step = place_of(opened, which) if checkpoints else None
        networks = Networks(opened, store, everyone, which, device=device, kept=kept)
        progress(f"{run}{'' if step is None else f' step {step[0]}'}", i, len(checkpoints) or 1)
        for suffix, features in computed(networks, shown if checkpoints else [s for s in shown if s in BLOCKS], clips,
                                          protocols, progress):  # fmt: skip
            yield step, suffix, features


def computed(
    networks: Networks, shown: Sequence[str], clips: int | None, protocols: Sequence[str], progress: Progress
) -> Iterator[tuple[str, Features]]:
    def say(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total)

    towers = [s for s in SUFFIXES if s in shown]
    if towers:
        found = networks.towers(clips)
        yield from ((SUFFIXES[s], found[SUFFIXES[s]]) for s in towers if SUFFIXES[s] in found)
    for block in (b for b in BLOCKS if b in shown):
        yield f" {block}", networks.block(block, clips or CLIPS, say(block))
    for name in protocols:
        yield f" as {name}", networks.protocol(name, say(f"as {name}"))


def declared(
    store: Store, shown: Sequence[str], clips: int | None, protocols: Sequence[str], published: str | None
) -> list[str]:
    """How what is compared was made, a line for each kind."""
    out = []
    if clips is not None and set(shown) & set(SUFFIXES):
        out.append(f"heads and trunks: {clips} evenly spaced seconds of a video's embeddings, all where it has fewer")
    if set(shown) & set(BLOCKS):
        out.append(f"blocks: maps averaged over time and space, {clips or CLIPS} evenly spaced clips of a video, each "
                   "to unit length, mean, unit length; sound tiled over its end")  # fmt: skip
    if protocols:
        from benchmarks.protocols import protocol, what_differs

        out += [what_differs(protocol(name), store) for name in protocols]
    if published is not None:
        out.append(f"published: theirs, {published} split 1 in full, their pre-training; not measured here. unchecked: "
                   "as remembered in the notes that this project began with")  # fmt: skip
    return out


def random_encoders(
    results: Rankings,
    store: Store,
    paths: dict[str, Path],
    everyone: np.ndarray,
    asked: list[Sides],
    labels: dict[int, str],
    levels: Sequence[str],
    seeds: int,
    ks: Sequence[int],
    progress: Progress,
    notes: list[str],
    *,
    shown: Sequence[str] = DEFAULT,
    clips: int | None = None,
    protocols: Sequence[str] = (),
    kept: Kept | None = None,
    device: str = "auto",
) -> None:
    """Encoders of the runs' shape with random weights, `seeds` of them for each different kind of network and clip:
    equal ones twice would look like a spread of 0."""
    if not seeds:
        return
    from trainers.run import Run

    done: set[str] = set()
    for run, path in paths.items():
        try:
            opened = Run(path)
            shape = shape_of(opened)
        except AvstoreError:
            notes.append(f"no random-weight control for {run}: its folder is not there")
            continue
        if shape in done:
            continue
        done.add(shape)
        for seed in range(seeds):
            progress(f"random weights, seed {seed}", seed, seeds)
            networks = Networks(opened, store, everyone, "random", seed=seed, device=device, kept=kept)
            for suffix, features in computed(networks, shown, clips, protocols, progress):
                pairs, its = scope(suffix, levels)
                for sides in asked:
                    results.score(f"random weights{suffix}", features, sides, labels, its, pairs, ks)
