"""Verify: reads a whole store and names what is damaged, down to the video and the second.

Checked: the Zarr metadata against the spec, every plan and record, every shard's index and size, the checksum of every
chunk, every JPEG, and that exactly those chunks are there which the records say: a hole where a row should be and a
chunk where none should be are both faults. Nothing is written. Not here: making tasks again (ingest does, from
`Report.tasks`), and whether the pictures are those of the source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avstore.catalogue import read_attributes
from avstore.checks import Checker, Fault, Found, one_line
from avstore.codecs import crc32c
from avstore.durable import canonical_json, read_json
from avstore.errors import AvstoreError, ConflictError, CorruptError
from avstore.frontends import FRONT_ENDS
from avstore.records import Plan, Task, plan_path, record_path, video_key
from avstore.spec import ArraySpec, Spec, arrays, embedding_array, spectrogram_array

MOST_FAULTS = 10_000  # kept with their text; the rest is counted


@dataclass(frozen=True)
class Checked:
    """Progress: tasks done of all, bytes read, seconds of tape in the tasks that were read, and faults so far."""

    done: int
    total: int
    size: int
    seconds: int
    faults: int


@dataclass
class Report:
    """`ok` when nothing is damaged. `notes` are no damage: pending tasks, leftovers of an interrupted command."""

    path: Path
    videos: int = 0
    failed: int = 0
    tasks_read: int = 0
    chunks: int = 0
    size: int = 0  # bytes read
    faults: list[Fault] = field(default_factory=list)
    more: int = 0  # faults beyond MOST_FAULTS
    pending: list[int] = field(default_factory=list)  # tasks without a record
    stray: list[str] = field(default_factory=list)  # temporary and unknown files
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def tasks(self) -> list[int]:
        """Tasks to make again."""
        return sorted({f.task for f in self.faults if f.task is not None})

    @property
    def damaged(self) -> list[int]:
        """Numbers of the videos that a fault names."""
        return sorted({f.video for f in self.faults if f.video is not None})

    def to_json(self) -> dict[str, Any]:
        out = {k: v for k, v in self.__dict__.items() if k != "faults"}
        return {
            **out,
            "path": str(self.path),
            "ok": self.ok,
            "faults": [f.to_json() for f in self.faults],
            "tasks": self.tasks,
        }

    def add(self, faults: list[Fault]) -> None:
        room = max(0, MOST_FAULTS - len(self.faults))
        self.faults += faults[:room]
        self.more += max(0, len(faults) - room)


Event = Checked | Fault


def verify(
    store: str | os.PathLike[str],
    on_event: Callable[[Event], None] = lambda event: None,
    *,
    payloads: bool = True,
    threads: int | None = None,
) -> Report:
    """Checks the store at a path. `payloads=False` leaves out the bytes of the chunks (their places, sizes and
    indexes are still checked). `threads`: shards read at once, default the CPUs.

    NotFoundError where there is no store, ConflictError for another format version. Damage is in the report, not
    raised: also damage that keeps the store from opening.
    """
    root = Path(store)
    report = Report(root)

    def tell(faults: list[Fault]) -> None:
        report.add(faults)
        for fault in faults:
            on_event(fault)

    try:
        attributes = read_attributes(root)
        spec = Spec.from_json(attributes["spec"])
    except CorruptError as e:
        tell([Fault("zarr.json", one_line(e))])
        return report
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, ConflictError):
            raise
        tell([Fault("zarr.json", f"the spec cannot be read: {one_line(e)}")])
        return report
    if attributes.get("fingerprint") != spec.fingerprint:
        tell([Fault("zarr.json", "the fingerprint is not that of the spec")])
    plans, faults = _plans(root, spec)
    tell(faults)
    shards = sum(p.shards for p in plans)
    tell(_metadata(root, spec, shards))
    report.stray = sorted(_stray(root, spec))
    wanted = {record_path(root, t.number).name for p in plans for t in p.tasks}
    usable = len(plans) == len(list((root / "plans").glob("*.json")))  # else it cannot be told whose a record is
    for name in sorted(os.listdir(root / "commits")) if (root / "commits").is_dir() and usable else ():
        if name not in wanted and ".tmp." not in name:
            tell([Fault(f"commits/{name}", "a record of a task that no plan has")])
    work = []
    for plan in plans:
        for task in plan.tasks:
            file = record_path(root, task.number)
            if not file.exists():
                report.pending.append(task.number)
                continue
            work.append((plan, task))
    report.notes += [f"{len(report.pending)} tasks are still to be done: repeat the ingest"] if report.pending else []
    derived, faults = _derived(root, spec, report)
    tell(faults)
    check = Checker(root, spec, payloads, derived)
    seconds = 0
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="verify") as pool:
        running: dict[Future[Found], Task] = {}
        todo: Iterator[tuple[Plan, Task]] = iter(work)
        try:
            while True:
                while len(running) < 2 * (threads or os.cpu_count() or 1):
                    following = next(todo, None)
                    if following is None:
                        break
                    running[pool.submit(check.task, *following)] = following[1]
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    found = future.result()
                    report.tasks_read += 1
                    report.videos += found.videos
                    report.failed += found.failed
                    report.chunks += found.chunks
                    report.size += found.size
                    seconds += task.shards * spec.shard_seconds
                    tell(found.faults)
                    on_event(Checked(report.tasks_read, len(work), report.size, seconds, len(report.faults)))
        except BaseException:
            for future in running:
                future.cancel()
            raise
    tell(_embeddings(root, spec, shards, report, payloads))
    report.faults.sort(key=lambda f: (f.task is not None, f.task or 0, f.file, f.second or 0))
    return report


def _plans(root: Path, spec: Spec) -> tuple[list[Plan], list[Fault]]:
    """The plans up to the first that cannot be used, and what is wrong with any."""
    plans: list[Plan] = []
    faults: list[Fault] = []
    names = sorted(p.name for p in (root / "plans").glob("*.json")) if (root / "plans").is_dir() else []
    video = shard = tasks = 0
    for i, name in enumerate(names):
        file = f"plans/{name}"
        path = root / file
        try:
            if name != plan_path(root, i + 1).name:
                raise CorruptError(f"plan {i + 1} is missing")
            plan = Plan.read(path)
            if (plan.number, plan.first_video, plan.first_shard) != (i + 1, video, shard):
                raise CorruptError("it does not follow the plan before it")
            wrong = _plan_contradicts(plan, spec, tasks)
            if wrong:
                raise CorruptError(wrong)
            if plan.to_bytes() != path.read_bytes():
                faults.append(Fault(file, "it is not in canonical form: it was changed"))
        except (AvstoreError, OSError, TypeError, ValueError, IndexError, AttributeError) as e:
            faults.append(Fault(file, f"{one_line(e)}; this plan and those after it cannot be used"))
            return plans, faults
        plans.append(plan)
        video, shard, tasks = video + len(plan), shard + plan.shards, tasks + len(plan.tasks)
    return plans, faults


def _plan_contradicts(plan: Plan, spec: Spec, tasks: int) -> str | None:
    size = spec.shard_seconds
    if plan.fingerprint != spec.fingerprint:
        return "its fingerprint is not the store's"
    video, shard = plan.first_video, plan.first_shard
    for i, task in enumerate(plan.tasks):
        if (task.number, task.first, task.shard) != (tasks + i, video, shard) or task.shards < 1:
            return f"task {task.number} does not follow the task before it"
        end = task.shard * size
        for n in task.videos:
            j = n - plan.first_video
            last = (shard + task.shards) * size
            if plan.seconds[j] < 0 or plan.place[j] < end or plan.place[j] + plan.seconds[j] > last:
                return f"the slot of video {n} ({plan.key[j]}) lies outside its task or over the one before"
            if plan.key[j] != video_key(plan.path[j]) and not plan.key[j].startswith(f"{plan.path[j]}#"):
                return f"video {n} has the key {plan.key[j]} and the path {plan.path[j]}"
            end = plan.place[j] + plan.seconds[j]
        video, shard = video + task.count, shard + task.shards
    if shard != plan.first_shard + plan.shards:
        return f"its tasks take {shard - plan.first_shard} shards, it says {plan.shards}"
    return None


def _metadata(root: Path, spec: Spec, shards: int) -> list[Fault]:
    """The zarr.json files that follow from the spec. A tape longer than the plans is an ingest that stopped while
    planning: no fault."""
    faults = []
    seconds = shards * spec.shard_seconds
    wanted: dict[str, dict[str, Any]] = {
        "spectrograms/zarr.json": {"zarr_format": 3, "node_type": "group", "attributes": {}},
        "embeddings/zarr.json": {"zarr_format": 3, "node_type": "group", "attributes": {}},
    }
    for path, array in arrays(spec).items():
        wanted[f"{path}/zarr.json"] = array.metadata(spec.shard_seconds, seconds)
    for file, expected in wanted.items():
        try:
            data = (root / file).read_bytes()
            value = read_json(root / file)
        except FileNotFoundError:
            faults.append(Fault(file, "the file is missing"))
            continue
        except (CorruptError, OSError) as e:
            faults.append(Fault(file, one_line(e)))
            continue
        if isinstance(value, dict) and "shape" in expected:
            shape = value.get("shape")
            step = expected["chunk_grid"]["configuration"]["chunk_shape"][0]
            longer: Any = isinstance(shape, list) and shape and isinstance(shape[0], int) and shape[0] % step == 0
            if longer and shape and shape[0] > expected["shape"][0]:
                expected = {**expected, "shape": [shape[0], *expected["shape"][1:]]}
        if not isinstance(value, dict):
            faults.append(Fault(file, "it is no JSON object"))
        elif value != expected:
            names = sorted(k for k in {*value, *expected} if value.get(k) != expected.get(k))
            faults.append(Fault(file, f"it is not what the spec says: {', '.join(names)}"))
        elif data != canonical_json(value):
            faults.append(Fault(file, "it is not in canonical form: it was changed"))
    try:
        root_group = read_json(root / "zarr.json")
        if canonical_json(root_group) != (root / "zarr.json").read_bytes():
            faults.append(Fault("zarr.json", "it is not in canonical form: it was changed"))
        if {k: root_group.get(k) for k in ("zarr_format", "node_type")} != {"zarr_format": 3, "node_type": "group"}:
            faults.append(Fault("zarr.json", "it is not a Zarr v3 group"))
    except (CorruptError, OSError) as e:
        faults.append(Fault("zarr.json", one_line(e)))
    return faults


def _has_recipe(file: Path) -> bool:
    """Whether `derive` wrote this array: what an ingest writes has its recipe in the spec."""
    try:
        return "recipe" in read_json(file)["attributes"]
    except (CorruptError, OSError, KeyError, TypeError):
        return True  # damaged: what follows says so


def _derived(root: Path, spec: Spec, report: Report) -> tuple[list[ArraySpec], list[Fault]]:
    """Spectrogram arrays that `derive` added, and what is wrong with their metadata."""
    found: list[ArraySpec] = []
    faults: list[Fault] = []
    for file in sorted((root / "spectrograms").glob("[!.]*/zarr.json")) if (root / "spectrograms").is_dir() else ():
        name = file.parent.name
        if name in spec.front_ends:
            continue
        relative = str(file.relative_to(root))
        if name in dict(spec.foreign) and not _has_recipe(file):
            report.notes.append(f"spectrograms/{name} is not checked: another recipe than this avstore's computed it")
            continue
        if name not in FRONT_ENDS or not FRONT_ENDS[name].storable:
            faults.append(Fault(relative, "a front-end that this avstore does not know: it cannot be checked"))
            continue
        array = spectrogram_array(name)
        try:
            meta = read_json(file)
            expected = array.metadata(spec.shard_seconds, 0)
            names = [k for k in expected if k not in ("shape", "attributes") and meta.get(k) != expected[k]]
            rows = meta["shape"][0]
            if names or meta["shape"][1:] != expected["shape"][1:] or rows % (spec.shard_seconds * array.rate):
                faults.append(
                    Fault(relative, f"it is not what its front-end says: {', '.join(sorted(names)) or 'shape'}")
                )
                continue
        except (CorruptError, OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            faults.append(Fault(relative, f"it cannot be read: {one_line(e)}"))
            continue
        found.append(array)
    return found, faults


def _stray(root: Path, spec: Spec) -> Iterator[str]:
    """Temporary and unknown files, and arrays begun under a dotted name. No damage."""
    ours = {"zarr.json", "lock", "plans", "commits", "logs", "spectrograms", "embeddings", *arrays(spec)}
    for folder, subfolders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        top = inside == Path(".")
        for name in [*subfolders]:
            if name.startswith(".") or (top and name not in ours):
                yield f"{inside / name}/"
                subfolders.remove(name)
        if inside.parts[:1] == ("logs",):
            continue
        for name in files:
            if ".tmp." in name or name.startswith(".") or (top and name not in ours):
                yield str(inside / name)


def _embeddings(root: Path, spec: Spec, shards: int, report: Report, payloads: bool) -> list[Fault]:
    """Arrays of embeddings: metadata, sizes, checksums, and no infinite or half-missing rows."""
    faults: list[Fault] = []
    files = sorted((root / "embeddings").glob("[!.]*/[!.]*/zarr.json")) if (root / "embeddings").is_dir() else []
    for file in files:
        name = str(file.relative_to(root))
        try:
            meta = read_json(file)
            dim = int(meta["shape"][1])
            expected = embedding_array(file.parent.parent.name, file.parent.name, dim)
            wanted = expected.metadata(spec.shard_seconds, 0)
            names = [k for k in wanted if k not in ("shape", "attributes") and meta.get(k) != wanted[k]]
            if names:
                faults.append(Fault(name, f"it is not an array of embeddings: {', '.join(sorted(names))}"))
                continue
        except (CorruptError, KeyError, TypeError, ValueError, IndexError) as e:
            faults.append(Fault(name, f"it cannot be read: {one_line(e)}"))
            continue
        size = spec.shard_seconds * dim * 2
        for shard in range(shards):
            key = expected.key(shard)
            try:
                data = np.fromfile(root / key, np.uint8) if payloads else None
                length = data.size if data is not None else (root / key).stat().st_size
            except FileNotFoundError:
                continue
            report.size += length if payloads else 0
            report.chunks += 1
            second = float(shard * spec.shard_seconds)
            if length != size + 4:
                faults.append(Fault(key, f"{length} bytes instead of {size + 4}", second=second))
            elif data is not None:
                if crc32c(data[:-4]) != int.from_bytes(data[-4:].tobytes(), "little"):
                    faults.append(Fault(key, "the checksum differs", second=second))
                    continue
                rows = np.frombuffer(data[:-4].tobytes(), "<f2").reshape(-1, dim)
                absent = np.isnan(rows).all(axis=1)
                if not np.isfinite(rows[~absent]).all():
                    faults.append(Fault(key, "embeddings that are not finite", second=second))
    return faults


__all__ = ["Checked", "Event", "Fault", "Report", "verify"]
