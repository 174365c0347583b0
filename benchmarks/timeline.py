"""Timelines: the summaries of videos of a store as figures of a page.

    timelines(store, [Teller("avid-cma")], budget, count=2)             # a section of HTML

One figure for each video: stills at equal distances, and under them, on the same axis, for each run the score of each
second with what its summary keeps shaded. Scores are those of `video_summary.py`: from the embeddings in the store
where the run has some, else from the run's network. Videos: the longest of at most ten minutes, equal lengths drawn by
a seed. Not here: the summary as a video (`excerpt.py`), pictures of it as files (`strips.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from avstore.errors import AvstoreError, UsageError
from avstore.index import embedded_runs, read_rows
from benchmarks import page
from benchmarks.budget import Budget
from benchmarks.card import jpeg, shrunk
from benchmarks.chart import COLOURS
from benchmarks.page import escaped
from benchmarks.strips import clock
from benchmarks.video_summary import ALONE, VideoSummary, summarise, summarise_rows

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

STILLS, TALL = 10, 72  # of a figure; pixels of a still's height, at most
LONGEST = 600  # seconds of a video: the segments of a longer one take minutes
WIDE, HIGH = 1000, 100  # of a drawing, in its own units
COST = 0.05  # seconds that a second of video takes before anything was measured


@dataclass(frozen=True)
class Teller:
    """Who tells what matters: embeddings of `name` in the store, else `run`'s network."""

    name: str
    run: Run | None = None


def films(store: Store, numbers: np.ndarray, count: int, seed: int = 0) -> list[int]:
    """The `count` longest of `numbers` that last from 3 s to ten minutes, equal lengths in a seeded order."""
    seconds = np.array([float(store.seconds(int(n))) for n in numbers])
    able = np.flatnonzero((seconds >= 3) & (seconds <= LONGEST))
    drawn = np.random.default_rng(seed).permutation(able)
    return [int(numbers[i]) for i in drawn[np.argsort(-seconds[drawn].round(1), kind="stable")][:count]]


def timelines(
    store: Store,
    tellers: Sequence[Teller],
    budget: Budget,
    *,
    count: int = 2,
    seed: int = 0,
    label: str = "label",
    device: str = "auto",
) -> str:
    """A section with `count` figures; "" without any. What fails or does not fit is noted in `budget`."""
    if count < 0:
        raise UsageError(f"{count} summaries", "0 or more")
    if not count:
        return ""
    there = embedded_runs(store)
    names = " ".join(f"--run {t.name}" for t in tellers)
    command = f"avstore summarize VIDEO {names or '--run RUN'} -o out.mp4"
    if not tellers:
        budget.leave("summaries", "no run is named and the store has no embeddings", f"avstore embed RUN {store.path}")
        return ""
    chosen = films(store, store.numbers, count, seed)
    if not chosen:
        budget.leave("summaries", f"no video lasts from 3 s to {LONGEST // 60} minutes", command)
        return ""
    rows = {}
    for t in tellers:
        tower = next((x for x in ("video", "audio") if x in there.get(t.name, ())), None)
        if tower is not None:
            rows[t.name] = (tower, read_rows(store, t.name, tower))
    figures = []
    rate: float | None = None  # seconds of work for a second of video
    for i, number in enumerate(chosen):
        seconds = float(store.seconds(number))
        networks = any(t.name not in rows for t in tellers)
        guess = seconds * (rate if rate is not None else COST * (20 if networks else 1))
        if not budget.allows(guess):
            budget.leave(f"summaries of {len(chosen) - i} videos", f"it would take longer than {budget.seconds:g} s",
                         command)  # fmt: skip
            break
        began = time.monotonic()
        found = []
        for t in tellers:
            try:
                if t.name in rows:
                    found.append(summarise_rows(store, number, t.name, *rows[t.name]))
                elif t.run is not None:
                    found.append(summarise(store, t.run, number=number, device=device))
            except AvstoreError as e:
                budget.leave(f"summary of {store.key(number)} by {t.name}", str(e.what), command)
        rate = (time.monotonic() - began) / seconds
        if found:
            figures.append(figure(store, number, found, label))
    if not figures:
        return ""
    note = (
        "Under the stills the score of each second, highest what a run holds for worth seeing; shaded: the summary, "
        f"15 % of the video, by DR-DSN, trained on each video alone without labels ({ALONE.epochs} epochs). "
        f"Each curve fills its height. {len(figures)} of the longest videos of at most {LONGEST // 60} minutes."
    )
    return page.section("Summaries", f'<div class="timelines">{"".join(figures)}</div>', note)


def figure(store: Store, number: int, summaries: Sequence[VideoSummary], label: str = "label") -> str:
    """One video: its stills, and for each summary its scores with what is kept. UsageError without a summary."""
    if not summaries:
        raise UsageError("no summary to draw", "one at least")
    seconds = float(store.seconds(number))
    value = store.column(label, np.array([number]))[0] if label in store.columns else None
    name = f"{store.key(number)}{f' ({value})' if value else ''}"
    parts = []
    if store.has_picture[number]:
        parts.append(f'<img class="stills" alt="{escaped(f"stills of {name}")}" src="{jpeg(_stills(store, number))}">')
    for i, s in enumerate(summaries):
        kept = ", ".join(f"{clock(float(a))} to {clock(float(b))}" for a, b in s.intervals) or "nothing"
        parts.append(_drawn(s, seconds, i))
        parts.append(
            f'<p class="note"><i style="background:var(--c{i % COLOURS})"></i>{escaped(s.run)}: '
            f"{float(s.kept):.1f} s, {escaped(kept)}</p>"
        )
    ends = f'<div class="ends"><span>0:00</span><span>{clock(seconds)}</span></div>'
    return f'<figure class="timeline"><figcaption>{escaped(name)}</figcaption>{"".join(parts)}{ends}</figure>'


def _stills(store: Store, number: int) -> np.ndarray:
    """uint8 (h, STILLS * w, 3): stills from the middle of equal parts of a video, side by side."""
    seconds, out = float(store.seconds(number)), []
    for k in range(STILLS):
        at = seconds * (k + 0.5) / STILLS
        clip = store.clip(number, min(at, max(0.0, seconds - 1 / store.spec.fps)), n=1, fps=store.spec.fps, seconds=0)
        assert clip.frames is not None and clip.box is not None
        y, x, h, w = clip.box
        out.append(shrunk(clip.frames[:1, y : y + h, x : x + w], TALL)[0])
    return np.concatenate(out, axis=1)


def _drawn(s: VideoSummary, seconds: float, i: int) -> str:
    """The SVG of one summary: shaded where it is kept, the scores as a line. It is stretched to the figure's width."""
    colour = f"var(--c{i % COLOURS})"
    shaded = "".join(
        f'<rect x="{float(a) / seconds * WIDE:.1f}" width="{float(b - a) / seconds * WIDE:.1f}" y="0" '
        f'height="{HIGH}" style="fill:{colour}"/>'
        for a, b in s.intervals
    )
    low, high = float(s.scores.min()), float(s.scores.max())
    height = np.full(len(s.scores), 0.5) if high - low < 1e-9 else (s.scores - low) / (high - low)
    at = np.minimum(np.arange(len(s.scores)) + 0.5, seconds) / seconds * WIDE
    at, height = np.concatenate([[0], at, [WIDE]]), np.concatenate([height[:1], height, height[-1:]])
    points = " ".join(f"{x:.1f},{HIGH - 6 - y * (HIGH - 12):.1f}" for x, y in zip(at, height, strict=True))
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(f"scores of {s.run}")}"><g class="kept">{shaded}</g>'
        f'<polyline class="curve" style="stroke:{colour}" points="{points}"/></svg>'
    )
