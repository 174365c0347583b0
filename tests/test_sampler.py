"""avstore.sampler: each pair once, one order for any number of processes, distinct batches, resume by a counter."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore import draws
from avstore.errors import UsageError
from avstore.sampler import Order, SequentialOrder, permutation


def epoch_of(order, epoch):
    return [tuple(p) for p in np.stack(order.pairs(epoch, 0, order.length), -1).tolist()]


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_permutation_is_one(n, seed):
    keys = draws.bits(seed, "order", 0, 0, 0, 6)
    assert np.array_equal(np.sort(permutation(keys, n, np.arange(n))), np.arange(n))


def test_permutation_of_a_billion_needs_no_memory():
    n, keys = 10**9 + 7, draws.bits(0, "order", 0, 0, 0, 6)
    some = permutation(keys, n, np.arange(n - 50000, n))
    assert some.min() >= 0 and some.max() < n and len(np.unique(some)) == 50000
    assert abs(some.mean() / n - 0.5) < 0.01


@pytest.mark.parametrize("n", [2, 5, 12, 50, 257])
def test_positions_are_uniform(n):
    seeds = 1500 if n < 100 else 400
    table = np.stack([permutation(draws.bits(s, "order", 0, 0, 0, 6), n, np.arange(n)) for s in range(seeds)])
    counts = np.stack([np.bincount(table[:, p], minlength=n) for p in range(n)])
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    freedom = (n - 1) ** 2
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 8  # four deviations of the chi-square's normal limit


def test_small_permutations_all_occur_equally():
    seen = [tuple(permutation(draws.bits(s, "order", 0, 0, 0, 6), 4, np.arange(4))) for s in range(4800)]
    counts = np.array([seen.count(p) for p in itertools.permutations(range(4))])
    assert ((counts - 200) ** 2 / 200).sum() < 56  # 23 degrees of freedom: p = 1e-4


@settings(deadline=None)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 7),
    batch=st.integers(1, 20),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 5),
    distinct=st.booleans(),
)
def test_each_pair_once_per_epoch(n, k, batch, seed, epoch, distinct):
    batch = min(batch, n) if distinct else batch
    order = Order(n, k, seed=seed, batch_size=batch, distinct=distinct)
    pairs = [p for i in range(order.batches) for p in zip(*(x.tolist() for x in take(order, epoch, i)), strict=True)]
    assert sorted(pairs) == [(v, d) for v in range(n) for d in range(k)]
    assert pairs == epoch_of(order, epoch)
    if distinct:
        for i in range(order.batches):
            rows = order.batch(epoch, i).rows
            assert len(np.unique(rows)) == len(rows)


def take(order, epoch, index):
    batch = order.batch(epoch, index)
    return batch.rows, batch.draws


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_global_order_does_not_depend_on_the_world(distinct, drop_last):
    def merged(world):
        ranks = [
            Order(101, 3, seed=5, batch_size=16, drop_last=drop_last, world=world, rank=r, distinct=distinct)
            for r in range(world)
        ]
        steps = 2 * ranks[0].batches
        return [
            [tuple(p) for o in ranks for p in np.stack([o.at(s).rows, o.at(s).draws], -1).tolist()]
            for s in range(steps)
        ]

    alone = merged(1)
    assert len(alone) == 2 * (18 if drop_last else 19)
    assert alone[:19] != alone[19:]  # another epoch, another order
    for world in (2, 4, 8):
        assert merged(world) == alone


def test_ranks_get_equal_shares_of_full_batches():
    sizes = [
        [len(Order(50, seed=0, batch_size=16, world=8, rank=r).batch(0, i).rows) for r in range(8)] for i in range(4)
    ]
    assert sizes[:3] == [[2] * 8] * 3
    assert sum(sizes[3]) == 2 and max(sizes[3]) == 1  # 50 = 3 * 16 + 2: six ranks have none
    last = Order(50, seed=0, batch_size=16, world=8, rank=7).batch(0, 3)
    assert last.total == 2 and last.first == 49


def test_resume_in_mid_epoch_with_another_world():
    whole = Order(37, 4, seed=3, batch_size=8, distinct=True)
    steps = 3 * whole.batches
    expected = [tuple(p) for s in range(steps) for p in np.stack([whole.at(s).rows, whole.at(s).draws], -1).tolist()]
    got, step = [], 0
    for world, until in ((1, 7), (4, 30), (2, steps)):  # stopped twice, each time gone on with other processes
        ranks = [Order(37, 4, seed=3, batch_size=8, distinct=True, world=world, rank=r) for r in range(world)]
        while step < until:
            got += [tuple(p) for o in ranks for p in np.stack([o.at(step).rows, o.at(step).draws], -1).tolist()]
            step += 1
    assert got == expected


def test_distinct_differs_from_plain_passes_only_at_the_seams():
    order = Order(1000, 3, seed=1, batch_size=64, distinct=True)
    rows, passes = order.pairs(0, 0, 3000)
    for p in range(3):
        plain = permutation(draws.bits(1, "order", 0, 0, p + 1, 6), 1000, np.arange(1000))
        mine = rows[passes == p]
        assert np.array_equal(mine[64:], plain[64:])
        assert np.array_equal(np.sort(mine[:64]), np.sort(plain[:64]))


def test_evaluation_is_sequential_and_drops_nothing():
    ranks = [SequentialOrder(5, 3, batch_size=4, world=2, rank=r) for r in range(2)]
    assert ranks[0].batches == 4
    pairs = [p for i in range(4) for o in ranks for p in zip(*(x.tolist() for x in take(o, 0, i)), strict=True)]
    assert pairs == [(v, d) for v in range(5) for d in range(3)]


def test_misuse_is_refused():
    with pytest.raises(UsageError, match="multiple of 3"):
        Order(10, seed=0, batch_size=8, world=3)
    with pytest.raises(UsageError, match="at most 10"):
        Order(10, seed=0, batch_size=16, distinct=True)
    with pytest.raises(UsageError, match="no batch of 16"):
        Order(10, seed=0, batch_size=16, drop_last=True)
    for wrong in ({"n_videos": 0}, {"draws": 0}, {"batch_size": 0}, {"rank": 1}):
        with pytest.raises(UsageError):
            Order(**{"n_videos": 10, "draws": 1, "seed": 0, "batch_size": 2, **wrong})
    order = Order(10, seed=0, batch_size=4)
    for call in (lambda: order.batch(0, 3), lambda: order.at(-1), lambda: order.pairs(0, 5, 11)):
        with pytest.raises(UsageError):
            call()


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 90), k=st.integers(1, 4), per=st.integers(1, 6), world=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99), epoch=st.integers(0, 3), distinct=st.booleans(), data=st.data(),
)  # fmt: skip
def test_a_run_of_batches_is_those_batches(n, k, per, world, seed, epoch, distinct, data):
    batch = per * world
    n = max(n, batch) if distinct else n
    for rank in {0, world - 1}:
        order = Order(n, k, seed=seed, batch_size=batch, world=world, rank=rank, distinct=distinct)
        first = data.draw(st.integers(0, order.batches - 1))
        last = data.draw(st.integers(first + 1, order.batches))
        for b, one in zip(order.run(epoch, first, last), range(first, last), strict=True):
            start = one * batch
            total = min(batch, order.length - start)
            cut = [start + r * total // world for r in (rank, rank + 1)]
            rows, which = order.pairs(epoch, *cut)
            assert (b.epoch, b.index, b.first, b.total) == (epoch, one, cut[0], total)
            assert b.rows.tolist() == rows.tolist() and b.draws.tolist() == which.tolist()
    for wrong in ((0, 0), (-1, 1), (0, order.batches + 1)):
        with pytest.raises(UsageError, match="no batch"):
            order.run(epoch, *wrong)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(8, 200), k=st.integers(1, 4), seed=st.integers(0, 99), epoch=st.integers(0, 3),
    worlds=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])), distinct=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_the_remainder_is_the_same_after_a_changed_world_at_any_step(n, k, seed, epoch, worlds, distinct, data):
    def whole(world, steps):
        orders = [Order(n, k, seed=seed, batch_size=8, world=world, rank=r, distinct=distinct) for r in range(world)]
        return [[p for o in orders for p in zip(o.at(s).rows.tolist(), o.at(s).draws.tolist(), strict=True)]
                for s in steps]  # fmt: skip

    batches = Order(n, k, seed=seed, batch_size=8, distinct=distinct).batches
    start = epoch * batches
    stop = data.draw(st.integers(start, start + batches))
    told = whole(worlds[0], range(start, stop)) + whole(worlds[1], range(stop, start + batches))
    assert told == whole(1, range(start, start + batches))
    assert sorted(p for b in told for p in b) == [(v, d) for v in range(n) for d in range(k)]
    if distinct:
        assert all(len({v for v, _ in b}) == len(b) for b in told)


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("distinct", [False, True])
def test_an_epoch_of_a_hundred_million_pairs_takes_no_memory(world, distinct):
    order = Order(10**8, 3, seed=1, batch_size=256, world=world, rank=world - 1, distinct=distinct)
    order.at(0)
    tracemalloc.start()
    try:
        seen = [order.at(s) for s in (0, 12345, order.batches - 1, order.batches + 7)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 and all(len(b.rows) == 256 // world for b in seen[:2])
    assert len({v for b in seen for v in b.rows.tolist()}) > 3 * 256 // world - 5  # no row again and again
