"""What is compared in a retrieval: one vector for each video and modality.

    run_features(store, "avid-cma")[""]                      # heads: embeddings in the store, mean of a video's seconds
    run_features(store, "avid-cma", clips=10)[" trunks"]     # of ten evenly spaced seconds
    Networks(run, store, numbers, ...).block("conv4x")       # ten evenly spaced clips of a block's map

Ours, declared (methods.md 6.3 leaves it open): centre crops; each clip to unit length, the mean over clips, unit length
again; cosine. Heads and trunks are of the embeddings' clips, one centred on each second; blocks are maps of conv2x ...
conv5x averaged over time and space, of `clips` evenly spaced clips. Theirs: `protocols.py`. Controls: `raw.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from avstore.durable import canonical_json
from avstore.errors import NotFoundError, UsageError, did_you_mean
from avstore.identity import identity
from avstore.index import embedded_runs, normalised, read_rows, seconds_of, video_means
from benchmarks.kept import Kept
from benchmarks.raw import BOTH, SIGHT, SOUND, Raw

if TYPE_CHECKING:
    from torch import nn

    from avstore.store import Store
    from trainers.run import Run

PAIRS = ("v-v", "a-a", "v-a", "a-v")
ACROSS = ("v-a", "a-v")
WITHIN = ("v-v", "a-a")
HEADS = {"v": "video", "a": "audio"}
TRUNKS = {"v": "video-trunk", "a": "audio-trunk"}
TOWERS = (("", HEADS), (" trunks", TRUNKS))
BLOCKS = ("conv2x", "conv3x", "conv4x", "conv5x")
CLIPS = 10  # of a video, for blocks
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Features:
    """Vectors by modality ('v', 'a') for the videos `numbers` by modality; `centre`: take the gallery's mean off; `by`:
    the distance that they are compared by."""

    vectors: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    centre: bool = False
    by: Literal["cosine", "euclidean"] = "cosine"

    def of(self, modality: str, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(vectors, numbers) of those of `wanted` that have the modality."""
        have = self.numbers[modality]
        order = np.argsort(have, kind="stable")
        at = np.searchsorted(have[order], wanted)
        found = (at < len(have)) & (
            have[order][np.minimum(at, max(0, len(have) - 1))] == wanted if len(have) else False
        )
        rows = order[at[found]]
        return self.vectors[modality][rows], wanted[found]


def spaced(seconds: np.ndarray, clips: int) -> np.ndarray:
    """bool: `clips` of a video's seconds, the first, the last and what lies evenly between; all where there are fewer;
    of one clip the middle."""
    n = len(seconds)
    chosen = np.zeros(n, np.bool_)
    if n:
        at = np.array([n // 2]) if clips == 1 else np.round(np.linspace(0, n - 1, min(clips, n))).astype(np.int64)
        chosen[np.argsort(seconds, kind="stable")[at]] = True
    return chosen


def means_of(
    vectors: np.ndarray, video: np.ndarray, second: np.ndarray, clips: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(means float32 (m, D), videos (m,)): `clips` seconds of each video (None: all) to unit length, their mean, unit
    length again."""
    if clips is not None:
        keep = np.zeros(len(video), np.bool_)
        for n in np.unique(video):
            mine = np.flatnonzero(video == n)
            keep[mine] = spaced(second[mine], clips)
        vectors, video = vectors[keep], video[keep]
    if not len(video):
        return np.zeros((0, vectors.shape[1]), np.float32), video
    who, place = np.unique(video, return_inverse=True)
    total = np.zeros((len(who), vectors.shape[1]))
    np.add.at(total, place, normalised(vectors))
    return normalised(total), who


def run_features(store: Store, run: str, clips: int | None = None) -> dict[str, Features]:
    """'' (heads) and ' trunks' from the embeddings in the store, of all of a video's seconds or of `clips` of them."""
    towers = embedded_runs(store)[run]

    def mean(tower: str) -> tuple[np.ndarray, np.ndarray]:
        rows = read_rows(store, run, tower)
        return video_means(store, rows) if clips is None else means_of(*seconds_of(store, rows), clips)

    out = {}
    for suffix, names in TOWERS:
        there = {m: t for m, t in names.items() if t in towers}
        if there:
            means = {m: mean(t) for m, t in there.items()}
            out[suffix] = Features({m: v for m, (v, _) in means.items()}, {m: n for m, (_, n) in means.items()})
    if not out:
        raise NotFoundError(
            f"run {run} has no video or audio embeddings in {store.path}",
            f"it has {', '.join(towers)}",
            f"avstore embed RUN {store.path}",
        )
    return out


class Networks:
    """A run's networks, of a checkpoint ("latest", a step) or at random initialisation ("random", by `seed`), shown the
    videos `numbers`. What is computed is kept (`kept.py`) under the digest of the weights."""

    def __init__(
        self,
        run: Run,
        store: Store,
        numbers: np.ndarray,
        which: str | int = "latest",
        *,
        seed: int = 0,
        device: str = "auto",
        kept: Kept | None = None,
    ) -> None:
        self.run, self.store, self.which, self.seed, self.device = run, store, which, seed, device
        numbers = np.asarray(numbers, np.int64)
        self.all = numbers
        self.numbers = {"v": numbers[store.has_picture[numbers]], "a": numbers[store.has_sound[numbers]]}
        self.kept = kept if kept is not None else Kept(None)
        self._method: nn.Module | None = None
        self._digest = ""

    @property
    def method(self) -> nn.Module:
        from benchmarks.blocks import with_weights
        from benchmarks.finetune import weights_digest

        if self._method is None:
            self._method = with_weights(self.run, self.which, self.seed)
            self._digest = weights_digest(self._method)
        return self._method

    def _key(self, what: str, modality: str, **more: Any) -> dict[str, Any]:
        from trainers.fit import needs_of

        _ = self.method
        statistics = canonical_json(self.run.snapshot.statistics or {})
        videos = self.all if modality == "va" else self.numbers[modality]
        return {
            "what": what, "modality": modality, "weights": self._digest,
            "media": identity(self.store, videos), "clip": repr(needs_of(self.run.config)),
            "statistics": hashlib.sha256(statistics).hexdigest()[:16], **more,
        }  # fmt: skip

    def towers(self, clips: int | None = None) -> dict[str, Features]:
        """As `run_features`, computed: nothing is read from the store's embeddings or written there."""
        from trainers.embed import embed_videos

        def compute() -> dict[str, np.ndarray]:
            out = {}
            for tower, x in embed_videos(self.method, self.run, self.store, self.all, device=self.device).items():
                out[tower], out[f"{tower}, videos"] = means_of(*x, clips)
            return out

        found = self.kept.arrays(self._key("towers", "va", clips=clips), compute)
        out = {}
        for suffix, names in TOWERS:
            there = {m: t for m, t in names.items() if t in found and len(found[t])}
            if there:
                out[suffix] = Features({m: found[t] for m, t in there.items()},
                                       {m: found[f"{t}, videos"] for m, t in there.items()})  # fmt: skip
        return out

    def block(
        self,
        block: str,
        clips: int = CLIPS,
        progress: Progress = lambda done, total: None,
        modalities: str = "va",
    ) -> Features:
        """A block's maps averaged over time and space, of sight and of sound as far as the method has networks of them.
        UsageError for another block or no clip, ConflictError for a method without networks of either."""
        from avstore.errors import ConflictError
        from benchmarks import blocks

        if block not in BLOCKS:
            raise UsageError(f"no block {block!r}", did_you_mean(block, BLOCKS), f"one of {', '.join(BLOCKS)}")
        if clips < 1:
            raise UsageError(f"{clips} clips", "at least one of each video")
        vectors, numbers = {}, {}
        for m, make in (("v", blocks.picture_blocks), ("a", blocks.sound_blocks)):
            if m not in modalities:
                continue
            try:
                blocks.trunk(self.method, m)  # type: ignore[arg-type]
            except ConflictError:
                continue
            if not len(self.numbers[m]):
                continue

            def compute(m: str = m, make: Any = make) -> dict[str, np.ndarray]:
                found = make(self.method, self.run, self.store, self.numbers[m], clips=clips, grids={block: 1},
                             how="avg", device=self.device, progress=progress)  # fmt: skip
                return {m: unit_mean(found[block])}

            vectors[m] = self.kept.arrays(self._key(f"block {block}", m, clips=clips), compute)[m]
            numbers[m] = self.numbers[m]
        if not vectors:
            raise ConflictError(
                f"{self.run.path} has no network of pictures or sound for {self.store.path}",
                "there are no maps to compare",
                "choose another run, or leave --block away",
            )
        return Features(vectors, numbers)

    def protocol(self, name: str, progress: Progress = lambda done, total: None) -> Features:
        """Vectors of sight under a published protocol (`protocols.py`)."""
        from benchmarks import protocols

        of = protocols.protocol(name)
        key = self._key(f"protocol {of}", "v", asked=repr(protocols.clip_of(of, self.run, self.store)))

        def compute() -> dict[str, np.ndarray]:
            return {"v": protocols.video_vectors(of, self.method, self.run, self.store, self.numbers["v"],
                                                 device=self.device, progress=progress)}  # fmt: skip

        made = self.kept.arrays(key, compute)
        return Features({"v": made["v"]}, {"v": self.numbers["v"]}, by=of.by)


def shape_of(run: Run) -> str:
    """What decides a random network and the clip that it is shown: runs that agree in it have the same control."""
    from benchmarks.blocks import with_weights
    from benchmarks.finetune import weights_digest
    from trainers.fit import needs_of

    needs = dataclasses.replace(needs_of(run.config), labels=False, max_offset=0.0, copies=1)
    return f"{weights_digest(with_weights(run, 'random', 0))} {needs}"


def unit_mean(x: np.ndarray) -> np.ndarray:
    """(n, K, D) clips -> float32 (n, D): mean of unit clips, unit length."""
    n, k, d = x.shape
    unit = normalised(x.reshape(n * k, d).astype(np.float32)).reshape(n, k, d)
    return np.ascontiguousarray(normalised(unit.mean(1)), np.float32)


def raw_as_features(raw: Raw) -> dict[str, tuple[Features, tuple[str, ...]]]:
    """Name -> (features, pairs) of the raw controls."""
    out: dict[str, tuple[Features, tuple[str, ...]]] = {}
    for names, modality in ((SIGHT, "v"), (SOUND, "a")):
        for name in names:
            if name in raw.features:
                f = Features({modality: raw.features[name]}, {modality: raw.numbers[name]}, centre=True)
                out[name] = (f, (f"{modality}-{modality}",))
    if f"{BOTH}:v" in raw.features:
        parts = {m: f"{BOTH}:{m}" for m in ("v", "a")}
        out[BOTH] = (
            Features(
                {m: raw.features[p] for m, p in parts.items()}, {m: raw.numbers[p] for m, p in parts.items()}, True
            ),
            ACROSS,
        )
    return out
