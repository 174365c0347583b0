"""What `avstore explain` writes: a folder of pictures, Parquet and one page of it all.

    explain.html                      all of it in one file
    class-000331.png                  one clip: the class activation maps of fine-tuned networks
    saliency-000331.png               one clip: for each run what its network got, and the maps over it
    map-<run>.svg, cosines-<run>.svg  the 2-D projection of each run, and the histogram of its cosines
    map.parquet                       its points: run, number, key, label, modality, x, y, cosine

Not here: how maps are computed (`explain.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore.durable import machine_errors, write_atomic
from avstore.errors import AvstoreError, NotFoundError, UsageError
from benchmarks import page
from benchmarks.budget import Budget
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
from benchmarks.head import Head, class_saliency, read_head
from benchmarks.sheet import draw
from benchmarks.table import Table
from benchmarks.tuning import Classifier, needs_for

if TYPE_CHECKING:
    from torch import nn

    from avstore.store import Store
    from trainers.run import Run

OF_MATCH, OF_CLASS = "conv4x", "conv5x"  # blocks whose maps are drawn: of sight and sound's match, of a class
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
    heads: Sequence[Path] = (),
    of_class: str | None = None,
    videos: Sequence[int] = (),
    second: int | None = None,
    count: int = 4,
    points: int = 200,
    block: str | None = None,
    form: str = "grad-cam",
    how: str = "pca",
    which: str | int = "latest",
    label: str = "label",
    seed: int = 0,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> Written:
    """Writes the folder. numbers: the selection; videos: those whose maps are drawn (default: `count` of the selection,
    class by class); second: of each (default: its middle); points: videos in the map of features, 0 for none; block:
    whose maps (default: conv4x, of heads conv5x). Videos are drawn that have what is needed: picture and sound for
    runs; for heads alone, what these take.

    heads: fine-tuned networks (`head.py`) whose class activation maps are drawn, of `of_class` or each video's own
    class; their runs are those noted in the files, or the one of the same name among `runs`. With heads alone there are
    no similarity maps."""
    if not runs and not heads:
        raise UsageError("no run is named", "maps are of a run's networks", "--run runs/avid-cma; repeatable")
    if of_class is not None and not heads:
        raise UsageError(f"class {of_class!r} without a classifier", "classes are a fine-tuned network's",
                         "avstore bench finetune --keep, then --head FILE")  # fmt: skip
    points = points if runs else 0
    tuned = [read_head(h, next((r for r in runs if r.name == Path(_noted(h)).name), None)) for h in heads]
    if len({r.name for r in runs}) < len(runs):
        raise UsageError("two runs of one name", ", ".join(str(r.path) for r in runs), "rename a folder")
    if count < 0 or points < 0:
        raise UsageError(f"--count {count} --points {points}", "0 or more")
    if points:
        require_parquet()
    needs = [needs_for(run, store, about.recipe) for _, about, run in tuned]
    picture, sound = bool(runs) or any(n.picture for n in needs), bool(runs) or any(n.sound for n in needs)
    able = numbers[(store.has_picture[numbers] | (not picture)) & (store.has_sound[numbers] | (not sound))]
    if not len(able) and (points or not videos):
        what = " and ".join(word for word, on in (("picture", picture), ("sound", sound)) if on)
        raise NotFoundError(f"no video of the selection in {store.path} has {what}", "", "widen --where")
    labels = _labels(store, able, label)
    chosen = [store[v].number for v in videos] or [int(able[i]) for i in draw(labels, count, seed).tolist()]
    pairs = [(n, int(float(store.seconds(n)) / 2) if second is None else second) for n in chosen]
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files, parts = [], []
    found: list[list[Saliency]] = []
    for i, run in enumerate(runs):
        progress("saliency", i, len(runs))
        found.append(saliency(run, store, pairs, block=block or OF_MATCH, form=form, which=which, device=device))
    figures = []
    for of_runs in zip(*found, strict=True) if pairs else ():
        data = png(saliency_picture(of_runs))
        file = folder / f"saliency-{of_runs[0].video:06d}.png"
        write_atomic(file, data)
        files.append(file)
        figures.append(page.picture(uri(data, "image/png"), _caption(store, of_runs, label)))
    if figures:
        note = _told(block or OF_MATCH, form, [r.name for r in runs])
        parts.append(page.section("Saliency", f'<div class="pictures">{"".join(figures)}</div>', note))
    if tuned and pairs:
        parts.append(_classes(folder, store, tuned, pairs, of_class, block or OF_CLASS, form, device, label, files))
    maps: list[FeatureMap] = []
    if points:
        some = np.sort(able[draw(labels, points, seed)])
        for i, run in enumerate(runs):
            progress("feature maps", i, len(runs))
            maps.append(feature_map(run, store, some, how=how, seed=seed, which=which, device=device))
        parts += _maps(folder, store, maps, label, files)
        write_parquet(folder / "map.parquet", maps, store, label)
        files.append(folder / "map.parquet")
    table = cosines(maps)
    if maps:
        parts.append(page.section("Cosines", page.table(table)))
    named = list(dict.fromkeys([*(r.name for r in runs), *(r.name for _, _, r in tuned)]))
    names = " and ".join(named)
    title = f"What {names} look{'s' if len(named) == 1 else ''} at"
    text = page.page(title, f"On {store.path.name}.", parts, menu=True)
    write_atomic(folder / "explain.html", text.encode())
    return Written([folder / "explain.html", *files], table)


def _noted(head: Path) -> str:
    """The run's folder that a head's file names; "" where it cannot be read (reading it whole says why)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(head, "pt") as file:
            return str(json.loads((file.metadata() or {})["avstore-head"])["run"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return ""


def _classes(
    folder: Path,
    store: Store,
    tuned: Sequence[tuple[Classifier, Head, Run]],
    pairs: Sequence[tuple[int, int]],
    name: str | None,
    block: str,
    form: str,
    device: str,
    label: str,
    files: list[Path],
) -> str:
    """The section of class activation maps; its pictures go into `folder` and `files`."""
    found = [
        class_saliency(net, about, run, store, pairs, name=name, block=block, form=form, device=device)
        for net, about, run in tuned
    ]
    figures = []
    for of_heads in zip(*found, strict=True):
        data = png(saliency_picture(of_heads))
        files.append(folder / f"class-{of_heads[0].video:06d}.png")
        write_atomic(files[-1], data)
        key, named = store.key(of_heads[0].video), _labels(store, np.array([of_heads[0].video]), label)[0]
        told = "; ".join(f"{s.told}{_dark(s)}" for s in of_heads)
        caption = f"{key}{f' ({named})' if named else ''}, second {of_heads[0].second}. {told}"
        figures.append(page.picture(uri(data, "image/png"), caption))
    whose = ", ".join(f"{r.name} ({a.part}, seed {a.seed}, {a.recipe.preset})" for _, a, r in tuned)
    whom = name if name is not None else "the video's own class"
    note = (
        f"Class activation maps of fine-tuned networks: {whose}. Gradient of the score of "
        f"{whom} with respect to {block}, times its activation ({form}): "
        "bright where it speaks for the class. Two lines of each: what the network got, and the map on it."
    )
    return page.section("Class activation", f'<div class="pictures">{"".join(figures)}</div>', note)


def saliency_section(
    store: Store,
    runs: Sequence[Run],
    numbers: np.ndarray,
    count: int,
    budget: Budget,
    *,
    block: str = OF_MATCH,
    form: str = "grad-cam",
    label: str = "label",
    seed: int = 0,
    device: str = "auto",
) -> str:
    """A section with maps of `count` clips of `numbers`, class by class, by each run; "" without any. What cannot be
    shown, or not in time, is noted in `budget` with the command that makes it."""
    names = " ".join(f"--run {r.path}" for r in runs)
    command = f"avstore explain {store.path} {names} --count {count} --points 0 -o explain"
    both = numbers[store.has_picture[numbers] & store.has_sound[numbers]]
    if not len(both):
        budget.leave("saliency", "no video has picture and sound", command)
        return ""
    chosen = [int(both[i]) for i in draw(_labels(store, both, label), count, seed).tolist()]
    able: list[tuple[Run, nn.Module]] = []
    if budget.allows():
        for run in runs:
            try:
                able.append((run, run.load("latest")))
            except AvstoreError as e:
                budget.leave(f"saliency of {run.name}", e.what, e.next)
    figures: list[str] = []
    cost = 0.0
    for i, number in enumerate(chosen):
        if not budget.allows(cost):
            budget.leave(f"saliency of {len(chosen) - i} clips", f"it would take longer than {budget.seconds:g} s",
                         command)  # fmt: skip
            break
        began, found = budget.spent, []
        for run, method in list(able):
            try:
                pair = (number, int(float(store.seconds(number)) / 2))
                found += saliency(run, store, [pair], block=block, form=form, device=device, method=method)
            except AvstoreError as e:  # once: a run that has no such map has none of the next clip
                able.remove((run, method))
                budget.leave(f"saliency of {run.name}", e.what, e.why)
        cost = budget.spent - began
        if found:
            data = png(saliency_picture(found))
            figures.append(page.picture(uri(data, "image/png"), _caption(store, found, label)))
    if not figures:
        return ""
    body = f'<div class="pictures">{"".join(figures)}</div>'
    return page.section("Saliency", body, _told(block, form, [r.name for r, _ in able]))


def _told(block: str, form: str, names: Sequence[str]) -> str:
    return (
        f"Gradient of the cosine of sight and sound with respect to {block}, times its activation ({form}), over "
        f"the clip. Two lines of each run ({', '.join(names)}): what the network got, and the map on it, bright where "
        "it speaks for the match. Frames left, spectrogram right: time runs to the right, low notes are below."
    )


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


def _dark(s: Saliency) -> str:
    """Said of maps that are dark everywhere, or they would look like a fault of the page."""
    empty = [word for word, x in (("sight", s.sight), ("sound", s.sound)) if x.size and not x.any()]
    return f" (nothing of {' and '.join(empty)} speaks for it)" if empty else ""


def _caption(store: Store, of_runs: Sequence[Saliency], label: str) -> str:
    first = of_runs[0]
    named = _labels(store, np.array([first.video]), label)[0]
    scores = ", ".join(f"{s.run} {s.cosine:.3f}{_dark(s)}" for s in of_runs)
    return f"{store.key(first.video)}{f' ({named})' if named else ''}, second {first.second}. Cosine: {scores}"
