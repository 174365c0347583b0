"""How a picture of any size, pixel aspect and orientation is laid into a stored frame: pure geometry, exact integers.

`fit` answers with a `Fit`: the size to which a decoder scales the picture as it lies in the file, the turn and the
centre crop, and the box of the picture inside the stored frame. `Fit.lay` does it to planes of pixels. It neither
decodes nor scales, so that every decoder can share it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from avstore.errors import UsageError

UPRIGHT = (False, False, False)


@dataclass(frozen=True)
class Fit:
    """Where a picture goes: scale it as it lies to `scale` (width, height), turn it by `turn`, cut `crop`
    (y, x, height, width) out of it, put that at `box` (y, x, height, width) of a frame of `into` (height, width),
    and repeat its edges outward. `display` is the (width, height) at which the source wants to be seen."""

    scale: tuple[int, int]
    turn: tuple[bool, bool, bool]
    crop: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    into: tuple[int, int]
    display: tuple[int, int]

    def lay(self, planes: Sequence[np.ndarray]) -> np.ndarray:
        """Three planes (red, green, blue), uint8 (scale height, scale width) each -> a new uint8 (H, W, 3)."""
        height, width = self.into
        y, x, h, w = self.box
        cy, cx, ch, cw = self.crop
        transpose, flip_x, flip_y = self.turn
        out = np.empty((height, width, 3), np.uint8)
        inside = out[y : y + h, x : x + w]
        for channel, plane in enumerate(planes):
            if transpose:
                plane = plane.T
            if flip_x:
                plane = plane[:, ::-1]
            if flip_y:
                plane = plane[::-1]
            inside[..., channel] = plane[cy : cy + ch, cx : cx + cw]
        if x:
            out[y : y + h, :x] = out[y : y + h, x : x + 1]
        if x + w < width:
            out[y : y + h, x + w :] = out[y : y + h, x + w - 1 : x + w]
        if y:
            out[:y] = out[y]
        if y + h < height:
            out[y + h :] = out[y + h - 1]
        return out


def turn_of(matrix: bytes | Sequence[int] | None) -> tuple[bool, bool, bool]:
    """(transpose, flip x, flip y), to be done in this order, of a 3x3 display matrix.

    The matrix [a b u; c d v; x y w] (nine int32, row by row) sends the point (p, q) to (a p + c q + x, b p + d q + y).
    Turns that are no multiple of 90 degrees go to the nearest one; a matrix that maps everything to a line, as damaged
    files have, is no turn.
    """
    if matrix is None:
        return UPRIGHT
    if isinstance(matrix, bytes):
        if len(matrix) < 36:
            return UPRIGHT
        matrix = struct.unpack("=9i", matrix[:36])
    if len(matrix) != 9:
        raise UsageError(f"a display matrix has 9 numbers, got {len(matrix)}", next="pass nine, row by row")
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    if a * d == b * c:
        return UPRIGHT
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def even(value: Fraction) -> int:
    """The nearest even number, half up, at least 2."""
    return max(2, 2 * ((value / 2 + Fraction(1, 2)).__floor__()))


def fit(
    width: int,
    height: int,
    into: tuple[int, int],
    *,
    aspect: Fraction = Fraction(1),
    turn: tuple[bool, bool, bool] = UPRIGHT,
    mode: str = "short",
) -> Fit:
    """The fit of a `width` x `height` picture with pixels `aspect` wide into a frame of `into` = (height, width).

    `short`: the short side becomes the frame's height, a longer side is cut in the centre, a shorter one padded.
    `pad`: the whole picture, padded. `stretch`: exactly the frame, at the price of its shape. Scaled sizes are even,
    padding begins at an even offset. UsageError for an empty picture or another mode.
    """
    rows, columns = into
    if width < 1 or height < 1 or rows < 2 or columns < 2 or aspect <= 0:
        what = f"a picture of {width}x{height} with pixel aspect {aspect} cannot be laid into {rows}x{columns}"
        raise UsageError(what, next="sizes are positive")
    wide, high = width * Fraction(aspect), Fraction(height)
    if turn[0]:
        wide, high = high, wide
    if mode == "short":
        if wide >= high:
            w, h = even(rows * wide / high), rows
        else:
            w, h = rows, even(rows * high / wide)
    elif mode == "pad":
        scale = min(columns / wide, rows / high)
        w, h = min(columns, even(wide * scale)), min(rows, even(high * scale))
    elif mode == "stretch":
        w, h = columns, rows
    else:
        raise UsageError(f"fit {mode!r} does not exist", next="there is: short, pad, stretch")
    cw, ch = min(w, columns), min(h, rows)
    half = Fraction(1, 2)
    return Fit(
        scale=(h, w) if turn[0] else (w, h),
        turn=turn,
        crop=((h - ch) // 2, (w - cw) // 2, ch, cw),
        box=((rows - ch) // 4 * 2, (columns - cw) // 4 * 2, ch, cw),
        into=(rows, columns),
        display=((wide + half).__floor__(), (high + half).__floor__()),
    )
