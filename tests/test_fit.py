"""Geometry: hand-worked sizes and boxes, all eight turns, and what must hold for every picture."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avstore.errors import UsageError
from avstore.fit import fit, turn_of

ONE = 1 << 16


@pytest.mark.parametrize(
    ("size", "aspect", "scale", "crop", "box"),
    [
        ((320, 240), 1, (170, 128), (0, 0, 128, 170), (0, 2, 128, 170)),  # 170.67 -> 170; 6 to pad: 2 and 4
        ((1920, 1080), 1, (228, 128), (0, 26, 128, 176), (0, 0, 128, 176)),  # 227.56 -> 228
        ((720, 1280), 1, (128, 228), (50, 0, 128, 128), (0, 24, 128, 128)),  # portrait: its width is the short side
        ((500, 500), 1, (128, 128), (0, 0, 128, 128), (0, 24, 128, 128)),
        ((720, 576), Fraction(16, 15), (170, 128), (0, 0, 128, 170), (0, 2, 128, 170)),  # PAL DVD: 4:3
        ((176, 128), 1, (176, 128), (0, 0, 128, 176), (0, 0, 128, 176)),
        ((301, 224), 1, (172, 128), (0, 0, 128, 172), (0, 2, 128, 172)),  # exactly 172 = 301 * 128 / 224
    ],
)
def test_short_by_hand(size, aspect, scale, crop, box) -> None:
    f = fit(*size, (128, 176), aspect=Fraction(aspect))
    assert (f.scale, f.crop, f.box) == (scale, crop, box)


def test_half_goes_up() -> None:
    # 128 * 171 / 128 = 171 lies between 170 and 172
    assert fit(171, 128, (128, 176)).scale == (172, 128)


def test_pad_and_stretch_by_hand() -> None:
    f = fit(1920, 1080, (128, 176), mode="pad")  # 176 / 1920 * 1080 = 99 -> 100
    assert f.scale == (176, 100) and f.box == (14, 0, 100, 176)
    f = fit(1080, 1920, (128, 176), mode="pad")  # 128 / 1920 * 1080 = 72
    assert f.scale == (72, 128) and f.box == (0, 52, 128, 72)
    f = fit(1920, 1080, (128, 176), mode="stretch")
    assert f.scale == (176, 128) and f.box == (0, 0, 128, 176)
    with pytest.raises(UsageError, match="fit 'middle'"):
        fit(10, 10, (128, 176), mode="middle")


def test_display_size_and_turned_scale() -> None:
    f = fit(720, 576, (128, 176), aspect=Fraction(64, 45), turn=(True, True, False))
    assert f.display == (576, 1024)
    assert f.scale == (228, 128)  # as it lies: the long side is still the first
    assert f.crop == (50, 0, 128, 128)


@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from([(128, 176), (128, 128), (256, 352), (256, 464), (16, 16)]),
    st.fractions(Fraction(1, 4), 4),
    st.booleans(),
    st.sampled_from(["short", "pad", "stretch"]),
)
def test_box_lies_inside_and_matches_the_crop(w, h, into, aspect, turned, mode) -> None:
    f = fit(w, h, into, aspect=aspect, turn=(turned, False, False), mode=mode)
    y, x, bh, bw = f.box
    assert bh == f.crop[2] and bw == f.crop[3]
    assert y % 2 == x % 2 == 0 and f.scale[0] % 2 == f.scale[1] % 2 == 0
    assert y >= 0 and x >= 0 and y + bh <= into[0] and x + bw <= into[1]
    scale = f.scale[::-1] if turned else f.scale
    assert f.crop[0] + bh <= scale[1] and f.crop[1] + bw <= scale[0]
    if mode == "short":
        assert min(scale) == into[0]
        shape = w * aspect / h if not turned else h / (w * aspect)
        assert abs(scale[0] - shape * scale[1]) <= max(1, shape)  # even rounding moves a side by one pixel at most
    if mode == "pad":
        assert (bh, bw) == (scale[1], scale[0])


def test_edges_are_repeated() -> None:
    f = fit(320, 240, (128, 176))
    plane = np.arange(170, dtype=np.uint8)[None].repeat(128, 0)
    out = f.lay((plane, plane // 2, 255 - plane))
    assert out.shape == (128, 176, 3) and out.dtype == np.uint8
    assert (out[:, 2:172, 0] == plane).all() and (out[:, 2:172, 2] == 255 - plane).all()
    assert (out[:, :2, 0] == 0).all() and (out[:, 172:, 0] == 169).all() and (out[:, 172:, 1] == 84).all()
    f = fit(1920, 1080, (128, 176), mode="pad")
    plane = np.arange(100, dtype=np.uint8)[:, None].repeat(176, 1)
    out = f.lay((plane, plane, plane))
    assert (out[:14] == 0).all() and (out[114:] == 99).all() and (out[14:114, :, 1] == plane).all()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
def test_all_eight_turns(transpose, flip_x, flip_y) -> None:
    """The matrix's own arithmetic, point by point, is the judge."""
    a, b, c, d = (0, ONE, ONE, 0) if transpose else (ONE, 0, 0, ONE)
    a, c = (-a, -c) if flip_x else (a, c)
    b, d = (-b, -d) if flip_y else (b, d)
    turn = turn_of([a, b, 0, c, d, 0, 0, 0, 1 << 30])
    assert turn == (transpose, flip_x, flip_y)
    assert turn_of(np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], "<i4").tobytes()) == turn
    f = fit(32, 32, (32, 32), turn=turn)
    plane = np.arange(1024).reshape(32, 32).astype(np.uint8)
    plane[0, 0] = 7
    out = f.lay((plane, plane, plane))[..., 0]
    for p, q in ((0, 0), (31, 0), (5, 9), (20, 31)):
        px, py = p - 15.5, q - 15.5
        x, y = (a * px + c * py) / ONE + 15.5, (b * px + d * py) / ONE + 15.5
        assert out[int(y), int(x)] == plane[q, p]


def test_damaged_matrices_are_no_turn() -> None:
    assert turn_of(None) == turn_of([0] * 9) == turn_of(b"short") == (False, False, False)
    assert turn_of([ONE, ONE, 0, ONE, ONE, 0, 0, 0, 1 << 30]) == (False, False, False)
    with pytest.raises(UsageError):
        turn_of([1, 2, 3])


@pytest.mark.parametrize("bad", [(0, 10, 1), (10, 0, 1), (10, 10, 0), (10, 10, -1)])
def test_empty_pictures_are_refused(bad) -> None:
    with pytest.raises(UsageError):
        fit(bad[0], bad[1], (128, 176), aspect=Fraction(bad[2]))
