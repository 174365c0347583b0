"""Charts: curves, histograms and maps of dots as SVG figures of a page, or as files of their own.

Colours are the page's, light and dark. Not here: tables and the page around them (`page.py`), and any measurement.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from avstore.errors import UsageError
from benchmarks.page import escaped

WIDTH, HEIGHT = 360, 200  # of a chart, in its own units: about the pixels that it has on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
POINTS = 400  # of a curve at most
COLOURS = 8  # that a page has names for
LIGHT = ("#0f766e", "#c2571a", "#4f5bd5", "#b0307a", "#7a7d12", "#0284c7", "#7c3aed", "#6b7280")


@dataclass(frozen=True)
class Curve:
    """Points (x, y); a y that is None or not finite is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them: steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        raise UsageError(f"an axis from {low} to {high}", "both are finite, the second is not the smaller")
    if high == low:
        return [low]
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / wanted * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """`0.02`, `1.5`, `12k`: a number beside an axis."""
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}"


def _scale(low: float, high: float, start: float, end: float) -> Any:
    span = (high - low) or 1.0
    return lambda v: start + (v - low) / span * (end - start)


def _axes(x: tuple[float, float], y: tuple[float, float], label: str) -> tuple[str, Any, Any]:
    to_x, to_y = _scale(*x, LEFT, WIDTH - RIGHT), _scale(*y, HEIGHT - BOTTOM, TOP)
    parts = []
    for t in ticks(*y):
        at = to_y(t)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{number(t)}</text>')
    for t in ticks(*x):
        if to_x(t) < WIDTH - RIGHT - 34 or not label:
            parts.append(f'<text x="{to_x(t):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{number(t)}</text>')
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{escaped(label)}</text>'
    )
    return "".join(parts), to_x, to_y


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x: str = "step",
    zero: bool = False,
    smooth: int = 1,
    marks: bool = False,
) -> str:
    """Curves over x as a figure. zero: the y axis begins at 0. smooth: a running mean over so many points, with the
    points themselves behind it. marks: a dot at each point. "" where no curve has two finite points."""
    kept = []
    for c in curves:
        if len(c.x) != len(c.y):
            raise UsageError(f"curve {c.name}: {len(c.x)} x for {len(c.y)} y", "they come in pairs")
        pairs = [(float(a), float(b)) for a, b in zip(c.x, c.y, strict=True) if b is not None and math.isfinite(b)]
        if len(pairs) > 1:
            kept.append((c.name, np.array(pairs)))
    if not kept:
        return ""
    every = np.concatenate([p for _, p in kept])
    low, high = every.min(axis=0), every.max(axis=0)
    bottom = min(0.0, float(low[1])) if zero else float(low[1])
    margin = (float(high[1]) - bottom) * 0.04 or abs(float(high[1])) * 0.1 or 1.0
    axes, to_x, to_y = _axes(
        (float(low[0]), float(high[0])), (bottom if zero else bottom - margin, float(high[1]) + margin), x
    )
    lines = []
    for i, (_, p) in enumerate(kept):
        drawn = [(p, "curve thin"), (_running(p, smooth), "curve")] if smooth > 1 and len(p) > 2 * smooth else [
            (p, "curve")]  # fmt: skip
        for q, kind in drawn:
            thin = q[np.unique(np.linspace(0, len(q) - 1, min(POINTS, len(q))).round().astype(int))]
            points = " ".join(f"{to_x(a):.1f},{to_y(b):.1f}" for a, b in thin)
            lines.append(f'<polyline class="{kind}" style="stroke:var(--c{i % COLOURS})" points="{points}"/>')
        if marks:
            lines += [f'<circle cx="{to_x(a):.1f}" cy="{to_y(b):.1f}" r="2.4" style="fill:var(--c{i % COLOURS})"/>'
                      for a, b in p]  # fmt: skip
    return _figure(title, axes + "".join(lines), [n for n, _ in kept] if len(kept) > 1 else [])


def _running(p: np.ndarray, n: int) -> np.ndarray:
    """Mean of the last n points, of those there are at the start."""
    total = np.cumsum(np.concatenate([[0.0], p[:, 1]]))
    end = np.arange(1, len(p) + 1)
    start = np.maximum(0, end - n)
    return np.stack([p[:, 0], (total[end] - total[start]) / (end - start)], 1)


def histogram(
    title: str,
    groups: Sequence[tuple[str, np.ndarray]],
    *,
    x: str,
    bins: int = 40,
    span: tuple[float, float] | None = None,
) -> str:
    """Shares of each group per bin, drawn over each other; `groups` are (name, values). span: from where to where, all
    values by default. "" without any values."""
    filled = [(n, np.asarray(v, float)[np.isfinite(np.asarray(v, float))]) for n, v in groups]
    filled = [(n, v) for n, v in filled if len(v)]
    if not filled:
        return ""
    every = np.concatenate([v for _, v in filled])
    low, high = (float(every.min()), float(every.max())) if span is None else span
    edges = np.linspace(low, max(high, low + 1e-9), bins + 1)
    shares = [(n, np.histogram(v, edges)[0] / len(v)) for n, v in filled]
    top = max(float(s.max()) for _, s in shares)
    axes, to_x, to_y = _axes((float(edges[0]), float(edges[-1])), (0.0, top * 1.05), x)
    parts = []
    for i, (_, share) in enumerate(shares):
        steps = " ".join(
            f"{to_x(e):.1f},{to_y(s):.1f}" for a, b, s in zip(edges[:-1], edges[1:], share, strict=True) for e in (a, b)
        )
        start, end = f"{to_x(edges[0]):.1f},{to_y(0):.1f}", f"{to_x(edges[-1]):.1f},{to_y(0):.1f}"
        colour = f"var(--c{i % COLOURS})"
        parts.append(
            f'<polygon points="{start} {steps} {end}" style="fill:{colour};fill-opacity:.25;stroke:{colour}"/>'
        )
    return _figure(title, axes + "".join(parts), [n for n, _ in shares])


@dataclass(frozen=True)
class Dots:
    """Points (n, 2) of one name; shape 'o' or '^'. Groups of one `colour` share it."""

    name: str
    points: np.ndarray
    colour: int
    shape: str = "o"


def scatter(title: str, groups: Sequence[Dots], legend: Sequence[tuple[str, int]]) -> str:
    """Dots in the plane, both axes to one scale; legend: (name, colour)."""
    every = np.concatenate([g.points for g in groups]) if groups else np.zeros((0, 2))
    if not len(every) or not np.isfinite(every).all():
        raise UsageError("a map of points that are not there, or not finite", "there must be at least one")
    low, high = every.min(axis=0), every.max(axis=0)
    side = float((high - low).max()) or 1.0
    middle = (low + high) / 2
    to_x = _scale(middle[0] - side / 2, middle[0] + side / 2, 8, WIDTH - 8)
    to_y = _scale(middle[1] - side / 2, middle[1] + side / 2, WIDTH - 8, 8)
    parts = []
    for g in groups:
        style = f"fill:var(--c{g.colour % COLOURS});fill-opacity:.75"
        for px, py in g.points.tolist():
            a, b = to_x(px), to_y(py)
            if g.shape == "o":
                parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" style="{style}"/>')
            else:
                d = f"M{a:.1f} {b - 3.4:.1f}l3.2 5.6h-6.4z"
                parts.append(f'<path d="{d}" style="{style}"/>')
    return _figure(title, "".join(parts), legend, height=WIDTH)


def _figure(title: str, body: str, names: Sequence[str] | Sequence[tuple[str, int]], height: int = HEIGHT) -> str:
    coloured = [n if isinstance(n, tuple) else (n, i) for i, n in enumerate(names)]
    legend = "".join(f'<span><i style="background:var(--c{c % COLOURS})"></i>{escaped(n)}</span>' for n, c in coloured)
    return (
        f'<figure class="chart"><figcaption>{escaped(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escaped(title)}">{body}</svg>'
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + "</figure>"
    )


def drawing(figures: Sequence[str], width: int = 720) -> str:
    """Figures made here, one below the other, as one SVG file with their titles and legends."""
    scale = width / WIDTH
    parts, y = [], 0.0
    for figure in figures:
        title = re.search(r"<figcaption>(.*?)</figcaption>", figure)
        box = re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', figure)
        if title is None or box is None:
            raise UsageError("a figure without a drawing", "chart, histogram and scatter make some")
        parts.append(f'<text x="12" y="{y + 22:.0f}" class="title">{title[1]}</text>')
        inner = figure[figure.index(">", figure.index("<svg")) + 1 : figure.index("</svg>")]
        height = float(box[1])
        parts.append(f'<svg y="{y + 32:.0f}" width="{width}" height="{height * scale:.0f}" viewBox="0 0 {WIDTH} '
                     f'{height:g}">{inner}</svg>')  # fmt: skip
        y += 32 + height * scale + 8
        for colour, name in re.findall(r'<span><i style="background:var\((--c\d)\)"></i>(.*?)</span>', figure):
            parts.append(f'<rect x="14" y="{y:.0f}" width="12" height="12" style="fill:var({colour})"/>'
                         f'<text x="34" y="{y + 11:.0f}" class="name">{name}</text>')  # fmt: skip
            y += 20
        y += 16
    names = ";".join(f"--c{i}:{c}" for i, c in enumerate(LIGHT))
    style = (
        f"svg{{{names};background:#fff}}text{{fill:#63636b;font:10px sans-serif}}.grid{{stroke:#e3e1dc}}"
        ".axis{stroke:#63636b}.curve{fill:none;stroke-width:1.6}.thin{stroke-width:1;opacity:.3}"
        ".title{fill:#1b1b1f;font:15px sans-serif}.name{font:13px sans-serif}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y:.0f}" viewBox="0 0 {width} {y:.0f}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def standalone(figure: str) -> str:
    """The drawing of a figure made here as an SVG file of its own, in the light colours."""
    start, end = figure.find("<svg"), figure.find("</svg>")
    if start < 0 or end < 0:
        raise UsageError("a figure without a drawing", "chart, histogram and scatter make some")
    body = figure[start:end]
    names = ";".join(f"--c{i}:{c}" for i, c in enumerate(LIGHT))
    style = (
        f"svg{{{names};background:#fff}}text{{fill:#63636b;font:10px sans-serif}}.grid{{stroke:#e3e1dc}}"
        ".axis{stroke:#63636b}.curve{fill:none;stroke-width:1.6}.thin{stroke-width:1;opacity:.3}"
    )
    head, rest = body.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg" width="720"><style>{style}</style>{rest}</svg>\n'
