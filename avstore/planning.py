"""Planning on disk: which entries a command plans, their probes, and the plan file with the metadata it needs.

The arithmetic of slots and tasks is `avstore.plan`; here are the files and the children around it. Plans are written
under the exclusive lock only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from avstore import events, groups
from avstore.crew import Crew
from avstore.durable import write_new
from avstore.errors import ConflictError, UsageError, did_you_mean
from avstore.events import Event
from avstore.ledger import Ledger
from avstore.lists import ListReport, is_list, read_list
from avstore.plan import Probed, failure, make_plan, slot_seconds
from avstore.records import Plan, plan_path
from avstore.sources import Entry, Listing, encode_path, read_source
from avstore.spec import PROFILES, Spec

SPEC_FIELDS = {f.name for f in dataclasses.fields(Spec)} - {"height", "width", "picture", "foreign"}


def default_store(source: Path) -> Path:
    """`<name of source>.zarr` in the current folder."""
    name = source.resolve().stem if source.is_file() else source.resolve().name
    return Path.cwd() / f"{name}.zarr"


def given_fields(profile: str | None, size: tuple[int, int] | None, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Spec that the caller names; UsageError for names and values that cannot be."""
    for name in options:
        if name not in SPEC_FIELDS:
            raise UsageError(f"unknown option {name!r}", did_you_mean(name, SPEC_FIELDS), "help(avstore.ingest)")
    given: dict[str, Any] = {}
    if profile is not None:
        if profile not in PROFILES:
            raise UsageError(f"unknown profile {profile!r}", did_you_mean(profile, PROFILES), "--profile 112")
        given["height"], given["width"], given["fps"] = PROFILES[profile]
    if size is not None:
        given["height"], given["width"] = size
    given.update({name: value for name, value in options.items() if value is not None})
    if "front_ends" in given:
        given["front_ends"] = tuple(sorted(set(given["front_ends"])))
    Spec(**given)  # wrong values are told before anything is touched
    return given


def read(
    source: Path, store: Path, root: str | os.PathLike[str] | None, list_kind: str | None
) -> tuple[Listing, ListReport | None]:
    """What the source names: a folder, a media file, or a list (by its suffix, or where `root` or `list_kind` is
    given), for a store that does not lie around it; UsageError where there is no media for a new store."""
    report = None
    if root is not None or list_kind is not None or is_list(source):
        listing, report = read_list(source, root, list_kind)
    else:
        listing = read_source(source, exclude=[store])
    real = Path(os.path.realpath(store))
    if real == listing.root or real in listing.root.parents:
        raise UsageError(f"the source {source} lies inside the store {store}", "", "name another STORE")
    groups.require_free(store)
    if not groups.is_store(store) and not listing.entries:
        left = f"{len(listing.skipped)} files or folders were left out" if listing.skipped else "it is empty"
        raise UsageError(f"no media in {source}", left, "avstore ingest FOLDER")
    return listing, report


def open_spec(root: Path, given: dict[str, Any]) -> Spec:
    """The spec of the store that is there; ConflictError where what is given differs."""
    spec = groups.read_spec(root)
    spec.require_same(dataclasses.replace(spec, **given))
    return spec


def check_source(root: Path, folder: Path, moved: bool) -> None:
    """ConflictError where the store was made from another folder than `folder`, unless it `moved`."""
    here, before = encode_path(os.fsencode(folder)), groups.source_of(root)
    if before is not None and before != here and not moved:
        raise ConflictError(
            f"the store {root} was made from another folder",
            f"from {before}, and this is {here}",
            "add --moved if it is the same folder in another place; else name another STORE",
        )


def wanted(ledger: Ledger, entry: Entry, retry_failed: bool, changed: bool) -> bool:
    """Whether an entry is to be planned."""
    known = ledger.known.get(entry.key)
    if known is None:
        return True
    if not known.committed or known.true_seconds() is not None:
        return False  # planned already, or about to be planned with its true length
    return (retry_failed and known.status == "failed") or (changed and known.size != entry.size)


def columns_differ(ledger: Ledger, entry: Entry) -> bool:
    """Whether a video is planned with other columns than its entry has."""
    known = ledger.known.get(entry.key)
    return known is not None and not entry.columns.items() <= known.columns().items()


def probe(crew: Crew, entries: list[Entry], tell: Callable[[Event], None]) -> Generator[tuple[Probed, dict[str, Any]]]:
    """Each entry as probed, and the child's whole answer (see `worker.probe_video`)."""
    longest = crew.spec.max_seconds
    results = crew.results((crew.probe(e, i) for i, e in enumerate(entries)), len(entries))
    for i, entry in enumerate(entries):
        header = next(results).header
        tell(events.Probed(i + 1, len(entries)))
        if "seconds" in header and "failed" not in header:
            seconds = Fraction(header["seconds"])
            if slot_seconds(seconds) <= longest + 1:
                yield Probed(entry, seconds), header
                continue
            header = {"failed": "too_large", "message": f"lasts {float(seconds):.0f} s, {longest} s are allowed"}
        yield Probed(entry, failed=failure(*crew.failure(header, entry.path))), header
    results.close()


def without_picture(probed: list[tuple[Probed, dict[str, Any]]]) -> bool:
    """Whether there are good videos and none of them has a picture."""
    good = [bool(header["has_picture"]) for p, header in probed if not p.failed]
    return bool(good) and not any(good)


def longer(ledger: Ledger, spec: Spec) -> list[Probed]:
    """Videos that turned out longer than their slot, to be planned with their true length."""
    out = []
    for key, known in ledger.known.items():
        seconds = known.true_seconds()
        if seconds is None:
            continue
        plan, i = known.plan, known.index
        columns: dict[str, str | None] = {k: v for k, v in known.columns().items() if v is not None}
        entry = Entry(key, known.path, known.size, plan.start[i], plan.end[i], columns)
        if slot_seconds(seconds) > spec.max_seconds + 1:
            words = f"lasts {float(seconds):.0f} s, {spec.max_seconds} s are allowed"
            out.append(Probed(entry, failed=failure("too_large", words)))
        else:
            out.append(Probed(entry, seconds))
    return out


def write_plan(root: Path, spec: Spec, ledger: Ledger, probed: Iterable[Probed]) -> Plan:
    """Metadata with the new shapes, then the plan, then the ledger."""
    plan = make_plan(spec, probed, ledger.plans)
    groups.write_metadata(root, spec, ledger.shards + plan.shards)
    if not write_new(plan_path(root, plan.number), plan.to_bytes()):
        raise ConflictError(
            f"plan {plan.number} of {root} has just been written by another process",
            "the lock did not keep it out",
            "repeat the command; put the store on a filesystem with working flock if this comes again",
        )
    ledger.add_plan(plan)
    return plan
