"""Embeddings: a trained run turns every second of every video into a vector per tower, written on the tape.

    embed(run, store)                     # embeddings/<run>/<tower>, float16 (S, D), NaN where there is none
    rows = embed_file(run, store, "clip.mp4")["video"]

The clip of second s is centred at s + 1/2: pictures of frames / fps seconds, sound of `seconds`, each moved back into
the video where it would stick out (`seconds.SecondView`); the centre crop; networks in eval mode, float32. A video
shorter than the clip loops its pictures, its sound is padded with zeros, as in training. Towers: 'video', 'audio' (unit
length), 'video-trunk', 'audio-trunk' (pooled features), and what else a method has ('joint', of rows with picture and
sound). Vectors that are not finite are refused.

The networks over the store are `embedder.py`'s, the arrays `embedding_arrays.py`'s: written shard by shard under a
dotted name beside the place, renamed when complete; repeating the command fills what is missing, also after a new
ingest. A file that was never ingested goes through the very same code: it is ingested into a store of one video, in a
temporary folder, with this store's spec.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from avstore.durable import canonical_json
from avstore.errors import NotFoundError, UsageError, did_you_mean
from avstore.lock import StoreLock
from avstore.spec import embedding_array
from trainers.embedder import BATCH, Embedder, Vectors
from trainers.embedding_arrays import Event, TowerArray, committed_shards, make_group, write_seconds
from trainers.fit import needs_of
from trainers.run import Run, build
from trainers.seconds import seconds_of_videos

if TYPE_CHECKING:
    from avstore.store import Store


@dataclass(frozen=True)
class Embedded:
    """What `embed` did. seconds: rows computed now; shards: written now; complete: every committed second is there."""

    name: str
    towers: list[str]
    step: int
    seconds: int
    shards: int
    complete: bool


def _silent(event: Event) -> None:
    """Tells nobody."""


def embed(
    run: Run,
    store: Store,
    checkpoint: str | int | Any = "latest",
    *,
    towers: Sequence[str] | None = None,
    name: str | None = None,
    every: int = 1,
    batch: int = BATCH,
    device: str = "auto",
    replace: bool = False,
    on_event: Callable[[Event], None] = _silent,
) -> Embedded:
    """Writes one row per second (each `every`-th) of all ok videos into `embeddings/<name>/<tower>` of the store.

    towers: default all that the method has. name: default that of the run's folder. replace: drop embeddings that
    another checkpoint made under this name; without it they are a ConflictError. Raises NotFoundError (no checkpoint),
    UsageError (unknown tower), ConflictError (the store cannot serve the run; an ingest is at work), AvstoreError
    where a vector is not finite.
    """
    if every < 1 or batch < 1:
        raise UsageError(f"every {every}, batch {batch}", "both are whole numbers from 1")
    chosen = run.checkpoint(checkpoint) if isinstance(checkpoint, str | int) else checkpoint
    _require_serves(run, store)
    embedder = Embedder(run.load(chosen.step), run, store.spec.sample_rate, device)
    sizes = embedder.sizes()
    wanted = list(sizes) if towers is None else list(towers)
    for tower in wanted:
        if tower not in sizes:
            raise UsageError(f"{run.config.name} has no tower {tower!r}", did_you_mean(tower, sizes))
    name = run.name if name is None else name
    if not name or name.startswith(".") or "/" in name:
        raise UsageError(f"embeddings cannot be called {name!r}", "the name is a folder in the store", "--name NAME")
    lineage = _lineage(run, chosen, store, every)
    with StoreLock(store.path) as lock:
        lock.shared()
        make_group(store.path / "embeddings" / name)
        arrays = [TowerArray(store, embedding_array(name, t, sizes[t]), lineage, replace) for t in wanted]
        todo = [s for s in committed_shards(store) if any(not a.has(s) for a in arrays)]
        seconds = write_seconds(embedder, store, arrays, todo, every, batch, on_event)
        for array in arrays:
            array.finish(store)
    return Embedded(name, wanted, chosen.step, seconds, len(todo), not store.pending_tasks)


def embed_videos(
    method: nn.Module, run: Run, store: Store, numbers: np.ndarray, *, batch: int = BATCH, device: str = "auto"
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """In memory: {tower: (vectors float32 (n, D), video numbers (n,), seconds (n,))} of every second of these videos
    that has the tower's modality. `method`: the run's module, with whatever weights."""
    _require_serves(run, store)
    embedder = Embedder(method, run, store.spec.sample_rate, device)
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    numbers = np.asarray(numbers, np.int64)
    rows, seconds = seconds_of_videos(store, numbers)
    for video, second, vectors in embedder.run(store, numbers, rows, seconds, batch):
        for tower, x in vectors.items():
            there = ~np.isnan(x).any(1)
            found.setdefault(tower, []).append((x[there], video[there], second[there]))
    out = {}
    for tower, parts in found.items():
        x, video, second = (np.concatenate(p) for p in zip(*parts, strict=True))
        if len(x):
            out[tower] = (x, video, second)
    return out


def embed_random(
    run: Run, store: Store, numbers: np.ndarray, *, seed: int = 0, batch: int = BATCH, device: str = "auto"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A control: {tower: (means float32 (m, D), video numbers (m,))} of the run's networks at random initialisation."""
    config = run.config.replace(seed=seed)
    method = build(config, run.snapshot, None).eval()
    return _means(embed_videos(method, run, store, numbers, batch=batch, device=device))


def embed_checkpoint(
    run: Run,
    store: Store,
    numbers: np.ndarray,
    which: str | int = "latest",
    *,
    batch: int = BATCH,
    device: str = "auto",
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """As `embed_random`, of a checkpoint; nothing is written. For curves over a training."""
    return _means(embed_videos(run.load(which), run, store, numbers, batch=batch, device=device))


def embed_file(
    run: Run, store: Store, path: str | os.PathLike[str], *, which: str | int = "latest", device: str = "auto"
) -> Vectors:
    """{tower: float32 (seconds, D)} of any media file; a modality that it lacks has no entry.

    By construction what `embed` would write, had the file been ingested: it is, with the store's spec, into a store in
    a temporary folder. Raises NotFoundError without the file, UsageError where it cannot be decoded.
    """
    import dataclasses

    from avstore.ingest import SPEC_FIELDS, ingest
    from avstore.store import open as open_store

    source = Path(path)
    if not source.is_file():
        raise NotFoundError(f"there is no file {path}", "a query is a media file", "give its path")
    spec = store.spec
    options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name in SPEC_FIELDS}
    options |= {"front_ends": (), "shard_seconds": 0}
    with tempfile.TemporaryDirectory(prefix="avstore-") as folder:
        summary = ingest(source, Path(folder) / "one", size=(spec.height, spec.width), workers=1, **options)
        if not summary.ok:
            reason = summary.failures[0] if summary.failures else (str(path), "no_streams", None)
            raise UsageError(f"{path} cannot be decoded: {reason[1]}", reason[2] or "", "ask with another file")
        with open_store(Path(folder) / "one") as one:
            found = embed_videos(run.load(which), run, one, one.numbers, device=device)
    return {tower: x for tower, (x, _, _) in found.items()}


def video_means(store: Store, run: str, tower: str, numbers: np.ndarray) -> np.ndarray:
    """float32 (n, D): for each video the mean of its L2-normalised rows, normalised again.

    NotFoundError where one of them has no row in embeddings/<run>/<tower>.
    """
    from avstore import index

    numbers = np.asarray(numbers, np.int64)
    means, who = index.video_means(store, index.read_rows(store, run, tower), numbers)
    place = {int(n): i for i, n in enumerate(who)}
    missing = [int(n) for n in numbers if int(n) not in place]
    if missing:
        raise NotFoundError(
            f"{len(missing)} videos have no {tower} embeddings of {run}, the first is {missing[0]}",
            f"{store.key(missing[0])} lacks that modality, or came after the last embed",
            f"avstore embed {run} {store.path}",
        )
    return means[[place[int(n)] for n in numbers]]


def _lineage(run: Run, checkpoint: Any, store: Store, every: int) -> dict[str, Any]:
    statistics = run.snapshot.statistics
    needs = needs_of(run.config)
    return {
        "run": run.name,
        "method": run.config.name,
        "step": checkpoint.step,
        "checkpoint": checkpoint.digest,
        "config": run.config.digest,
        "front_end": needs.front_end,
        "front_end_hash": None if statistics is None else statistics["hash"],
        "statistics": None if statistics is None else hashlib.sha256(canonical_json(statistics)).hexdigest()[:16],
        "clip": {"frames": needs.frames, "fps": needs.fps, "size": needs.size, "seconds": needs.seconds,
                 "at": "centre of each second"},
        "every": every,
        "store": store.fingerprint,
    }  # fmt: skip


def _require_serves(run: Run, store: Store) -> None:
    """ConflictError where the store cannot cut the clips that the run was trained on."""
    from trainers.fit import fit

    config = run.config
    asked = frozenset({"size", "fps"} & set(config.values()))
    if store.spec.picture:
        import dataclasses

        fit(dataclasses.replace(config, asked=asked), store, train=False)


def _means(
    found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from avstore.index import normalised

    out = {}
    for tower, (x, video, _) in found.items():
        unit = normalised(x)
        who, first = np.unique(video, return_inverse=True)
        total = np.zeros((len(who), unit.shape[1]))
        np.add.at(total, first, unit)
        out[tower] = (normalised(total), who)
    return out
