"""The order in which an epoch visits its (video, draw) pairs: a pure function of (seed, epoch), whatever the world.

An epoch has n_videos * draws pairs. `Order` permutes them with a keyed permutation that takes no memory (a Feistel
network with cycle walking), cuts the result into global batches, and gives each process its slice of a batch. The only
state is a counter of global steps: to resume is to go on counting, with any number of processes that divides the batch.
`SequentialOrder` is evaluation's: every pair once, in order. No torch, no data: rows are places in the run's selection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avstore import draws as _draws
from avstore.errors import UsageError

_ROUNDS = 6  # 4 make a Feistel network of random functions a strong permutation (Luby, Rackoff 1988); 2 to spare
_SMALL = (
    256  # up to here a permutation is written out: the halves of small networks hold too few functions to look random
)

Indices = NDArray[np.int64]


def permutation(keys: NDArray[np.uint64], n: int, positions: Indices) -> Indices:
    """Entries `positions` of a random permutation of 0 .. n-1, without the permutation.

    keys: `_ROUNDS` uint64 from `draws.bits`; positions: int64 in [0, n), any shape. Returns int64 of the same shape.
    Cost per entry is constant (cycle walking: fewer than 4 rounds of the network expected).
    """
    if n <= _SMALL:
        order = np.argsort(_draws.mix(keys[0] ^ np.arange(n, dtype=np.uint64)))  # mix is one to one: no ties
        return order.astype(np.int64)[positions]
    half = ((n - 1).bit_length() + 1) // 2
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    flat = positions.reshape(-1).astype(np.uint64)
    todo = np.arange(flat.size)
    while todo.size:
        value = flat[todo]
        left, right = value >> shift, value & low
        for key in keys[:_ROUNDS]:
            left, right = right, left ^ (_draws.mix(right ^ key) & low)
        flat[todo] = (left << shift) | right
        todo = todo[flat[todo] >= n]  # outside: walk on along the cycle, which leads back inside
    return flat.astype(np.int64).reshape(positions.shape)


@dataclass(frozen=True)
class Batch:
    """This process' slice of one global batch. rows, draws: int64 (B,), maybe empty."""

    epoch: int
    index: int  # of the global batch in its epoch
    rows: Indices
    draws: Indices
    first: int  # position in the epoch of the first pair of this slice
    total: int  # pairs in the global batch, over all processes


class _Batches:
    """What both orders share: an epoch of `length` positions cut into global batches, and those into ranks' slices."""

    def __init__(self, n_videos: int, draws: int, batch_size: int, drop_last: bool, world: int, rank: int) -> None:
        for name, value in (("n_videos", n_videos), ("draws", draws), ("batch_size", batch_size), ("world", world)):
            if value < 1:
                raise UsageError(f"{name} is {value}", "an order needs at least 1")
        if not 0 <= rank < world:
            raise UsageError(f"rank {rank} of {world} processes", "ranks run from 0 to world - 1")
        if batch_size % world:
            raise UsageError(
                f"a global batch of {batch_size} does not divide over {world} processes",
                "every process takes an equal share, so that results do not depend on their number",
                f"use a batch size that is a multiple of {world}, or another number of processes",
            )
        self.n_videos, self.draws, self.batch_size = n_videos, draws, batch_size
        self.drop_last, self.world, self.rank = drop_last, world, rank
        self.length = n_videos * draws
        if self.length > 2**48:
            raise UsageError(f"an epoch of {self.length} clips", "orders hold up to 2**48")
        full, rest = divmod(self.length, batch_size)
        self.batches = full if drop_last or not rest else full + 1
        if not self.batches:
            raise UsageError(
                f"{self.length} clips make no batch of {batch_size}",
                "the last short batch is dropped, and it is the only one",
                "use a smaller batch, more videos, or keep the last batch",
            )

    def pairs(self, epoch: int, start: int, stop: int) -> tuple[Indices, Indices]:
        """Positions start .. stop-1 of an epoch -> (rows, draws), int64 each. Does not depend on world or rank.
        UsageError outside 0 .. length."""
        if not 0 <= start <= stop <= self.length:
            raise UsageError(f"positions {start} to {stop} of an epoch of {self.length} clips", "out of range")
        return self._at(epoch, np.arange(start, stop, dtype=np.int64))

    def _at(self, epoch: int, positions: Indices) -> tuple[Indices, Indices]:
        raise NotImplementedError

    def batch(self, epoch: int, index: int) -> Batch:
        """This rank's slice of global batch `index`. Slices are consecutive and differ by at most one clip; only a
        short last batch may leave a rank with none. Raises UsageError outside 0 .. batches-1."""
        return self.run(epoch, index, index + 1)[0]

    def run(self, epoch: int, first: int, last: int) -> list[Batch]:
        """`batch` for the global batches first .. last-1 of one epoch, in one call: NumPy's cost is paid once."""
        if not 0 <= first < last <= self.batches or epoch < 0:
            raise UsageError(
                f"no batch {first if first < 0 or last <= first else last - 1} in epoch {epoch}",
                f"an epoch has batches 0 to {self.batches - 1}",
            )
        starts = np.arange(first, last, dtype=np.int64) * self.batch_size
        totals = np.minimum(self.batch_size, self.length - starts)
        begins = starts + self.rank * totals // self.world
        counts = starts + (self.rank + 1) * totals // self.world - begins
        ends = np.cumsum(counts)
        if self.world == 1:  # without gaps
            rows, draws = self.pairs(epoch, int(begins[0]), int(begins[0] + ends[-1]))
        else:
            within = np.arange(int(ends[-1]), dtype=np.int64) - np.repeat(ends - counts, counts)
            rows, draws = self._at(epoch, np.repeat(begins, counts) + within)
        each = zip(begins.tolist(), totals.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        return [Batch(epoch, first + i, rows[a:b], draws[a:b], begin, total)
                for i, (begin, total, a, b) in enumerate(each)]  # fmt: skip

    def locate(self, step: int) -> tuple[int, int]:
        """Global step (counted over all epochs) -> (epoch, batch in it). This counter is all a checkpoint needs."""
        if step < 0:
            raise UsageError(f"step {step}", "steps are counted from 0")
        return divmod(step, self.batches)

    def at(self, step: int) -> Batch:
        """This rank's slice at a global step."""
        return self.batch(*self.locate(step))


class Order(_Batches):
    """Training's order.

    n_videos: videos of the selection; draws: clips of each per epoch (AVID's "clips per video"); batch_size: global.
    drop_last: leave out the last short global batch. distinct: no two clips of one video in a global batch, as a memory
    bank wants it: the epoch is then `draws` passes over all videos, each in an order of its own, and where a batch
    begins in one pass and ends in the next, videos of the next pass that the batch already has change places with
    those that follow. Needs n_videos >= batch_size.
    """

    def __init__(
        self,
        n_videos: int,
        draws: int = 1,
        *,
        seed: int,
        batch_size: int,
        drop_last: bool = False,
        world: int = 1,
        rank: int = 0,
        distinct: bool = False,
    ) -> None:
        super().__init__(n_videos, draws, batch_size, drop_last, world, rank)
        if distinct and n_videos < batch_size:
            raise UsageError(
                f"{n_videos} videos cannot fill a batch of {batch_size} with distinct videos",
                "no two clips of a batch may come from one video",
                f"use a batch size of at most {n_videos}, or allow repeats",
            )
        self.seed, self.distinct = seed, distinct

    def _at(self, epoch: int, positions: Indices) -> tuple[Indices, Indices]:
        if not self.distinct:
            keys = _draws.bits(self.seed, "order", epoch, 0, 0, _ROUNDS)
            rows, draws = np.divmod(permutation(keys, self.length, positions), self.draws)
            return rows, draws
        passes, places = np.divmod(positions, self.n_videos)
        rows = np.empty_like(positions)
        for p in np.unique(passes):
            here = passes == p
            rows[here] = self._pass(epoch, int(p), places[here])
        return rows, passes

    def _pass(self, epoch: int, p: int, places: Indices) -> Indices:
        """Videos at `places` of pass p. Only its first batch_size places can differ from the plain permutation."""
        # draw 0 is the plain order's; pass p's keys are p + 1, so that the two never share a key
        keys = _draws.bits(self.seed, "order", epoch, 0, p + 1, _ROUNDS)
        rows = permutation(keys, self.n_videos, places)
        straddle = p * self.n_videos % self.batch_size  # places of the batch that the pass before has filled
        if not straddle or not places.size or int(places.min()) >= self.batch_size:
            return rows
        before = self._pass(epoch, p - 1, np.arange(self.n_videos - straddle, self.n_videos, dtype=np.int64))
        head = permutation(keys, self.n_videos, np.arange(self.batch_size, dtype=np.int64))
        taken = np.isin(head, before)
        need = self.batch_size - straddle  # the places that share a batch with `before`
        # at most `straddle` of the first batch_size are taken, so those after `need` hold a free one for each clash
        clash = np.flatnonzero(taken[:need])
        free = need + np.flatnonzero(~taken[need:])[: clash.size]
        head[clash], head[free] = head[free], head[clash]
        inside = places < self.batch_size
        rows[inside] = head[places[inside]]
        return rows


class SequentialOrder(_Batches):
    """Evaluation's order: row 0 with all its draws (windows), then row 1, ...; drops nothing, epochs are all alike."""

    def __init__(self, n_videos: int, draws: int = 1, *, batch_size: int, world: int = 1, rank: int = 0) -> None:
        super().__init__(n_videos, draws, batch_size, False, world, rank)

    def _at(self, epoch: int, positions: Indices) -> tuple[Indices, Indices]:
        rows, draws = np.divmod(positions, self.draws)
        return rows, draws
