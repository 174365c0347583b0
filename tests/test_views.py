"""avstore.views: the second sound of a video lies at least a window away from the first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore import draws
from avstore.errors import UsageError
from avstore.views import ShiftedSound
from avstore.windows import Extents


def cut(policy, picture, start, end, n=64, length=(8, 10)):
    extents = Extents(np.full(n, picture), np.full(n, start), np.full(n, end))
    u = draws.uniform(5, "window", 0, np.arange(n), 0, policy.numbers)
    return policy.starts(extents, u, np.zeros(n, np.int64), *length)


def test_by_hand():
    # pictures 0..100, sound 0..100, both windows 10 long: the first starts in 0..90, the second at least 10 away
    policy = ShiftedSound()
    u = np.array([[0.5, 0.0], [0.5, 0.999999], [0.0, 0.0], [0.999999, 0.0]])
    found = policy.starts(Extents(np.full(4, 100), np.zeros(4), np.full(4, 100)), u, np.zeros(4, np.int64), 10, 10)
    assert found.picture.tolist() == [[45, 45], [45, 45], [0, 0], [90, 90]]
    assert found.sound.tolist() == [[45, 0], [45, 90], [0, 10], [90, 0]]
    assert not found.shrunk.any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 100), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40),
       st.integers(0, 60))  # fmt: skip
def test_always_inside_and_apart(picture, start, long, clip, sound, gap):
    found = cut(ShiftedSound(gap), picture, start, start + long, length=(clip, sound))
    first, second = found.sound.T
    assert (found.picture[:, 0] == found.picture[:, 1]).all()
    assert (second >= start).all() and (second + sound <= max(start + long, start + sound)).all()
    apart = np.abs(second - first) >= (gap or sound)
    assert (apart | found.shrunk).all() and not (apart & found.shrunk).any()


def test_uniform_over_both_sides():
    found = cut(ShiftedSound(), 1000, 0, 1000, n=20000)
    far = np.abs(found.sound[:, 1] - found.sound[:, 0])
    assert far.min() >= 10 and (found.sound[:, 1] < found.sound[:, 0]).mean() == pytest.approx(0.5, abs=0.02)
    middle = np.abs(found.sound[:, 0] - 500) < 50
    assert np.abs(found.sound[middle, 1] - 500).mean() == pytest.approx(250, rel=0.1)


def test_a_video_too_short_is_told():
    found = cut(ShiftedSound(), 15, 0, 15)
    assert found.shrunk.all() and (found.sound[:, 1] <= 5).all()
    with pytest.raises(UsageError):
        ShiftedSound(-1)
