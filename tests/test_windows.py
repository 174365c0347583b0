"""avstore.windows: exact arithmetic, AVID's and CrissCross' windows, and videos that are too short."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore import draws, windows
from avstore.errors import UsageError
from avstore.windows import Extents

SR = 24000
RATES = [1, 8, 12, 15, 16, 24, 25, 30, Fraction(30000, 1001), Fraction(24000, 1001), 60]


def u_of(n, k, draw=0):
    return draws.uniform(0, "window", 0, np.arange(n), draw, k)


def whole(seconds, n):
    length = np.full(n, seconds * SR)
    return Extents(length, np.zeros(n), length)


@settings(max_examples=300)
@given(
    offset=st.integers(0, 12 * 3600 * 192000),
    n=st.integers(1, 64),
    rates=st.tuples(st.sampled_from(RATES), st.sampled_from(RATES)).filter(lambda r: r[0] <= r[1]),
    sample_rate=st.sampled_from([8000, 22050, 24000, 44100, 48000, 192000]),
)
def test_frame_rows_equal_fractions(offset, n, rates, sample_rate):
    fps, tape = rates
    expected = [math.floor((Fraction(offset, sample_rate) + k / Fraction(fps)) * tape) for k in range(n)]
    assert windows.frame_rows(offset, n, fps, tape, sample_rate).tolist() == expected
    assert windows.frame_rows(np.array([0, offset]), n, fps, tape, sample_rate)[1].tolist() == expected


def test_frame_rows_by_hand():
    # 16 fps from a 25-fps tape, from 0.1 s on: (0.1 + k / 16) * 25 = 2.5, 4.0625, 5.625, 7.1875
    assert windows.frame_rows(2400, 4, 16, 25, SR).tolist() == [2, 4, 5, 7]
    assert windows.frame_rows(1500, 3, 16, 16, SR).tolist() == [1, 2, 3]
    assert windows.frame_rows(1499, 3, 16, 16, SR).tolist() == [0, 1, 2]
    assert windows.frame_rows([0, 0], 6, 16, 16, SR, frames=[4, 1]).tolist() == [[0, 1, 2, 3, 0, 1], [0] * 6]


def test_a_clip_faster_than_the_tape_is_refused():
    with pytest.raises(UsageError, match="--fps 30"):
        windows.frame_rows(0, 8, Fraction(30000, 1001), 16, SR)
    with pytest.raises(UsageError):
        windows.frame_rows(-1, 8, 16, 16, SR)
    with pytest.raises(UsageError):
        windows.frame_rows(0, 0, 16, 16, SR)


def test_lengths():
    assert windows.to_samples(0.5, SR) == 12000
    assert windows.to_samples(0.1, 44100) == 4410
    assert windows.to_samples(Fraction(1, 3), SR) == 8000
    assert windows.clip_samples(8, 16, SR) == 12000
    assert windows.clip_samples(1, Fraction(30000, 1001), SR) == 801  # 800.8
    assert windows.picture_samples([0, 1, 160], 16, SR).tolist() == [0, 1500, 240000]
    assert windows.spectrogram_row([0, 239, 240, 24000], 100, SR).tolist() == [0, 0, 1, 100]
    assert windows.valid([0, 10, 50], 20, [15, 40, 40]).tolist() == [15, 20, 0]


def test_uniform_windows_reach_both_ends():
    starts = windows.uniform_windows([10 * SR, SR], 2 * SR, 10)
    assert starts[0, 0] == 0 and starts[0, -1] == 8 * SR
    assert np.ptp(np.diff(starts[0])) <= 1
    assert starts[1].tolist() == [0] * 10  # shorter than the window, and still ten
    assert windows.uniform_windows([10 * SR], 2 * SR, 1).tolist() == [[4 * SR]]
    assert windows.centre_window([10 * SR, 1], 2 * SR).tolist() == [4 * SR, 0]


def test_avid_windows_keep_their_bounds_and_fill_them():
    n, picture, sound, jitter = 20000, SR // 2, 2 * SR, SR // 2
    w = windows.avid_windows(whole(10, n), u_of(n, 2), picture, sound, jitter)
    assert w.sound.min() >= 0 and w.sound.max() <= 8 * SR
    assert w.picture.min() >= 0 and w.picture.max() <= 10 * SR - picture
    lead = w.picture - w.sound
    assert lead.min() >= -jitter and lead.max() <= sound + jitter - picture
    inner = (w.sound > jitter) & (w.sound < 7 * SR)  # where the video's ends cut nothing off
    for values, low, high in ((w.sound, 0, 8 * SR), (lead[inner], -jitter, sound)):
        counts = np.histogram(values, 20, (low, high))[0]
        expected = len(values) / 20
        assert ((counts - expected) ** 2 / expected).sum() < 50  # 19 degrees of freedom: p = 1e-4


def test_avid_windows_of_difficult_videos():
    pictures = np.array([SR, 10 * SR, 10 * SR, 0, 3 * SR, 10 * SR])
    start = np.array([0, 4 * SR, 0, 0, 0, 9 * SR])
    end = np.array([SR, 5 * SR, 0, 10 * SR, 10 * SR, 30 * SR])
    for draw in range(50):
        w = windows.avid_windows(Extents(pictures, start, end), u_of(6, 2, draw), SR // 2, 2 * SR, SR // 2)
        assert w.sound[0] == 0 and 0 <= w.picture[0] <= SR // 2  # all shorter than the sound window
        assert w.sound[1] == 4 * SR and 3.5 * SR <= w.picture[1] <= 6 * SR  # sound shorter than its window
        assert 0 <= w.sound[2] <= 8 * SR  # no sound: cut where the pictures are
        assert 0 <= w.sound[3] <= 8 * SR  # no pictures: cut where the sound is
        assert 0 <= w.sound[4] <= SR and w.picture[4] <= 2.5 * SR  # sound goes on after the last picture
        assert w.sound[5] == 9 * SR and 8.5 * SR <= w.picture[5] <= 9.5 * SR


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("relaxation", sorted(windows.RELAXATIONS))
def test_two_views_stay_inside(relaxation, loose):
    rng = np.random.default_rng(0)
    n = 3000
    length = rng.integers(1, 12 * SR, n)
    start = rng.integers(0, SR, n)
    w = windows.two_views(Extents(length, start, length), u_of(n, 5), SR // 2, 2 * SR, relaxation, loose)
    assert w.picture.shape == w.sound.shape == (n, 2)
    long = length - start >= 2 * SR
    assert (w.sound[long] >= start[long, None]).all() and (w.sound[long] + 2 * SR <= length[long, None]).all()
    enough = length >= SR // 2
    assert (w.picture >= 0).all() and (w.picture[enough] + SR // 2 <= length[enough, None]).all()
    assert (w.picture[~enough] == 0).all()


@pytest.mark.parametrize(("relaxation", "gap"), [("none", 0), ("mild", SR), ("medium", 2 * SR)])
def test_fixed_gaps(relaxation, gap):
    n = 2000
    w = windows.two_views(whole(10, n), u_of(n, 5), SR // 2, 2 * SR, relaxation)
    assert (np.diff(w.sound) == gap).all() and (np.diff(w.picture) == gap).all() and not w.shrunk.any()
    assert (w.picture >= w.sound).all() and (w.picture + SR // 2 <= w.sound + 2 * SR).all()  # picture within its sound
    assert w.sound[:, 0].min() < 0.1 * SR and w.sound[:, 1].max() > 7.9 * SR
    assert np.ptp(w.picture - w.sound) > 1.4 * SR
    loose = windows.two_views(whole(10, n), u_of(n, 5), SR // 2, 2 * SR, relaxation, loose=True)
    assert (np.diff(loose.sound) == gap).all() and (np.diff(loose.picture) == gap // 4).all()
    if relaxation == "mild":  # "v1 lies fully inside a1 in only 2/3 of draws"
        inside = (loose.picture[:, 0] >= loose.sound[:, 0]) & (
            loose.picture[:, 0] + SR // 2 <= loose.sound[:, 0] + 2 * SR
        )
        assert abs(inside.mean() - 2 / 3) < 0.04


def test_extreme_takes_disjoint_halves():
    n = 3000
    w = windows.two_views(whole(10, n), u_of(n, 5), SR // 2, 2 * SR, "extreme")
    assert (w.sound[:, 0] + 2 * SR <= 5 * SR).all() and (w.sound[:, 1] >= 5 * SR).all()
    assert (w.picture[:, 0] + SR // 2 <= 5 * SR).all() and (w.picture[:, 1] >= 5 * SR).all()
    coded = windows.two_views(whole(10, n), u_of(n, 5), SR // 2, 2 * SR, "extreme", loose=True)
    assert (np.diff(coded.sound) == 3 * SR).all() and coded.sound[
        :, 0
    ].max() <= 3 * SR  # methods.md 3.5: [0, 3] and + 3
    assert np.array_equal(coded.sound, coded.picture)


def test_one_sided_relaxations():
    for moved in ("picture", "sound"):
        name = {"picture": "extreme-video", "sound": "extreme-audio"}[moved]
        w = windows.two_views(whole(10, 500), u_of(500, 5), SR // 2, 2 * SR, name)
        still = w.sound if moved == "picture" else w.picture
        assert (np.diff(still) == 0).all()
        assert (np.diff(getattr(w, moved)) > 0).all()
        # the code takes view 1's or view 2's, by a coin: first and second half alike
        first, second = still[:, 0] + 2 * SR <= 5 * SR, still[:, 0] >= 5 * SR
        if moved == "sound":
            first = still[:, 0] + SR // 2 <= 5 * SR
        assert (first | second).all() and 0.42 < second.mean() < 0.58
        both = windows.two_views(whole(10, 500), u_of(500, 5), SR // 2, 2 * SR, "extreme")
        before = both.sound if moved == "picture" else both.picture
        assert (still[:, 0] == np.where(second, before[:, 1], before[:, 0])).all()


def test_mixed_views_are_independent():
    w = windows.two_views(whole(10, 5000), u_of(5000, 5), SR // 2, 2 * SR, "mixed")
    assert abs(np.corrcoef(w.sound.T)[0, 1]) < 0.05 and not w.shrunk.any()


def test_the_gap_shrinks_first():
    length = np.array([2, 3, 4, 1]) * SR
    extents = Extents(length, np.zeros(4), length)
    medium = windows.two_views(extents, u_of(4, 5), SR // 2, 2 * SR, "medium")
    assert np.diff(medium.sound)[:, 0].tolist() == [0, SR, 2 * SR, 0]
    assert medium.shrunk.tolist() == [True, True, False, True]
    extreme = windows.two_views(extents, u_of(4, 5), SR // 2, 2 * SR, "extreme")
    assert extreme.shrunk.tolist() == [True, True, False, True]
    assert extreme.sound.tolist() == [[0, 0], [0, SR], [0, 2 * SR], [0, 0]]
    assert not windows.two_views(extents, u_of(4, 5), SR // 2, 2 * SR, "none").shrunk.any()


def test_snippets():
    w = windows.snippets(whole(10, 3), 5, 2 * SR, SR // 2, 2 * SR)
    assert w.sound[0].tolist() == [0, 2 * SR, 4 * SR, 6 * SR, 8 * SR] and not w.shrunk.any()
    assert (w.picture - w.sound == 3 * SR // 4).all()  # in the middle of the sound
    short = windows.snippets(whole(6, 1), 5, 2 * SR, SR // 2, 2 * SR)
    assert short.sound[0].tolist() == [0, SR, 2 * SR, 3 * SR, 4 * SR] and short.shrunk.all()
    tiny = windows.snippets(whole(1, 1), 5, 2 * SR, SR // 2, 2 * SR)
    assert tiny.sound.tolist() == [[0] * 5] and tiny.shrunk.all() and (tiny.picture <= SR // 2).all()
    random = windows.snippets(whole(20, 2000), 5, 2 * SR, SR // 2, 2 * SR, u_of(2000, 1))
    assert random.sound[:, 0].min() < 0.1 * SR and random.sound[:, -1].max() > 17.9 * SR
    one = windows.snippets(whole(10, 1), 1, 0, SR // 2, 2 * SR)
    assert one.sound.tolist() == [[4 * SR]] and not one.shrunk.any()


def test_misuse_is_refused():
    with pytest.raises(UsageError, match="did you mean mild"):
        windows.two_views(whole(10, 1), u_of(1, 5), 1, 1, "mildd")
    with pytest.raises(UsageError):
        windows.avid_windows(whole(10, 1), np.ones((1, 2)), 1, 1, 0)
    with pytest.raises(UsageError):
        windows.uniform_windows([1], 1, 0)
    with pytest.raises(UsageError):
        windows.centre_window([1], 0)
    with pytest.raises(UsageError):
        Extents(np.array([-1]), np.array([0]), np.array([0]))
