"""What `avstore explain` writes: a folder of pictures, Parquet and one page of it all.

    explain.html                      all of it in one file
    saliency-000331.png               one clip: for each run what its network got, and the maps over it
    map-<run>.svg, cosines-<run>.svg  the 2-D projection of each run, and the histogram of its cosines
    map.parquet                       its points: run, number, key, label, modality, x, y, cosine

Not here: how maps are computed (`explain.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore.durable import machine_errors, write_atomic
from avstore.errors import NotFoundError, UsageError
from benchmarks import page
from benchmarks.card import png, uri
from benchmarks.chart import COLOURS, Dots, histogram, scatter, standalone
from benchmarks.explain import (
    FeatureMap,
    Saliency,
    feature_map,
    require_parquet,
    saliency,
    saliency_picture,
    write_parquet,
)
from benchmarks.sheet import draw
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Written:
    """The files, and the table of cosines."""

    files: list[Path]
    table: Table


def explain(
    store: Store,
    runs: Sequence[Run],
    folder: Path,
    *,
    numbers: np.ndarray,
    videos: Sequence[int] = (),
    second: int | None = None,
    count: int = 4,
    points: int = 200,
    block: str = "conv4x",
    form: str = "grad-cam",
    how: str = "pca",
    which: str | int = "latest",
    label: str = "label",
    seed: int = 0,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> Written:
    """Writes the folder. numbers: the selection; videos: those whose maps are drawn (default: `count` of the selection,
    class by class); second: of each (default: its middle); points: videos in the map of features, 0 for none."""
    if not runs:
        raise UsageError("no run is named", "maps are of a run's networks", "--run runs/avid-cma; repeatable")
    if len({r.name for r in runs}) < len(runs):
        raise UsageError("two runs of one name", ", ".join(str(r.path) for r in runs), "rename a folder")
    if count < 0 or points < 0:
        raise UsageError(f"--count {count} --points {points}", "0 or more")
    if points:
        require_parquet()
    both = numbers[store.has_picture[numbers] & store.has_sound[numbers]]
    if not len(both):
        raise NotFoundError(f"no video of the selection in {store.path} has picture and sound", "", "widen --where")
    labels = _labels(store, both, label)
    chosen = [store[v].number for v in videos] or [int(both[i]) for i in draw(labels, count, seed).tolist()]
    pairs = [(n, int(float(store.seconds(n)) / 2) if second is None else second) for n in chosen]
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files, parts = [], []
    found: list[list[Saliency]] = []
    for i, run in enumerate(runs):
        progress("saliency", i, len(runs))
        found.append(saliency(run, store, pairs, block=block, form=form, which=which, device=device))
    figures = []
    for of_runs in zip(*found, strict=True) if pairs else ():
        data = png(saliency_picture(of_runs))
        file = folder / f"saliency-{of_runs[0].video:06d}.png"
        write_atomic(file, data)
        files.append(file)
        figures.append(page.picture(uri(data, "image/png"), _caption(store, of_runs, label)))
    if figures:
        note = (
            f"Gradient of the cosine of sight and sound with respect to {block}, times its activation ({form}), over "
            f"the clip. Two lines of each run ({', '.join(r.name for r in runs)}): what the network got, and the map "
            "on it, bright where it speaks for the match. Frames left, spectrogram right: time runs to the right, low "
            "notes are below."
        )
        parts.append(page.section("Saliency", f'<div class="pictures">{"".join(figures)}</div>', note))
    maps: list[FeatureMap] = []
    if points:
        some = np.sort(both[draw(labels, points, seed)])
        for i, run in enumerate(runs):
            progress("feature maps", i, len(runs))
            maps.append(feature_map(run, store, some, how=how, seed=seed, which=which, device=device))
        parts += _maps(folder, store, maps, label, files)
        write_parquet(folder / "map.parquet", maps, store, label)
        files.append(folder / "map.parquet")
    table = cosines(maps)
    if maps:
        parts.append(page.section("Cosines", page.table(table)))
    names = " and ".join(r.name for r in runs)
    text = page.page(f"What {names} look{'s' if len(runs) == 1 else ''} at", f"On {store.path.name}.", parts, menu=True)
    write_atomic(folder / "explain.html", text.encode())
    return Written([folder / "explain.html", *files], table)


def cosines(maps: Sequence[FeatureMap]) -> Table:
    """Means and spreads of the cosines of own and of others' sight and sound, and how often the own one is larger."""
    rows = [
        {
            "run": m.run,
            "own": float(m.cosine.mean()),
            "own sd": float(m.cosine.std()),
            "others": float(m.others.mean()),
            "others sd": float(m.others.std()),
            "own above others": m.above,
            "videos": len(m.numbers),
        }
        for m in maps
    ]
    note = "cosine of a video's mean sight and sound, its own and those of two different videos; above: 0.5 is chance"
    columns = ("run", "own", "own sd", "others", "others sd", "own above others", "videos")
    return Table("cosines of sight and sound", columns, rows, (note,))


def _maps(folder: Path, store: Store, maps: Sequence[FeatureMap], label: str, files: list[Path]) -> list[str]:
    figures = []
    for m in maps:
        labels = [x or "none" for x in _labels(store, m.numbers, label)]
        names = sorted(set(labels))
        if len(names) > COLOURS:
            names = [*sorted(n for n, _ in Counter(labels).most_common(COLOURS - 1)), "the rest"]
        colour = np.array([names.index(x) if x in names else len(names) - 1 for x in labels])
        groups = [
            Dots(name, p[colour == c], c, shape)
            for c, name in enumerate(names)
            for p, shape in ((m.video, "o"), (m.audio, "^"))
            if (colour == c).any()
        ]
        words = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
        drawn = scatter(f"{m.run}, {words[m.how]}", groups, list(zip(names, range(len(names)), strict=True)))
        figures.append(drawn)
        files.append(folder / f"map-{m.run}.svg")
        write_atomic(files[-1], standalone(drawn).encode())
    out = [
        page.section(
            "Feature map",
            f'<div class="charts">{"".join(figures)}</div>',
            f"Mean embeddings of {len(maps[0].numbers)} videos in two dimensions: dots are sight, triangles sound, "
            f"colours {label}.",
        )
    ]
    bars = []
    every = np.concatenate([x for m in maps for x in (m.cosine, m.others)])
    span = (float(every.min()), float(every.max()))  # the same for all runs
    for m in maps:
        title = f"{m.run}: cosine of sight and sound"
        bars.append(histogram(title, [("own", m.cosine), ("of another video", m.others)], x="cosine", span=span))
        files.append(folder / f"cosines-{m.run}.svg")
        write_atomic(files[-1], standalone(bars[-1]).encode())
    out.append(page.section("Histogram", f'<div class="charts">{"".join(bars)}</div>', "Shares of the pairs per bin."))
    return out


def _labels(store: Store, numbers: np.ndarray, label: str) -> list[str | None]:
    if label not in store.columns:
        return [None] * len(numbers)
    return [None if x is None else str(x) for x in store.column(label, numbers)]


def _caption(store: Store, of_runs: Sequence[Saliency], label: str) -> str:
    first = of_runs[0]
    named = _labels(store, np.array([first.video]), label)[0]
    scores = ", ".join(f"{s.run} {s.cosine:.3f}" for s in of_runs)
    return f"{store.key(first.video)}{f' ({named})' if named else ''}, second {first.second}. Cosine: {scores}"
