"""avstore.draws: the published definition, streams that never meet, uniformity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avstore import draws
from avstore.errors import UsageError

WORD = 2**64


def mix(x: int) -> int:
    """The definition again, in Python's unbounded integers."""
    z = (x + 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def test_mix_is_splitmix64():
    # the first outputs of splitmix64 seeded with 0, as published with xoshiro's reference code
    state, published = 0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for expected in published:
        assert int(draws.mix(np.array([state], np.uint64))[0]) == expected
        state = (state + 0x9E3779B97F4A7C15) % WORD


@given(
    seed=st.integers(-(2**70), 2**70),
    stream=st.sampled_from(sorted(draws.STREAMS)),
    epoch=st.integers(0, 10**6),
    video=st.integers(0, 2**40),
    draw=st.integers(0, 10**6),
)
def test_bits_follow_the_definition(seed, stream, epoch, video, draw):
    h = mix(seed % WORD)
    for number in (draws.STREAMS[stream], epoch, video, draw):
        h = mix((h + number) % WORD)
    expected = [mix((h + i) % WORD) for i in range(3)]
    assert draws.bits(seed, stream, epoch, video, draw, 3).tolist() == expected
    assert draws.uniform(seed, stream, epoch, video, draw, 3).tolist() == [(b >> 11) / 2**53 for b in expected]


def test_arrays_broadcast_and_equal_single_calls():
    videos, clips = np.arange(5)[:, None], np.arange(3)
    table = draws.bits(7, "augment", 2, videos, clips, 4)
    assert table.shape == (5, 3, 4) and table.dtype == np.uint64
    for v in range(5):
        for d in range(3):
            assert np.array_equal(table[v, d], draws.bits(7, "augment", 2, v, d, 4))
    assert np.array_equal(table[..., :2], draws.bits(7, "augment", 2, videos.astype(np.int32), clips, 2))
    assert draws.bits(7, "augment", 2, np.empty(0, np.int64), 0, 4).shape == (0, 4)


def test_every_part_of_the_key_matters():
    base = {"seed": 1, "stream": "order", "epoch": 2, "video": 3, "draw": 4}
    changed = [{**base, "stream": "window"}] + [{**base, k: base[k] + 1} for k in ("seed", "epoch", "video", "draw")]
    values = {int(draws.bits(**key)[0]) for key in [base, *changed]}
    assert len(values) == 6
    assert len(set(draws.STREAMS.values())) == len(draws.STREAMS)


def test_uniform_is_uniform():
    u = draws.uniform(0, "window", 0, np.arange(20000), 0, 5)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 100, (0, 1))[0]
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 160  # chi-square, 99 degrees of freedom: p = 1e-4
    assert abs(np.corrcoef(u.T)[np.triu_indices(5, 1)]).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


def test_integers_reach_both_ends_and_no_further():
    edges = np.array([0.0, 0.5, np.nextafter(1, 0)])
    assert draws.integers(edges, 3, 6).tolist() == [3, 5, 6]
    assert draws.integers(edges, -2, -2).tolist() == [-2, -2, -2]
    assert draws.integers(edges, 0, np.array([0, 9, 2**52])).tolist() == [0, 5, 2**52]
    with pytest.raises(UsageError, match="empty range"):
        draws.integers(edges, 1, 0)


def test_misuse_is_refused():
    with pytest.raises(UsageError, match=r"did you mean augment"):
        draws.bits(0, "augmnt", 0, 0, 0)
    with pytest.raises(UsageError, match="negative"):
        draws.bits(0, "order", 0, -1, 0)
    with pytest.raises(UsageError, match="integer"):
        draws.bits(0, "order", 0, 1.5, 0)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        draws.bits(0, "order", 0, 0, 0, -1)
