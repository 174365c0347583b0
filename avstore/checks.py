"""The checks of one task: its record, and every shard, index, chunk and JPEG that the record calls for.

Used by `avstore.verify`, which knows of whole stores; reads only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from avstore.codecs import MISSING, crc32c, decode_jpeg_into, decode_source
from avstore.errors import CorruptError
from avstore.frontends import FRONT_ENDS
from avstore.records import REASONS, Plan, Record, Task, record_path
from avstore.shard import INDEX_ROW
from avstore.spec import ArraySpec, Spec, arrays


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: in which file, with which video and second of it (where that is known), and the task
    that has to be made again."""

    file: str
    what: str
    video: int | None = None
    key: str | None = None
    second: float | None = None
    task: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class Found:
    faults: list[Fault] = field(default_factory=list)
    videos: int = 0
    failed: int = 0
    chunks: int = 0
    size: int = 0


class Checker:
    """Checks one task after another; threads may share it."""

    def __init__(self, root: Path, spec: Spec, payloads: bool, derived: list[ArraySpec]) -> None:
        self.root, self.spec, self.payloads = root, spec, payloads
        self.arrays = arrays(spec)
        self.derived = derived  # spectrograms added later: a shard that is not there is not derived yet

    def task(self, plan: Plan, task: Task) -> Found:
        """All that belongs to a committed task: its record and its shards."""
        found = Found()
        file = f"commits/{record_path(self.root, task.number).name}"
        try:
            data = (self.root / file).read_bytes()
            record = Record.read(self.root / file)
        except (CorruptError, OSError) as e:
            found.faults.append(Fault(file, one_line(e), task=task.number))
            return found
        found.size += len(data)
        place = [plan.place[n - plan.first_video] for n in task.videos]
        slot = [plan.seconds[n - plan.first_video] for n in task.videos]
        keys = [plan.key[n - plan.first_video] for n in task.videos]
        if record.task != task.number or len(record.fields["status"]) != task.count:
            found.faults.append(Fault(file, f"it does not belong to task {task.number}", task=task.number))
            return found
        if record.fingerprint != self.spec.fingerprint:
            found.faults.append(Fault(file, "its fingerprint is not the store's", task=task.number))
        elif record.to_bytes() != data:
            found.faults.append(Fault(file, "it is not in canonical form: it was changed", task=task.number))
        facts = [{k: v[i] for k, v in record.fields.items()} for i in range(task.count)]
        sane = True
        for i, fact in enumerate(facts):
            for wrong in self.contradictions(fact, slot[i]):
                sane = False
                found.faults.append(Fault(file, wrong, task.first + i, keys[i], None, task.number))
            found.videos += fact["status"] == "ok"
            found.failed += fact["status"] != "ok"
        if not sane:
            return found  # what should be in the shards cannot be told
        ok = [f["status"] == "ok" for f in facts]
        base = task.shard * self.spec.shard_seconds
        seconds = task.shards * self.spec.shard_seconds
        owner = np.full(seconds, -1, np.int64)  # of each second of the task: the index of its video
        for i in range(task.count):
            owner[place[i] - base : place[i] - base + slot[i]] = i

        def fault(key: str, what: str, second: float | None) -> None:
            """`second`: on the tape, from the task's beginning."""
            who = -1 if second is None else int(owner[min(int(second), seconds - 1)])
            if who < 0:
                found.faults.append(Fault(key, what, task=task.number))
                return
            on_clock = None if second is None else round(second + base - place[who], 3)
            found.faults.append(Fault(key, what, task.first + who, keys[who], on_clock, task.number))

        for array in (*self.arrays.values(), *self.derived):
            rows = seconds * array.rate
            inner = array.inner_rows or 1
            wanted = np.zeros(rows // inner, bool)
            for i, fact in enumerate(facts):
                start = (place[i] - base) * array.rate // inner
                wanted[start : start + (self.length(array, fact) if ok[i] else 0)] = True
            per = self.spec.shard_seconds * array.rate // inner
            for s in range(task.shards):
                key = array.key(task.shard + s)
                part = wanted[s * per : (s + 1) * per]
                start = s * self.spec.shard_seconds
                if array in self.derived and not (self.root / key).exists():
                    continue

                def at(chunk: int, start: int = start, array: ArraySpec = array, inner: int = inner) -> float:
                    return start + chunk * inner / array.rate

                def tell(what: str, chunk: int | None, key: str = key, at: Callable[[int], float] = at) -> None:
                    fault(key, what, None if chunk is None else at(chunk))

                self.shard(array, key, part, found, tell)
        return found

    def length(self, array: ArraySpec, fact: dict[str, Any]) -> int:
        """Chunks that an ok video has in an array, from the beginning of its slot."""
        if array.path in ("frames", "source"):
            return int(fact["frames"])
        if fact["sound_end"] <= fact["sound_start"]:
            return 0
        samples, rate = int(fact["samples"]), self.spec.sample_rate
        if array.path == "waveform":
            return -(-samples // rate)
        name = array.path.rsplit("/", 1)[-1]
        return -(-FRONT_ENDS[name].rows(samples, rate) // array.inner_rows)

    def contradictions(self, fact: dict[str, Any], slot: int) -> list[str]:
        """What in a video's facts cannot be."""
        spec, out = self.spec, []
        status, reason = fact["status"], fact["reason"]
        counts = ("frames", "samples", "sound_start", "sound_end", "errors", "source_frames", "sound_dropped")
        for name in counts:
            value = fact[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                return [f"{name} is {value!r}"]
        if status not in ("ok", "failed"):
            out.append(f"the status is {status!r}")
        if (status == "failed") != (reason in REASONS) or (status == "ok" and reason is not None):
            out.append(f"the status is {status}, the reason {reason!r}")
        if status != "ok":
            return out
        if fact["frames"] > slot * spec.fps * bool(spec.picture):
            out.append(f"{fact['frames']} frames in a slot of {slot} s")
        if fact["samples"] > slot * spec.sample_rate:
            out.append(f"{fact['samples']} samples in a slot of {slot} s")
        if not fact["sound_start"] <= fact["sound_end"] <= fact["samples"]:
            out.append(f"sound from {fact['sound_start']} to {fact['sound_end']} of {fact['samples']} samples")
        if not isinstance(fact["silent"], bool):
            out.append(f"silent is {fact['silent']!r}")
        elif fact["sound_end"] == fact["sound_start"] and not fact["silent"]:
            out.append("it has no sound and is not silent")
        if fact["frames"]:
            box = fact["box"]
            whole = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int) for v in box)
            if not whole or not (
                0 <= box[0] <= box[0] + box[2] <= spec.height
                and 0 <= box[1] <= box[1] + box[3] <= spec.width
                and box[2] > 0 < box[3]
            ):
                out.append(f"the picture's box is {box}")
        elif not fact["samples"]:
            out.append("it is ok, but has neither frames nor samples")
        return out

    def shard(
        self, array: ArraySpec, key: str, wanted: np.ndarray, found: Found, tell: Callable[[str, int | None], None]
    ) -> None:
        """One file. `wanted`: bool per inner chunk (per row, where the array has none)."""
        path = self.root / key
        first = int(wanted.argmax()) if wanted.any() else None
        try:
            size = path.stat().st_size
            data = np.fromfile(path, np.uint8) if self.payloads or not array.inner_rows else None
        except FileNotFoundError:
            if first is not None:
                tell(f"the file is missing, {int(wanted.sum())} rows with it", first)
            return
        except OSError as e:
            tell(f"the file cannot be read: {e.strerror or e}", first)
            return
        if first is None:
            tell("the file is there, but its task has nothing in it", None)
            return
        found.size += size if data is not None else 0
        if not array.inner_rows:
            assert data is not None
            self.source(array, key, data, wanted, found, tell)
            return
        tail = size - 4 - INDEX_ROW * len(wanted)
        if tail < 0:
            tell(f"the file is cut short: {size} bytes", first)
            return
        if data is None:
            with open(path, "rb") as f:
                f.seek(tail)
                index = np.frombuffer(f.read(INDEX_ROW * len(wanted) + 4), np.uint8)
        else:
            index = data[tail:]
        if google_crc32c.value(index[:-4].tobytes()) != int.from_bytes(index[-4:].tobytes(), "little"):
            tell("the checksum of the index differs", first)
            return
        table = index[:-4].view("<u8") if index.ctypes.data % 8 == 0 else np.frombuffer(index[:-4].tobytes(), "<u8")
        table = table.reshape(-1, 2)
        there = table[:, 0] != MISSING
        for chunk in np.flatnonzero(wanted & ~there).tolist():
            tell("a hole where the record has a row", chunk)
        for chunk in np.flatnonzero(there & ~wanted).tolist():
            tell("bytes where the record has none", chunk)
        at, entries = np.flatnonzero(there), table[there]
        # behind one another without a gap, compared in one go: a store of 240,000 videos has 50 million of them
        wrong = (entries[:, 0] > tail) | (entries[:, 1] < 4) | (entries[:, 1] > tail)
        if not wrong.any():
            ends = entries.sum(1)
            wrong = (entries[:, 0] != np.concatenate([[0], ends[:-1]])) | (ends > tail)
        if wrong.any():
            tell("the index points elsewhere than behind the chunk before", int(at[wrong.argmax()]))
            return
        end = int(entries[-1].sum()) if len(entries) else 0
        if end != tail:
            tell(f"{tail - end} bytes that belong to no chunk", int(at[-1]) if at.size else None)
        found.chunks += int(there.sum())
        if data is None:
            return
        out = np.empty(array.row, np.uint8) if array.path == "frames" else None
        expected = array.inner_rows * int(np.prod(array.row, dtype=np.int64)) * np.dtype(array.dtype).itemsize
        for chunk, (offset, length) in zip(at.tolist(), table[there].tolist(), strict=True):
            body, end = data[offset : offset + length - 4], offset + length
            if crc32c(body) != int.from_bytes(data[end - 4 : end].tobytes(), "little"):
                tell("the checksum differs", chunk)
            elif out is not None and array.codecs[0]["name"] != "bytes":
                wrong = _jpeg(body, out)
                if wrong:
                    tell(wrong, chunk)
            elif body.size != expected:
                tell(f"a chunk of {body.size} bytes instead of {expected}", chunk)

    def source(
        self,
        array: ArraySpec,
        key: str,
        data: np.ndarray,
        wanted: np.ndarray,
        found: Found,
        tell: Callable[[str, int | None], None],
    ) -> None:
        first = int(wanted.argmax())
        try:
            rows = decode_source(data.tobytes(), len(wanted), key)
        except Exception as e:  # the decompressor's own errors have no common class
            tell(one_line(e), first)
            return
        found.chunks += 1
        for chunk in np.flatnonzero((rows >= 0) != wanted)[:100].tolist():
            tell("no source frame where there is a picture, or one where there is none", chunk)


def _jpeg(body: np.ndarray, out: np.ndarray) -> str | None:
    """Decodes a frame into `out`; what is wrong with it."""
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(body)
        if (height, width) != out.shape[:2]:
            return f"a JPEG of {height}x{width}"
        decode_jpeg_into(body, out)
    except ValueError as e:
        return f"not a JPEG: {one_line(e)}"
    return None


def one_line(e: BaseException) -> str:
    text = " ".join(str(e).split())
    return text or type(e).__name__
