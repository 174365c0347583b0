"""Repair: makes the damaged parts of a store again, from what is left of it and from the source files.

Only what `verify` finds is touched, and no healthy byte changes: see `avstore.remake` for tasks. Metadata that follows
from the spec is rewritten, the spec itself found again from the arrays and the fingerprint; derived spectrograms are
derived again.
Plans and embeddings cannot be made from the sources: they are named, with what to do.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avstore import groups
from avstore.catalogue import read_attributes
from avstore.crew import Crew
from avstore.derive import derive
from avstore.durable import canonical_json, machine_errors, read_json, sync_folder, write_atomic
from avstore.errors import AvstoreError, CorruptError, NotFoundError
from avstore.lock import StoreLock
from avstore.records import Plan, plan_path
from avstore.remake import CannotRemake, Remake
from avstore.sources import decode_path
from avstore.spec import FITS, FORMAT, Spec, arrays
from avstore.tasks import sweep
from avstore.verify import Event, Report, verify


@dataclass(frozen=True)
class Remade:
    """One more task was dealt with; `why` it could not be made again, or None."""

    task: int
    done: int
    total: int
    why: str | None


@dataclass
class Repair:
    """What was found, what was done, and what is `left`: (file or task, why, and what to do)."""

    path: Path
    found: Report
    tasks: list[int] = field(default_factory=list)  # made again
    files: list[str] = field(default_factory=list)  # written again or removed
    swept: list[str] = field(default_factory=list)  # temporaries of interrupted commands, removed
    left: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.left

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path), "found": self.found.to_json(), "ok": self.ok}


def repair(
    store: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    on_event: Callable[[Event | Remade], None] = lambda event: None,
    stop: threading.Event | None = None,
) -> Repair:
    """Repairs the store at a path, under its exclusive lock. `source`: the folder of its files, default the one that
    the store was made from, as its logs say. `workers`: decoding children, default one per CPU. `on_event`: called with
    the events of `verify` and a Remade per task. `stop`: set it to end early.

    Raises NotFoundError (no store, or no such source folder), ConflictError (a locked store, another format),
    MachineError (a failing disk; what was not replaced yet is as it was), InterruptedRun.
    """
    root = Path(store)
    if not any((root / "plans").glob("[0-9]*.json")):
        read_attributes(root)  # says what this is instead
    folder = _source(root, source)
    with StoreLock(root) as lock:
        lock.exclusive("repair")
        swept = [str(p.relative_to(root)) for p in sweep(root)]
        restored = _restore_spec(root)
        out = Repair(root, verify(root, on_event), files=restored, swept=swept)
        if restored:
            out.found.notes.append("zarr.json was damaged: its spec was found again from the arrays and the plans")
        if out.found.ok:
            return out
        spec, plans = groups.read_spec(root), _plans(root)
        _metadata(root, spec, plans, out)
        why = _remake_tasks(root, spec, plans, folder, out, workers, on_event, stop)
        derived = _drop_derived(root, spec, out)
    for name in derived:
        try:
            derive(root, name, workers=workers, stop=stop)
        except (CorruptError, NotFoundError) as e:
            out.left.append((f"spectrograms/{name}", f"{e.what}; repeat avstore derive when that is repaired"))
    _tell_left(out, verify(root), why)
    return out


def _source(root: Path, source: str | os.PathLike[str] | None) -> Path | None:
    """The folder of the source files; None where nobody knows, or it is away."""
    if source is not None:
        if not Path(source).is_dir():
            raise NotFoundError(f"there is no folder {source}", "it should hold the source files", "--source FOLDER")
        return Path(os.path.realpath(source))
    try:
        noted = groups.source_of(root)
    except CorruptError:
        noted = None
    folder = Path(decode_path(noted)) if noted else None
    return folder if folder is not None and folder.is_dir() else None


# The spec and the metadata


def _restore_spec(root: Path) -> list[str]:
    """Writes zarr.json anew where its spec is not that of the plans; the files written."""
    prints = set()
    for path in sorted((root / "plans").glob("[0-9]*.json")):
        try:
            prints.add(Plan.read(path).fingerprint)
        except (CorruptError, OSError):
            continue
    try:
        attributes = read_attributes(root)
        spec = Spec.from_json(attributes["spec"])
        if len(prints) != 1 or {attributes["fingerprint"], spec.fingerprint} == prints:
            return []
    except (AvstoreError, KeyError, TypeError, ValueError) as e:
        if len(prints) != 1:
            raise CorruptError(
                f"the spec of {root} is damaged, and no plan tells which it was", str(e), "restore it from a copy"
            ) from e
    for spec in _possible_specs(root):
        if spec.fingerprint in prints:
            value = {"avstore": {"format": FORMAT, "spec": spec.to_json(), "fingerprint": spec.fingerprint}}
            write_atomic(root / "zarr.json", canonical_json(groups.group(value)))
            return ["zarr.json"]
    raise CorruptError(
        f"the spec in {root / 'zarr.json'} is damaged",
        "none that fits the arrays has the fingerprint of the plans (unusual limits, or another avstore)",
        "restore zarr.json from a copy, or ingest into a new store",
    )


def _possible_specs(root: Path) -> list[Spec]:
    """The specs that the arrays' metadata allows, with the usual limits."""

    def shape(path: str) -> Any:
        meta = read_json(root / path / "zarr.json")
        codec = meta["codecs"][0]
        inner = codec["configuration"] if codec["name"] == "sharding_indexed" else {"chunk_shape": [0], "codecs": []}
        return meta["chunk_grid"]["configuration"]["chunk_shape"][0], inner["chunk_shape"], inner["codecs"]

    try:
        outer, (rate, *_), _ = shape("waveform")
        fields: dict[str, Any] = {"sample_rate": rate, "shard_seconds": outer // rate, "picture": False}
        if (root / "frames" / "zarr.json").is_file():
            rows, (_, height, width, _), codecs = shape("frames")
            jpeg = codecs[0]["name"] == "imagecodecs_jpeg"
            fields.update(
                picture=True, height=height, width=width, fps=rows // fields["shard_seconds"],
                codec="jpeg" if jpeg else "raw", quality=codecs[0]["configuration"]["level"] if jpeg else 90,
            )  # fmt: skip
        names = sorted(p.parent.name for p in (root / "spectrograms").glob("[!.]*/zarr.json"))
        chosen = [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]
        return [Spec(**fields, fit=fit, front_ends=some) for fit in FITS for some in chosen]
    except (AvstoreError, KeyError, TypeError, ValueError, IndexError, OSError, ZeroDivisionError):
        return []


def _plans(root: Path) -> list[Plan]:
    """The plans up to the first that cannot be read."""
    out: list[Plan] = []
    try:
        while plan_path(root, len(out) + 1).is_file():
            out.append(Plan.read(plan_path(root, len(out) + 1)))
    except CorruptError:
        pass
    return out


def _metadata(root: Path, spec: Spec, plans: list[Plan], out: Repair) -> None:
    """Rewrites metadata that follows from the spec, where it is damaged and all plans are there."""
    ours = {"zarr.json", *(f"{path}/zarr.json" for path in ("spectrograms", "embeddings", *arrays(spec)))}
    damaged = sorted({f.file for f in out.found.faults} & ours)
    if damaged and len(plans) == len(list((root / "plans").glob("[0-9]*.json"))):
        for file in damaged:
            with machine_errors(root / file):
                (root / file).unlink(missing_ok=True)
        groups.write_metadata(root, spec, sum(p.shards for p in plans))
        out.files += damaged


def _drop_derived(root: Path, spec: Spec, out: Repair) -> list[str]:
    """Removes damaged shards of derived spectrograms, and names the front-ends to derive again."""
    names = set()
    for file in sorted({f.file for f in out.found.faults}):
        group, _, rest = file.partition("/")
        name, _, shard = rest.partition("/")
        if group == "spectrograms" and shard.startswith("c.") and name not in spec.front_ends:
            with machine_errors(root / file):
                (root / file).unlink(missing_ok=True)
                sync_folder((root / file).parent)
            names.add(name)
            out.files.append(file)
    return sorted(names)


def _tell_left(out: Repair, after: Report, why: dict[int, str]) -> None:
    told = set()
    for fault in after.faults:
        what, how = fault.file, "restore it from a copy"
        if fault.task is not None and fault.task in why:
            what, how = f"task {fault.task}", why[fault.task]
        elif fault.file.startswith("embeddings/"):
            how = "remove that array and repeat `avstore embed`"
        elif fault.file.startswith("spectrograms/"):
            how = "remove that array and repeat `avstore derive`"
        elif fault.file.startswith("plans/"):
            how = "restore it from a copy: slots cannot be guessed"
        if (what, how) not in told:
            told.add((what, how))
            out.left.append((what, how if what.startswith("task") else f"{fault.what}; {how}"))


# Tasks


def _remake_tasks(
    root: Path,
    spec: Spec,
    plans: list[Plan],
    folder: Path | None,
    out: Repair,
    workers: int | None,
    on_event: Callable[[Event | Remade], None],
    stop: threading.Event | None,
) -> dict[int, str]:
    """Makes the damaged tasks again; why some could not be."""
    why: dict[int, str] = {}
    damaged = {f.task for f in out.found.faults if not _is_derived(f.file, spec)}
    work = [(p, t) for p in plans for t in p.tasks if t.number in damaged]
    scratch = root / f".repair.tmp.{os.getpid()}"
    try:
        with Crew(folder or Path("/nowhere"), spec, scratch, workers=workers, stop=stop) as crew:
            for i, (plan, task) in enumerate(work):
                with machine_errors(scratch):
                    shutil.rmtree(scratch, ignore_errors=True)
                    for path in ("commits", *arrays(spec)):
                        (scratch / path).mkdir(parents=True)
                try:
                    out.files += Remake(root, scratch, spec, plan, task).go(crew, folder)
                    out.tasks.append(task.number)
                except CannotRemake as e:
                    why[task.number] = str(e)
                on_event(Remade(task.number, i + 1, len(work), why.get(task.number)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return why


def _is_derived(file: str, spec: Spec) -> bool:
    group, _, rest = file.partition("/")
    return group == "spectrograms" and rest.partition("/")[0] not in spec.front_ends


__all__ = ["Remade", "Repair", "repair"]
