"""`avstore ingest`: a folder of media into a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avstore.errors import UsageError
from cli import console
from cli.choose import number_pair

if TYPE_CHECKING:
    from avstore.events import Event, Summary

SHOWN = 10  # failures and oddities named one by one


def ingest(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="A folder, read recursively, one file, or a list of files (csv, tsv, jsonl, txt)."
        ),
    ],
    store: Annotated[Path | None, typer.Argument(metavar="[STORE]", help="Default: <name of SRC>.zarr here.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="112: 128x176 at 16 fps (default); 224: 256x352 at 16 fps.")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Frame size, multiples of 16, H <= W.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the tape.")] = None,
    sample_rate: Annotated[int | None, typer.Option(help="Hz of the sound, mono. Default 24000.")] = None,
    quality: Annotated[int | None, typer.Option(help="JPEG quality, 1 to 100. Default 90.")] = None,
    front_end: Annotated[
        list[str] | None,
        typer.Option(help="Spectrogram to store, repeatable; `none`: none. Default crisscross-mel80."),
    ] = None,
    fit: Annotated[str | None, typer.Option(help="short (default), pad or stretch.")] = None,
    codec: Annotated[str | None, typer.Option(help="jpeg (default) or raw.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Where the paths of a list begin. Default: the list's folder.")
    ] = None,
    list_kind: Annotated[str | None, typer.Option(help="Which official list it is; default: as it looks.")] = None,
    workers: Annotated[int | None, typer.Option(help="Decoding processes. Default: the CPUs.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="i/n", help="Only this share of the tasks; others do the rest.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed files again.")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Also files that have another size now.")] = False,
    moved: Annotated[bool, typer.Option("--moved", help="The source folder has another path now.")] = False,
    decode: Annotated[
        str, typer.Option(help="Who decodes pictures: pyav (the CPU), dali (the GPU), auto: dali where it works.")
    ] = "pyav",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Events and the summary as JSON lines on stdout.")] = False,
) -> None:
    """Decode videos once into a store. Repeating the command resumes; new files are appended."""
    import signal
    import threading

    from avstore.ingest import ingest as library_ingest

    options: dict[str, Any] = {
        "fps": fps,
        "sample_rate": sample_rate,
        "quality": quality,
        "fit": fit,
        "codec": codec,
        "front_ends": None if not front_end else () if front_end == ["none"] else tuple(front_end),
    }
    given = {k: v for k, v in options.items() if v is not None}
    picture = _size(size) if size else None
    share = number_pair(shard, "--shard") if shard else None
    if dry_run:
        _preview(
            source, store, json, root=root, list_kind=list_kind, profile=profile, size=picture, workers=workers,
            retry_failed=retry_failed, changed=changed, **given,
        )  # fmt: skip
        return
    show = _Show(json)
    stop = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # as Slurm ends jobs: stop cleanly
    try:
        with show.progress:
            summary = library_ingest(
                source,
                store,
                root=root,
                list_kind=list_kind,
                profile=profile,
                size=picture,
                workers=workers,
                shard=share,
                retry_failed=retry_failed,
                changed=changed,
                moved=moved,
                on_event=show,
                stop=stop,
                decode=decode,
                **given,
            )
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    show.end(summary)
    if summary.exit_code:
        raise typer.Exit(summary.exit_code)


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not x or not height.isdigit() or not width.isdigit():
        raise UsageError(f"--size {text!r}", "height x width in pixels", "e.g. --size 128x176")
    return int(height), int(width)


class _Show:
    """Turns the events of an ingest into progress lines, or JSON lines."""

    def __init__(self, json: bool) -> None:
        self.json = json
        self.progress = console.Progress("ingest", "files")
        self.total = self.done = self.failed = 0
        self.media = 0.0

    def __call__(self, event: Event) -> None:
        from avstore import events

        if self.json:
            console.as_json({"event": type(event).__name__, **event.__dict__})
        if isinstance(event, events.Listed):
            console.say(f"{event.files} files, {event.new} of them new")
        elif isinstance(event, events.Decoding):
            console.say(f"pictures by {event.decoder}: {event.why}")
        elif isinstance(event, events.Waiting):
            console.say(f"waiting: {console.visible(event.holder.get('host', 'another process'))} is planning")
        elif isinstance(event, events.Probed):
            self.progress.stage_is("probe")
            self.progress.update(event.done, event.total)
        elif isinstance(event, events.Planned):
            console.say(f"planned {event.videos} videos, {console.duration(event.seconds)}, in {event.tasks} tasks")
        elif isinstance(event, events.Started):
            self.progress.stage_is("ingest")
            self.total, self.done = event.videos, 0
        elif isinstance(event, events.VideoDone):
            self.done += 1
            self.media += event.seconds
            self.failed += event.reason is not None
            self.total = max(self.total, self.done)
            self.progress.update(self.done, self.total, media=self.media, failed=self.failed)

    def end(self, s: Summary) -> None:
        if self.json:
            value = {**s.__dict__, "reasons": dict(s.reasons), "exit_code": s.exit_code}
            console.as_json({"event": "Summary", **value})
        state = (
            f"{s.ok} ok" + (f", {s.failed} failed" if s.failed else "") + (f", {s.pending} to do" if s.pending else "")
        )
        if s.done:
            rate = f"{s.done / max(s.wall, 1e-9):.3g} files/s, {s.seconds / max(s.wall, 1e-9):.3g} x real time"
            console.say(
                f"{s.store}: {state}; {s.done} done in {console.duration(s.wall)} ({rate}), {console.size(s.size)}"
            )
        else:
            console.say(f"{s.store}: {state}; nothing was left to do")
        if s.listed:
            console.say(console.visible(s.listed))
        if s.note:
            console.warn(console.visible(s.note))
        if s.skipped:
            console.say(
                f"{len(s.skipped)} other files were not tried, e.g. {_list(f'{p} ({w})' for p, w in s.skipped[:3])}"
            )
        if s.failed:
            console.warn("failed: " + ", ".join(f"{n} {reason}" for reason, n in sorted(s.reasons.items())))
            for key, reason, message in s.failures[:SHOWN]:
                console.say(f"  {console.visible(key)}: {reason}{f', {console.visible(message)}' if message else ''}")
            if s.failed > SHOWN:
                console.say(f"  ... avstore ls {s.store} --failed lists all")
        for word, keys, what in (
            ("changed", s.changed, "--changed ingests them again"),
            ("gone from the source", s.removed, "they stay in the store"),
        ):
            if keys:
                console.warn(f"{len(keys)} files are {word}, e.g. {_list(keys[:3])}: {what}")
        if s.ok and not s.pending:
            console.say(f"next: {_next(s.store)}")


def _next(store: Path) -> str:
    """What to type after an ingest: a training where some video is both seen and heard."""
    from avstore.catalogue import Catalogue

    there = Catalogue(store)
    both = (there.has_picture & there.has_sound)[there.numbers].any()
    return f"avstore train avid-cma {store}" if both else f"avstore ls {store}"


def _list(texts: Any) -> str:
    return ", ".join(console.visible(t) for t in texts)


def _preview(source: Path, store: Path | None, json: bool, **how: Any) -> None:
    """What an ingest would do: counts, hours, bytes, time, free disk, what the files are like. Writes nothing."""
    from avstore import events
    from avstore.estimate import estimate

    with console.Progress("probe", "files") as progress:

        def show(event: Event) -> None:
            if isinstance(event, events.Probed):
                progress.update(event.done, event.total)

        out = estimate(source, store, on_event=show, **how)
    if json:
        console.as_json(out.to_json())
        return
    spec = out.spec
    some = f" (from {out.probed} of them)" if out.probed < out.new else ""
    planned = f", {out.pending_tasks} tasks of it planned" if out.pending_tasks else ""
    skipped = f", e.g. {_list(f'{p} ({w})' for p, w in out.skipped[:3])}" if out.skipped else ""
    time = "unknown: nothing could be decoded"
    if out.wall is not None:
        time = f"{console.duration(out.wall)} with {out.workers} workers (timed on {out.sampled} videos)"
    rows = [
        ("store", out.store),
        ("clock", (f"{spec['height']}x{spec['width']} at {spec['fps']} fps, " if spec["picture"] else "")
                  + f"{spec['sample_rate']} Hz mono"),
        ("files", f"{out.files}, {console.size(out.bytes)}; {out.new} new, {console.size(out.new_bytes)}"),
        ("to do", f"{console.duration(out.hours * 3600)} of media{some}{planned}"),
        ("time", time),
        ("store grows by", "unknown" if out.size is None else f"about {console.size(out.size)}"),
        ("free disk", console.size(out.free)),
        *([("list", out.listed)] if out.listed else []),
        ("suffixes", _counts(out.suffixes)),
        ("frame rates", _counts(out.frame_rates)),
        ("sizes", _counts(out.sizes)),
        ("sound rates", _counts(out.sound_rates)),
        ("would fail", _counts(out.failed) if out.failed else "none that a probe can tell"),
        ("not tried", f"{len(out.skipped)}{skipped}"),
    ]  # fmt: skip
    console.pairs(rows)
    if out.note:
        console.say(out.note)
    if not out.fits:
        console.warn("the disk is too small for it")


def _counts(counts: dict[str, int], most: int = 8) -> str:
    shown = [f"{n} {k}" for k, n in list(counts.items())[:most]]
    return ", ".join(shown) + (f", {len(counts) - most} more kinds" if len(counts) > most else "")
