"""`avstore bench knn`: what the nearest neighbours of frozen features say about the class.

Pooled features of each clip at unit length, averaged over a video's clips and brought to unit length again; the k
nearest training videos by cosine vote with weight exp(cosine / temperature). Nothing is trained, so nothing can be
tuned on the test part but k, and every k asked for is printed. Raw features lose the training clips' mean first.
Searched by FAISS, exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np

from avstore.errors import UsageError, did_you_mean
from benchmarks import blocks, probing, unseen
from benchmarks.kept import Kept
from benchmarks.probing import Classifier, Outcome, Part
from benchmarks.table import Table
from benchmarks.vectors import Networks, shape_of
from benchmarks.vectors import unit_mean as video_vectors

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

KS = (1, 5, 20)
TEMPERATURE = 0.07  # of the votes, as in the instance-discrimination literature
Progress = Callable[[str, int, int], None]


def neighbours(k: int, temperature: float = TEMPERATURE, centred: bool = False) -> Classifier:
    """The classifier of `probing.probe`: weighted vote of the k nearest training videos, or of all. centred: the
    training clips' mean is taken off all features first, as pixels want it."""
    if k < 1 or not temperature > 0:
        raise UsageError(f"k = {k}, temperature {temperature}", "at least 1 and above 0", "--k 5")

    def classify(
        train: np.ndarray, labels: np.ndarray, test: np.ndarray, inner: np.ndarray | None
    ) -> tuple[np.ndarray, str]:
        centre = train.mean((0, 1)) if centred else np.zeros((), np.float32)
        gallery, queries = video_vectors(train - centre), video_vectors(test - centre)
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        score, place = index.search(queries, min(k, len(gallery)))
        votes = np.zeros((len(queries), int(labels.max()) + 1))
        weight = np.exp((score.astype(np.float64) - 1) / temperature)
        np.add.at(votes, (np.arange(len(queries))[:, None], labels[place]), weight)
        return votes[:, None], ""

    return classify


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
    work: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    **choice: Any,
) -> Table:
    """The table of `bench knn`: a row for each method and k, beside random networks, raw features, commonest class.
    work: a folder in which features are kept: what is there is not computed again."""
    if modality not in ("a", "v"):
        raise UsageError(f"no modality {modality!r}", did_you_mean(modality, ("a", "v")), "--modality v")
    if not ks or clips < 1 or seeds < 0:
        raise UsageError(f"k {list(ks)}, {clips} clips, {seeds} seeds", "at least one k, one clip", "--k 5 --clips 10")
    for k in ks:
        neighbours(k)  # refuses one below 1 before anything is computed
    names = probing.names(runs)
    probed, asked, notes = unseen.plan(store, runs, names, probing.choose(store, modality=modality, **choice))
    found: dict[tuple[str, int], list[list[Outcome]]] = {}
    kept = Kept(work)

    def vote(name: str, x: np.ndarray, parts: tuple[Part, ...], centred: bool = False) -> None:
        mine = dataclasses.replace(probed, parts=parts)
        for k in ks:
            classifier = neighbours(k, centred=centred)
            found.setdefault((name, k), []).append(probing.probe(x, mine, classifier))

    def add(name: str, run: Run, which: str | int, parts: tuple[Part, ...], seed: int = 0) -> None:
        networks = Networks(run, store, probed.numbers, which, seed=seed, device=device, kept=kept)
        blocks.trunk(networks.method, modality)  # its own words where there is none

        def say(done: int, total: int) -> None:
            progress(name, done, total)

        x = networks.block("conv5x", clips, say, modality)
        vote(name, x.vectors[modality][:, None], parts)

    for run, name, parts in zip(runs, names, asked, strict=True):
        add(name, run, checkpoint, parts)
    shapes: dict[str, Run] = {}
    for run in runs if seeds else ():
        shapes.setdefault(shape_of(run), run)
    for run in shapes.values():
        for seed in range(seeds):
            add("random weights", run, "random", probed.parts, seed)
    if controls:
        name = "raw spectrogram" if modality == "a" else "raw pixels and their change"
        raw = (blocks.raw_sound if modality == "a" else blocks.raw_pictures)(store, probed.numbers, clips=clips)
        vote(name, raw, probed.parts, centred=True)
    rows = [probing.row(name, f"k = {k}", unseen.whole(o, probed)) for (name, k), o in found.items()]
    rows.append(probing.row("commonest class", "", [probing.chance(probed)]))
    return probing.table(
        f"nearest neighbours of {'sound' if modality == 'a' else 'pictures'}, {store.path}",
        rows,
        probed,
        (
            f"conv5x pooled by mean, {clips} clips of a video; weights exp(cosine / {TEMPERATURE:g})",
            *notes,
        ),
        list(dict.fromkeys(names)),
    )
