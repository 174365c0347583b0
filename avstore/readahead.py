"""Read-ahead: asks the kernel for the bytes of coming steps, where the page cache lacks them.

A few clips of a step are looked up; where they are there, nothing is asked. What is damaged or missing is not told
here: whoever reads the clip will.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable

import numpy as np

from avstore.codecs import MISSING
from avstore.errors import AvstoreError
from avstore.job import Job
from avstore.shard import LocalReader
from avstore.spec import ArraySpec
from avstore.steps import Plan

PROBES = 2  # clips of a step that are looked up in the page cache before the whole step is announced


class ReadAhead:
    """Announces plans to the kernel. place: where each video of the selection lies on the tape, int64. maps: `reader`
    may map raw shards (`LocalReader.mapped`) while the page cache has what is announced."""

    def __init__(self, job: Job, place: np.ndarray, reader: LocalReader, *, maps: bool) -> None:
        self.job, self.place, self.reader, self.maps = job, place, reader, maps
        self.cold = True  # until a probe says that the page cache has it all

    def announce(self, plans: Iterable[Plan]) -> None:
        """Steps that will soon be read, in order."""
        for plan in plans:
            self._announce(plan)
        self.reader.maps = self.maps and not self.cold  # what is not in the page cache is read whole, not page by page

    def _announce(self, plan: Plan) -> None:
        """Where the page cache lacks any of a few clips of the step, asks the kernel for all of it now."""
        clips = len(plan.heard)
        if not clips:
            return
        if not self.cold:
            self.cold = any(not self._cached(plan, i) for i in range(0, clips, -(-clips // PROBES)))
        if not self.cold:
            return
        warm = True
        for i in range(clips):
            warm &= self._cached(plan, i, announce=True)
        self.cold = not warm

    def _cached(self, plan: Plan, clip: int, announce: bool = False) -> bool:
        """Whether the first bytes of a clip's frames (sound, where it has none) are in the page cache."""
        job, warm = self.job, True
        for array, first, last in self._extents(plan, clip):
            per = job.shard_seconds * array.rate // array.inner_rows
            first, last = first // array.inner_rows, last // array.inner_rows
            shard = first // per
            last = min(last, (shard + 1) * per - 1)
            key = array.key(shard)
            with contextlib.suppress(AvstoreError, OSError):  # whoever reads the clip will say what is wrong
                flat = self.reader.entries(key, first - shard * per, last - first + 1, per)
                there = [i for i in range(0, len(flat), 2) if flat[i] != MISSING]
                if not there:
                    continue
                begin, end = flat[there[0]], flat[there[-1]] + flat[there[-1] + 1]
                with self.reader.descriptor(key) as (fd, _):
                    try:
                        os.preadv(fd, [bytearray(1)], begin, os.RWF_NOWAIT)
                    except OSError as e:
                        if e.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                            raise
                        warm = False
                        if announce:
                            os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_WILLNEED)
            if not announce:
                break
        return warm

    def _extents(self, plan: Plan, clip: int) -> list[tuple[ArraySpec, int, int]]:
        """(array, first row, last row) of what a clip reads."""
        out = []
        if self.job.frames and plan.valid_frames[clip]:
            rows = plan.tape[clip]
            out.append((self.job.arrays["frames"], int(rows.min()), int(rows.max())))
        if plan.heard[clip] and self.job.samples:
            pair, view = divmod(clip, self.job.views.views)
            place = int(self.place[plan.rows[pair]])
            start = place * self.job.sample_rate + int(plan.sound[pair, view])
            out.append((self.job.arrays["waveform"], start, start + int(plan.heard[clip]) - 1))
        return out
