"""`avstore bench knn`: what the nearest neighbours of frozen features say about the class.

Pooled features of each clip at unit length, averaged over a video's clips and brought to unit length again; the k
nearest training videos by cosine vote with weight exp(cosine / temperature). Nothing is trained, so nothing can be
tuned on the test part but k, and every k asked for is printed. Searched by FAISS, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np

from avstore.errors import UsageError, did_you_mean
from avstore.index import normalised
from benchmarks import blocks, probing
from benchmarks.probing import Classifier, Outcome
from benchmarks.table import Table

if TYPE_CHECKING:
    from torch import nn

    from avstore.store import Store
    from trainers.run import Run

KS = (1, 5, 20)
TEMPERATURE = 0.07  # of the votes, as in the instance-discrimination literature
Progress = Callable[[str, int, int], None]


def neighbours(k: int, temperature: float = TEMPERATURE) -> Classifier:
    """The classifier of `probing.probe`: weighted vote of the k nearest training videos, or of all."""
    if k < 1 or not temperature > 0:
        raise UsageError(f"k = {k}, temperature {temperature}", "at least 1 and above 0")

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        gallery, queries = video_vectors(train), video_vectors(test)
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        score, place = index.search(queries, min(k, len(gallery)))
        votes = np.zeros((len(queries), int(labels.max()) + 1))
        weight = np.exp((score.astype(np.float64) - 1) / temperature)
        np.add.at(votes, (np.arange(len(queries))[:, None], labels[place]), weight)
        return votes[:, None], ""

    return classify


def video_vectors(x: np.ndarray) -> np.ndarray:
    """(n, K, D) clips -> float32 (n, D): mean of unit clips, unit length."""
    n, k, d = x.shape
    unit = normalised(x.reshape(n * k, d).astype(np.float32)).reshape(n, k, d)
    return np.ascontiguousarray(normalised(unit.mean(1)), np.float32)


def bench(
    store: Store,
    runs: Sequence[Run],
    *,
    modality: Literal["a", "v"] = "v",
    ks: Sequence[int] = KS,
    clips: int = 10,
    seeds: int = 1,
    checkpoint: str | int = "latest",
    controls: bool = True,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    **choice: Any,
) -> Table:
    """The table of `bench knn`: a row for each method and k, beside random networks, raw features, commonest class."""
    if modality not in ("a", "v"):
        raise UsageError(f"no modality {modality!r}", did_you_mean(modality, ("a", "v")))
    if not ks or clips < 1 or seeds < 0:
        raise UsageError(f"k {list(ks)}, {clips} clips, {seeds} seeds", "at least one k, one clip")
    probed = probing.choose(store, modality=modality, **choice)
    make = blocks.sound_blocks if modality == "a" else blocks.picture_blocks
    found: dict[tuple[str, int], list[list[Outcome]]] = {}

    def vote(name: str, x: np.ndarray) -> None:
        for k in ks:
            found.setdefault((name, k), []).append(probing.probe(x, probed, neighbours(k)))

    def add(name: str, method: nn.Module, run: Run) -> None:
        def say(done: int, total: int) -> None:
            progress(name, done, total)

        x = make(method, run, store, probed.numbers, clips=clips, grids={"conv5x": 1}, how="avg", device=device,
                 progress=say)  # fmt: skip
        vote(name, x["conv5x"])

    for run in runs:
        add(run.config.name, blocks.with_weights(run, checkpoint), run)
    for seed in range(seeds):
        add("random weights", blocks.with_weights(runs[0], "random", seed), runs[0])
    if controls:
        name = "raw spectrogram" if modality == "a" else "raw pixels and their change"
        raw = (blocks.raw_sound if modality == "a" else blocks.raw_pictures)(store, probed.numbers, clips=clips)
        vote(name, raw - raw.mean((0, 1)))
    rows = [probing.row(name, f"k = {k}", outcomes) for (name, k), outcomes in found.items()]
    rows.append(probing.row("commonest class", "", [probing.chance(probed)]))
    return probing.table(
        f"nearest neighbours of {'sound' if modality == 'a' else 'pictures'}, {store.path}",
        rows,
        probed,
        (f"conv5x pooled by mean, {clips} clips of a video; weights exp(cosine / {TEMPERATURE:g})",),
        [run.config.name for run in runs],
    )
