"""Steps: what the batch of each is to be read from: pairs (order), windows (views), the tape rows that they meet.

Arithmetic on what is known of the videos. Of the store, only the tables of which source frame each row shows are read,
where clips are of native frames. Nothing here knows of slots or threads (`avstore.filler`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from avstore import draws
from avstore.codecs import decode_source
from avstore.job import Job
from avstore.shard import LocalReader
from avstore.windows import Extents, frame_rows, picture_samples, valid


@dataclass(eq=False)
class Plan:
    """One step before it has a slot: where each clip's bytes lie. C clips = B pairs x views."""

    step: int
    rows: np.ndarray  # (B,)
    draws: np.ndarray
    first: int
    picture: np.ndarray  # (B, V) starts, samples
    sound: np.ndarray
    shrunk: np.ndarray  # (B,)
    tape: np.ndarray  # (C, T) absolute rows of `frames`
    valid_frames: np.ndarray  # (C,)
    valid_samples: np.ndarray  # (C,)
    heard: np.ndarray  # (C,) samples to read: 0 without sound


class Planner:
    """From steps to plans. column: those of `avstore.job.COLUMNS` by name, int64 (videos of the selection,)."""

    def __init__(self, job: Job, column: dict[str, np.ndarray], reader: LocalReader) -> None:
        self.job, self.column, self.reader = job, column, reader
        self.sources: OrderedDict[int, np.ndarray] = OrderedDict()

    def plan(self, step: int, stop: int) -> list[Plan]:
        """Pairs, windows and tape rows of the steps step .. stop-1, all of one epoch: arithmetic only."""
        job, column = self.job, self.column
        epoch, first, rows, pair_draws = self._pairs(step, stop)
        bounds = np.cumsum([0, *(len(r) for r in rows)]).tolist()
        row, draw = np.concatenate(rows), np.concatenate(pair_draws)
        n, sr = job.views.views, job.sample_rate
        frames = column["frames"][row]
        extents = Extents(picture_samples(frames, job.tape_fps, sr), column["sound_start"][row],
                          column["sound_end"][row])  # fmt: skip
        u = draws.uniform(job.seed, "window", epoch, row, draw, max(job.views.numbers, 1))
        cut = job.views.starts(extents, u, draw, max(job.picture, 1), max(job.samples, 1))
        picture, sound = (np.asarray(x, np.int64).reshape(len(row), n) for x in (cut.picture, cut.sound))
        each = np.repeat(np.arange(len(row)), n)  # clip -> pair
        tape, valid_frames = np.zeros((len(each), 0), np.int64), np.zeros(len(each), np.int64)
        if job.frames:
            if job.fps is None:
                local, valid_frames = self._native(row[each], picture.reshape(-1))
            else:
                local = frame_rows(picture.reshape(-1), job.frames, job.fps, job.tape_fps, sr)
                valid_frames = (local < frames[each][:, None]).sum(1)
                loop = np.arange(job.frames) % np.maximum(valid_frames, 1)[:, None]
                local = np.take_along_axis(local, loop, 1)  # from the clip's first frame again
            tape = column["place"][row][each][:, None] * job.tape_fps + local
        starts = sound.reshape(-1)
        inside = valid(starts, job.samples, column["samples"][row][each])
        meets = (starts < column["sound_end"][row][each]) & (starts + job.samples > column["sound_start"][row][each])
        heard, shrunk = np.where(meets, inside, 0), np.asarray(cut.shrunk, bool)
        out = []
        for i, (a, b) in enumerate(pairwise(bounds)):
            p, c = slice(a, b), slice(a * n, b * n)
            out.append(Plan(step + i, row[p], draw[p], first[i], picture[p], sound[p], shrunk[p], tape[c],
                            valid_frames[c], inside[c], heard[c]))  # fmt: skip
        return out

    def _pairs(self, step: int, stop: int) -> tuple[int, list[int], list[np.ndarray], list[np.ndarray]]:
        """(epoch, and of each step: first position, rows, draws)."""
        epoch, index = self.job.order.locate(step)
        batches = self.job.order.run(epoch, index, index + stop - step)
        return epoch, [b.first for b in batches], [b.rows for b in batches], [b.draws for b in batches]

    def _native(self, rows: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Local rows (C, T) of consecutive distinct source frames, from the one shown at each start; earlier where a
        video ends too soon, looping where it is too short."""
        job = self.job
        out = np.zeros((len(rows), job.frames), np.int64)
        counts = np.zeros(len(rows), np.int64)
        for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
            have, place = int(self.column["frames"][row]), int(self.column["place"][row]) * job.tape_fps
            if not have:
                continue
            shown = self.source(np.arange(place, place + have))
            new = np.flatnonzero(np.diff(shown, prepend=shown[0] - 1))  # rows where another source frame begins
            first = min(start * job.tape_fps // job.sample_rate, have - 1)
            at = min(int(np.searchsorted(new, first, "right")) - 1, max(len(new) - job.frames, 0))
            local = new[at : at + job.frames].copy()
            local[0] = max(local[0], first) if at + 1 >= len(new) or first < new[at + 1] else local[0]
            counts[i] = len(local)
            out[i] = np.resize(local, job.frames)
        return out, counts

    def source(self, rows: np.ndarray) -> np.ndarray:
        """int32: the source frame that each absolute tape row shows. Few shards' tables are kept."""
        per = self.job.shard_seconds * self.job.tape_fps
        out = np.empty(len(rows), np.int32)
        shards = rows // per
        for shard in np.unique(shards).tolist():
            table = self.sources.get(shard)
            if table is None:
                key = self.job.arrays["source"].key(shard)
                with self.reader.descriptor(key) as (fd, size):
                    data = os.pread(fd, size, 0)
                table = self.sources[shard] = decode_source(data, per, key)
                while len(self.sources) > 16:
                    self.sources.pop(next(iter(self.sources)), None)
            mask = shards == shard
            out[mask] = table[rows[mask] - shard * per]
        return out
