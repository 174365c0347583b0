"""Estimate: what an ingest would do, without doing it. Nothing is written: no store, no folder, no log.

The source is listed as by an ingest, files are probed, and a sample of them is decoded against the clock. Where there
are very many files, a seeded sample is probed and its sums are scaled; `probed` says how many it was.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from avstore import groups, planning
from avstore.children import Job
from avstore.crew import Crew
from avstore.errors import UsageError
from avstore.events import Event
from avstore.ledger import Ledger
from avstore.plan import Probed, slot_seconds, split_failure
from avstore.sources import Entry
from avstore.spec import Spec

MOST_PROBED = 2000  # files; of more, so many are drawn
SAMPLE = 32  # videos that are decoded
SAMPLE_SECONDS = 10  # of each at most
SAMPLE_WALL = 20.0  # seconds of the clock after which no further video of the sample is begun


@dataclass
class Estimate:
    """`files` to try, `new` ones that would be planned; `hours`, `size` and `wall` are of the new ones and of tasks
    that were planned but not done. `wall`: seconds with `workers` children, None where nothing could be timed."""

    store: str
    spec: dict[str, Any]
    files: int
    bytes: int  # of the files
    new: int
    new_bytes: int
    probed: int
    hours: float
    size: int | None  # bytes that the store would grow by
    wall: float | None
    workers: int
    sampled: int  # videos that were decoded for the timing
    free: int  # bytes on the store's disk
    pending_tasks: int
    suffixes: dict[str, int] = field(default_factory=dict)  # of all files, most frequent first
    frame_rates: dict[str, int] = field(default_factory=dict)  # of what was probed
    sizes: dict[str, int] = field(default_factory=dict)  # width x height, as coded
    sound_rates: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)  # reason -> probed files that would fail for it
    skipped: list[tuple[str, str]] = field(default_factory=list)  # path, why it would not be tried
    listed: str | None = None  # one line about a list
    note: str | None = None

    @property
    def fits(self) -> bool:
        return self.size is None or self.size < self.free

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "skipped": len(self.skipped), "fits": self.fits}


def estimate(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    list_kind: str | None = None,
    profile: str | None = None,
    size: tuple[int, int] | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    changed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    **options: Any,
) -> Estimate:
    """What `ingest` with these arguments would do. Raises as `ingest` does, but for locks and full disks.

    `on_event` gets a Probed per file.
    """
    given = planning.given_fields(profile, size, options)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", "at least one has to work", "leave --workers away: one per CPU")
    source = Path(source)
    target = Path(store) if store is not None else planning.default_store(source)
    listing, report = planning.read(source, target, root, list_kind)
    there = groups.is_store(target)
    spec = planning.open_spec(target, given) if there else Spec(**given)
    ledger = Ledger(target)
    entries = listing.entries
    new = [e for e in entries if planning.wanted(ledger, e, retry_failed, changed)]
    drawn = new if len(new) <= MOST_PROBED else random.Random(0).sample(new, MOST_PROBED)
    out = Estimate(
        store=target.name if store is None else str(target),
        spec=spec.to_json(),
        files=len(entries),
        bytes=sum(e.size for e in entries),
        new=len(new),
        new_bytes=sum(e.size for e in new),
        probed=len(drawn),
        hours=0.0,
        size=None,
        wall=None,
        workers=0,
        sampled=0,
        free=_free(target),
        pending_tasks=len(ledger.pending()),
        suffixes=dict(Counter(os.path.splitext(e.path)[1].lower() or "(none)" for e in entries).most_common()),
        skipped=listing.skipped,
        listed=None if report is None else str(report),
    )
    with (
        tempfile.TemporaryDirectory() as spools,
        Crew(listing.root, spec, Path(spools), workers=workers, stop=stop) as crew,
    ):
        out.workers = crew.workers
        began = time.monotonic()
        probed = list(planning.probe(crew, drawn, on_event)) if drawn else []
        probing = time.monotonic() - began
        _describe(out, probed)
        scale = len(new) / len(drawn) if drawn else 0.0
        if not there and planning.without_picture(probed):
            crew.use(Spec(**given, picture=False))
            out.spec, out.note = crew.spec.to_json(), "no file has a picture: it would be an audio store"
        waiting = _waiting(ledger)
        seconds = scale * sum(float(p.seconds) for p, _ in probed) + sum(s for _, s in waiting)
        out.hours = seconds / 3600
        good = [(p.entry, float(p.seconds)) for p, _ in probed if not p.failed] or waiting
        timed = _sample(crew, good)
        if timed is not None:
            out.sampled, media, wall, size_there = timed
            out.wall = seconds * wall / media + scale * probing
            out.size = round(seconds * size_there / media)
    return out


def _waiting(ledger: Ledger) -> list[tuple[Entry, float]]:
    """Videos that are planned and not done, with the seconds of their slots."""
    out = []
    for plan, task in ledger.pending():
        for n in task.videos:
            i = n - plan.first_video
            if plan.probe[i] is None:
                entry = Entry(plan.key[i], plan.path[i], plan.bytes[i], plan.start[i], plan.end[i])
                out.append((entry, float(plan.seconds[i])))
    return out


def _describe(out: Estimate, probed: list[tuple[Probed, dict[str, Any]]]) -> None:
    """The histograms."""
    rates, sizes, sounds, failed = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for p, header in probed:
        if p.failed:
            failed[split_failure(p.failed)[0]] += 1
            continue
        if header["has_picture"]:
            fps = header["source_fps"]
            rates["one picture" if header["single_picture"] else _rate(fps)] += 1
            sizes[f"{header['width']}x{header['height']}"] += 1
        else:
            sizes["no picture"] += 1
        sounds[f"{header['sample_rate']} Hz" if header["has_sound"] else "no sound"] += 1
    out.frame_rates, out.sizes, out.sound_rates, out.failed = (
        dict(c.most_common()) for c in (rates, sizes, sounds, failed)
    )


def _rate(fps: str | None) -> str:
    return "unknown" if fps is None else f"{float(Fraction(fps)):.5g} fps"


def _sample(crew: Crew, good: list[tuple[Entry, float]]) -> tuple[int, float, float, int] | None:
    """Decodes beginnings of some videos: how many, their seconds of media, of the clock, bytes. None: nothing decodes.

    Long ones first, so that no child is alone at the end.
    """
    if not good:
        return None
    some = random.Random(1).sample(good, min(SAMPLE, len(good)))
    some.sort(key=lambda x: (-min(x[1], SAMPLE_SECONDS), x[0].key))
    began = time.monotonic()

    def jobs() -> Iterator[Job]:
        for number, (entry, seconds) in enumerate(some):
            if time.monotonic() - began > SAMPLE_WALL and number >= crew.workers:
                return
            end, start = entry.end, entry.start
            if seconds > SAMPLE_SECONDS:
                end = str(Fraction(start or 0) + SAMPLE_SECONDS)
                seconds = SAMPLE_SECONDS
            yield crew.decode(entry.path, start, end, slot_seconds(Fraction(seconds)) + 1, number)

    crew.versions()  # a child is there, whatever its start takes
    began = time.monotonic()
    count, media, size = 0, 0.0, 0
    for result in crew.results(jobs(), len(some)):
        facts = result.header.get("facts")
        if facts is None or result.payloads is None:
            continue
        count += 1
        media += facts["frames"] / crew.spec.fps if facts["frames"] else facts["samples"] / crew.spec.sample_rate
        size += result.header["size"]
    wall = time.monotonic() - began
    return (count, media, wall, size) if media else None


def _free(target: Path) -> int:
    """Bytes that are free on the disk where the store is or would be."""
    folder = Path(os.path.abspath(target))
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


__all__ = ["Estimate", "estimate"]
