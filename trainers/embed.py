"""Embeddings: a trained run turns every second of every video into a vector per tower, written on the tape.

    embed(run, store)                     # embeddings/<run>/<tower>, float16 (S, D), NaN where there is none
    rows = embed_file(run, store, "clip.mp4")["video"]

The clip of second s is centred at s + 1/2: pictures of frames / fps seconds, sound of `seconds`, each moved back into
the video where it would stick out (`seconds.SecondView`); the centre crop; networks in eval mode, float32. A video
shorter than the clip loops its pictures, its sound is padded with zeros, as in training. Towers: 'video', 'audio' (unit
length), 'video-trunk', 'audio-trunk' (pooled features), and what else a method has ('joint', of rows with picture and
sound). Vectors that are not finite are refused.

Written shard by shard under a dotted name beside the place, renamed when complete; repeating the command fills what is
missing, also after a new ingest. A file that was never ingested goes through the very same code: it is ingested into a
store of one video, in a temporary folder, with this store's spec.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from avstore.codecs import with_crc
from avstore.durable import canonical_json, machine_errors, read_json, sync_folder, write_atomic
from avstore.errors import AvstoreError, ConflictError, NotFoundError, UsageError, did_you_mean
from avstore.lock import StoreLock
from avstore.records import record_path
from avstore.spec import ArraySpec, embedding_array
from trainers.data import Normaliser, open_loader
from trainers.fit import needs_of
from trainers.process import choose_device
from trainers.run import Run, build
from trainers.seconds import ListedOrder, SecondView

if TYPE_CHECKING:
    from avstore.store import Store

BATCH = 32
Vectors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Event:
    """Progress: seconds of the tape that are embedded, of how many."""

    done: int
    total: int


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
        _group(store.path / "embeddings" / name)
        arrays = [_Array(store, embedding_array(name, t, sizes[t]), lineage, replace) for t in wanted]
        todo = [s for s in _committed_shards(store) if any(not a.has(s) for a in arrays)]
        seconds = _write(embedder, store, arrays, todo, every, batch, on_event)
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


def seconds_of_videos(store: Store, numbers: np.ndarray, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(rows into `numbers`, seconds), int64 each: every begun second of each video, in order."""
    counts = np.array([-(-store.seconds(int(n)) // 1) for n in numbers], np.int64)
    rows = np.repeat(np.arange(len(numbers)), counts)
    seconds = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = seconds % every == 0
    return rows[keep], seconds[keep]


class Embedder:
    """A method in eval mode on its device, with what normalises its input.

    A method has the towers that its `embed` gives: of pictures, of sound, or of both together (a key that only a call
    with both brings, such as 'joint'). One whose `embed` takes `sound_share` is told what of a window is no padding.
    """

    def __init__(self, method: nn.Module, run: Run, sample_rate: int, device: str = "auto") -> None:
        self.device = choose_device(device)
        self.method: Any = method.float().eval().to(self.device)
        self.needs = needs_of(run.config)
        self.normaliser = Normaliser(self.needs, run.snapshot.statistics, sample_rate, self.device, torch.float32)
        self.sample_rate = sample_rate
        self.wants_share = "sound_share" in inspect.signature(method.embed).parameters  # type: ignore[arg-type]
        self._joint: frozenset[str] | None = None

    @torch.no_grad()
    def sizes(self) -> dict[str, int]:
        """Towers with the length of their vectors. UsageError where the method has none."""
        frames = torch.zeros((1, self.needs.frames, 64, 64, 3), dtype=torch.uint8, device=self.device)
        here, on = np.ones(1, bool), torch.ones(1, dtype=torch.bool, device=self.device)
        video = audio = None
        found: dict[str, torch.Tensor] = {}
        if self.needs.picture:
            video = self.normaliser.video(frames, np.array([[0, 0, 64, 64]]), here, on)
            found |= self._embed(video, None, None)
        if self.normaliser.mean is not None:
            wave = torch.zeros((1, int(self.needs.seconds * self.sample_rate)), dtype=torch.int16, device=self.device)
            audio = self.normaliser.audio(wave, here, on)
            found |= self._embed(None, audio, torch.ones(1, device=self.device))
        alone = frozenset(found)
        if video is not None and audio is not None:
            found |= self._embed(video, audio, torch.ones(1, device=self.device))
        if not found:
            raise UsageError("this method has no towers", "its `embed` gives nothing, for pictures or for sound")
        self._joint = frozenset(found) - alone
        return {tower: int(x.shape[1]) for tower, x in found.items()}

    @property
    def joint(self) -> frozenset[str]:
        """Towers that take picture and sound together."""
        if self._joint is None:
            self.sizes()
        assert self._joint is not None
        return self._joint

    def _embed(
        self, video: torch.Tensor | None, audio: torch.Tensor | None, share: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        extra = {"sound_share": share} if self.wants_share else {}
        found: dict[str, torch.Tensor] = self.method.embed(video=video, audio=audio, **extra)
        return found

    @torch.no_grad()
    def run(
        self, store: Store, numbers: np.ndarray, rows: np.ndarray, seconds: np.ndarray, batch: int = BATCH
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Vectors]]:
        """(video numbers (B,), seconds (B,), {tower: float32 (B, D), NaN without the modality}) of the pairs in order.

        AvstoreError, naming video and second, for a vector that is not finite.
        """
        if not len(rows):
            return
        needs = self.needs
        if needs.picture and not store.spec.picture:  # a store of sound alone: its pictures are none
            needs = needs.__class__(**{**needs.__dict__, "picture": False})
        joint = self.joint
        order = ListedOrder(len(numbers), rows, seconds, batch)
        loader = open_loader(store, numbers, needs, order, SecondView(store.spec.sample_rate), device=self.device)
        with loader:
            for raw in loader.steps(0, order.batches):
                on = raw.tensors(self.device)
                out: dict[str, torch.Tensor] = {}
                seen = raw.has_picture if needs.picture else np.zeros(len(raw), bool)
                heard = raw.has_sound if self.normaliser.mean is not None else np.zeros(len(raw), bool)
                for here, video, audio in ((seen, True, False), (heard, False, True), (seen & heard, True, True)):
                    if not here.any() or (video and audio and not joint):
                        continue  # blanks never enter a network
                    kept = torch.from_numpy(np.flatnonzero(here)).to(self.device)
                    found = self._embed(
                        self._picture(raw, on, here, kept) if video else None,
                        self._sound(on, here, kept) if audio else None,
                        on["valid_samples"][kept] / on["waveform"].shape[1] if audio and self.wants_share else None,
                    )
                    for tower, x in found.items():
                        if (video and audio) != (tower in joint):
                            continue
                        self._require_finite(store, tower, x, raw.video[here], raw.draw[here])
                        out[tower] = x.new_full((len(raw), x.shape[1]), torch.nan).index_copy_(0, kept, x)
                yield raw.video.copy(), raw.draw.copy(), {t: x.float().cpu().numpy() for t, x in out.items()}

    def _picture(self, raw: Any, on: dict[str, torch.Tensor], here: np.ndarray, kept: torch.Tensor) -> torch.Tensor:
        return self.normaliser.video(on["frames"][kept], raw.box[here], here[here], on["has_picture"][kept])

    def _sound(self, on: dict[str, torch.Tensor], here: np.ndarray, kept: torch.Tensor) -> torch.Tensor:
        return self.normaliser.audio(on["waveform"][kept], here[here], on["has_sound"][kept])

    def _require_finite(self, store: Store, tower: str, x: torch.Tensor, video: np.ndarray, second: np.ndarray) -> None:
        bad = ~torch.isfinite(x.to(torch.float16)).all(1)  # float16 is what the store keeps
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise AvstoreError(
                f"{tower} embedding of video {int(video[i])} ({store.key(int(video[i]))}), second {int(second[i])}: "
                "it is not finite",
                "the run diverged, or its features exceed float16: as scores they would rank perfectly",
                "embed an earlier --checkpoint, or train again with a lower learning rate",
            )


# ---- on the tape ------------------------------------------------------------------------------------------------


class _Array:
    """One tower's array: where its shards go until it is complete, and its metadata."""

    def __init__(self, store: Store, array: ArraySpec, lineage: dict[str, Any], replace: bool) -> None:
        self.array, self.lineage, self.shard_seconds = array, lineage, store.spec.shard_seconds
        self.final = store.path / array.path
        self.dotted = self.final.with_name(f".{self.final.name}")
        self.replaces = False
        if (self.final / "zarr.json").is_file():
            there = read_json(self.final / "zarr.json")["attributes"].get("avstore", {})
            if there == lineage:
                self.folder = self.final
                return
            if not replace:
                differing = sorted(k for k in {*there, *lineage} if there.get(k) != lineage.get(k))
                raise ConflictError(
                    f"{array.path} was made by another checkpoint",
                    "; ".join(f"{k} is {there.get(k)} there, {lineage.get(k)} now" for k in differing),
                    "embed with --replace to make it anew, or under another --name",
                )
            self.replaces = True
        self.folder = self.dotted
        file = self.dotted / "zarr.json"
        if file.is_file() and read_json(file)["attributes"].get("avstore") != lineage:
            with machine_errors(self.dotted):
                shutil.rmtree(self.dotted)  # what another checkpoint left half done
        with machine_errors(self.dotted):
            self.dotted.mkdir(parents=True, exist_ok=True)
        self._metadata(store)

    def _metadata(self, store: Store) -> None:
        data = canonical_json(self.array.metadata(self.shard_seconds, store.tape_seconds, {"avstore": self.lineage}))
        file = self.folder / "zarr.json"
        if not file.is_file() or file.read_bytes() != data:
            write_atomic(file, data)

    def _shard(self, shard: int) -> Path:
        return self.folder / self.array.key(shard).rsplit("/", 1)[1]

    def has(self, shard: int) -> bool:
        return self._shard(shard).is_file()

    def write(self, shard: int, rows: np.ndarray) -> None:
        """float32 (shard_seconds, D) as one chunk."""
        write_atomic(self._shard(shard), with_crc(rows.astype("<f2").tobytes()))

    def finish(self, store: Store) -> None:
        """Metadata for the tape as long as it is now; the dotted folder takes its place."""
        self._metadata(store)
        if self.folder == self.final:
            return
        with machine_errors(self.final):
            old = self.final.with_name(f".{self.final.name}.old.tmp.{os.getpid()}")
            if self.replaces:
                os.rename(self.final, old)
            try:
                os.rename(self.dotted, self.final)
            except OSError as e:
                if self.final.exists():
                    raise ConflictError(
                        f"{self.array.path} has come to be meanwhile",
                        "another embed of the same run has finished",
                        "repeat the command: it has nothing left to do",
                    ) from e
                raise
            sync_folder(self.final.parent)
            shutil.rmtree(old, ignore_errors=True)


def _write(
    embedder: Embedder,
    store: Store,
    arrays: list[_Array],
    todo: list[int],
    every: int,
    batch: int,
    on_event: Callable[[Event], None],
) -> int:
    """Embeds the seconds of these shards, in the order of the tape; each shard is written when its last is there."""
    per = store.spec.shard_seconds
    numbers = np.flatnonzero(store.ok)
    rows, seconds = seconds_of_videos(store, numbers, every)
    tape = store.places[numbers][rows] + seconds
    keep = np.isin(tape // per, todo)
    order = np.argsort(tape[keep], kind="stable")
    rows, seconds, tape = rows[keep][order], seconds[keep][order], tape[keep][order]
    last = {int(s): int(i) for i, s in enumerate(tape // per)}  # shard -> place of its last second
    open_shards: dict[int, Vectors] = {}
    done = 0
    on_event(Event(0, len(tape)))

    def write(shard: int) -> None:
        vectors = open_shards.pop(shard, {})
        for array in arrays:
            if not array.has(shard):
                tower, size = array.final.name, array.array.row[0]
                array.write(shard, vectors.get(tower, np.full((per, size), np.nan, np.float32)))

    waiting = [s for s in todo if s not in last]  # nothing but holes: there, and done
    for shard in waiting:
        write(shard)
    for _, _, vectors in embedder.run(store, numbers, rows, seconds, batch):
        here = tape[done : done + batch]
        for shard in np.unique(here // per).tolist():
            inside = here // per == shard
            for array in arrays:
                tower, size = array.final.name, array.array.row[0]
                kept = open_shards.setdefault(shard, {})
                full = kept.setdefault(tower, np.full((per, size), np.nan, np.float32))
                if tower in vectors:
                    full[here[inside] - shard * per] = vectors[tower][inside]
            if last[shard] < done + len(here):
                write(shard)
        done += len(here)
        on_event(Event(done, len(tape)))
    return done


def _committed_shards(store: Store) -> list[int]:
    """Shards whose task has a record: what lies in them will not change."""
    out: list[int] = []
    for plan in store.plans:
        for task in plan.tasks:
            if record_path(store.path, task.number).is_file() and all(
                store.facts["status"][v] != "pending" for v in task.videos
            ):
                out += range(task.shard, task.shard + task.shards)
    return sorted(out)


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


def _group(folder: Path) -> None:
    data = canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {}})
    for path in (folder.parent, folder):
        with machine_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / "zarr.json").is_file():
            write_atomic(path / "zarr.json", data)


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
