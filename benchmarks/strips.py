"""Pictures of summaries: the score over time with what is chosen, and strips of the chosen moments.

One row for each summary, one above the other on one time axis, so that two runs can be compared by eye (Lavania et
al., Fig. 2). Drawn here, with letters of 3 x 5 points: no plotting library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from avstore.errors import UsageError
from benchmarks.video_summary import VideoSummary

Picture = NDArray[np.uint8]
WIDE, MARGIN, TALL = 1280, 24, 150
PAPER, INK, SOFT, FAINT = (255, 255, 255), (28, 30, 38), (120, 124, 134), (226, 228, 233)
COLOURS = ((196, 78, 32), (30, 104, 168), (58, 130, 74), (130, 70, 150))
ORDER = "0123456789abcdefghijklmnopqrstuvwxyz .:-_/%(),=+>?"
SHAPES = (  # of each letter five rows of three points, an octal digit a row
    "755572622771747717175571174717747577112275757757172575565656344436555674647746443455355755"
    "722271115255655444475775565555255526564425563656553421672222555575555255775552555522271247"
    "0000000002020200070000007112445124512221422240002407070027204212471202"
)
LETTERS = {letter: SHAPES[5 * i : 5 * i + 5] for i, letter in enumerate(ORDER)}


def write_text(picture: Picture, text: str, y: int, x: int, colour: Sequence[int] = INK, scale: int = 2) -> int:
    """Writes on `picture` from (y, x), cut at its right edge; letters without a shape become `?`. Returns the column
    after it."""
    for letter in text.lower():
        rows = LETTERS.get(letter, LETTERS["?"])
        points = np.array([[int(r) >> k & 1 for k in (2, 1, 0)] for r in rows], bool).repeat(scale, 0).repeat(scale, 1)
        h, w = points.shape
        if x + w > picture.shape[1] or y + h > picture.shape[0]:
            break
        picture[y : y + h, x : x + w][points] = colour
        x += w + scale
    return x


def clock(seconds: float) -> str:
    """`0:07.5`, `1:02:03.0`."""
    tenths = round(float(seconds) * 10)
    minutes, rest = divmod(tenths, 600)
    head = f"{minutes}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}"
    return f"{head}:{rest // 10:02d}.{rest % 10}"


def curves(summaries: Sequence[VideoSummary]) -> Picture:
    """uint8 (H, 1280, 3): for each summary its scores over time; what is chosen is shaded, borders of segments are
    ticks. Each curve fills its own height from its least to its greatest score, which are written beside it."""
    _require(summaries)
    block = TALL + 62
    out = np.full((len(summaries) * block + 34, WIDE, 3), PAPER, np.uint8)
    plot = WIDE - 2 * MARGIN
    for i, s in enumerate(summaries):
        colour = np.array(COLOURS[i % len(COLOURS)])
        top = i * block + 44
        low, high = float(s.scores.min()), float(s.scores.max())
        flat = high - low < 1e-9
        head = f"{s.run}: {float(s.kept):.1f} of {float(s.seconds):.1f} s"
        write_text(out, head, top - 32, MARGIN, colour.tolist(), 2)
        word = f"score {high:.3f} everywhere" if flat else f"score {low:.4f} to {high:.4f}"
        write_text(out, word, top - 16, MARGIN, SOFT, 2)
        total = float(s.seconds)
        at = (np.arange(plot) + 0.5) / plot * total
        kept = np.zeros(plot, bool)
        for a, b in s.intervals:
            kept |= (at >= float(a)) & (at < float(b))
        area = out[top : top + TALL, MARGIN : MARGIN + plot]
        area[:] = np.where(kept[None, :, None], (0.22 * colour + 0.78 * 255).astype(np.uint8), 246)
        y = np.interp(at, np.minimum(np.arange(len(s.scores)) + 0.5, total), s.scores)
        height = np.full(plot, 0.5) if flat else (y - low) / (high - low)
        line = np.rint((1 - height) * (TALL - 13)).astype(int) + 6
        before = np.concatenate([line[:1], line[:-1]])
        rows = np.arange(TALL)[:, None]
        area[(rows >= np.minimum(line, before) - 1) & (rows <= np.maximum(line, before) + 1)] = colour
        for edge in s.segments[:, 0]:
            x = MARGIN + min(plot - 1, int(float(edge) / total * plot))
            out[top + TALL : top + TALL + 6, x] = INK
    _axis(out, float(max(s.seconds for s in summaries)), len(summaries) * block + 8)
    return out


def _axis(out: Picture, total: float, y: int) -> None:
    step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600) if total / s <= 12), 7200)
    plot = WIDE - 2 * MARGIN
    for second in range(0, int(total) + 1, step):
        x = MARGIN + int(second / total * plot)
        out[y - 2 : y + 4, min(x, WIDE - MARGIN - 1)] = SOFT
        write_text(out, clock(second)[:-2], y + 8, x, SOFT, 2)


def moments(summary: VideoSummary, most: int = 12) -> list[float]:
    """Seconds of the stills of a strip: `most` at equal distances through the summary, fewer where it is shorter."""
    count = max(len(summary.intervals), min(most, int(summary.kept * 4)))
    count = max(1, min(count, most))
    out = []
    for k in range(count):
        left = float(summary.kept) * (k + 0.5) / count
        for a, b in summary.intervals:
            if left < b - a:
                out.append(float(a) + left)
                break
            left -= float(b - a)
    return out


def sheet(
    summaries: Sequence[VideoSummary], times: Sequence[Sequence[float]], pictures: Sequence[Sequence[Picture]]
) -> Picture:
    """uint8 (H, 1280, 3): a strip of stills for each summary, with the moment under each. pictures: those of `times`,
    all of one height."""
    _require(summaries)
    if not len(summaries) == len(times) == len(pictures) or any(
        len(t) != len(p) or not len(p) for t, p in zip(times, pictures, strict=False)
    ):
        raise UsageError("strips without their stills", "one still for each moment of each summary")
    tall, wide = pictures[0][0].shape[:2]
    gap, words = 8, 18
    across = max(1, (WIDE - 2 * MARGIN + gap) // (wide + gap))
    rows = [-(-len(p) // across) for p in pictures]
    out = np.full((sum(34 + r * (tall + words) for r in rows) + MARGIN, WIDE, 3), PAPER, np.uint8)
    y = 12
    for i, (s, at, stills) in enumerate(zip(summaries, times, pictures, strict=True)):
        head = f"{s.run}: {float(s.kept):.1f} of {float(s.seconds):.1f} s"
        write_text(out, head, y, MARGIN, COLOURS[i % len(COLOURS)], 3)
        y += 24
        for k, (t, still) in enumerate(zip(at, stills, strict=True)):
            if k and k % across == 0:
                y += tall + words
            x = MARGIN + (k % across) * (wide + gap)
            part = still[:, : WIDE - x]
            out[y : y + part.shape[0], x : x + part.shape[1]] = part
            write_text(out, clock(t), y + tall + 3, x, SOFT, 2)
        y += tall + words + 10
    return out


def _require(summaries: Sequence[VideoSummary]) -> None:
    if not summaries:
        raise UsageError("no summary to draw", "one at least")
