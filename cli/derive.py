"""`avstore derive`: further spectrograms of a store, from its waveform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.choose import store_path
from cli.store import Json, StoreArgument

if TYPE_CHECKING:
    from avstore.derive import DeriveDone, DeriveStarted


def derive(
    store: StoreArgument = None,
    front_end: Annotated[str, typer.Option(metavar="NAME", help="Which spectrogram, e.g. avid-linear257.")] = ...,  # type: ignore[assignment]
    workers: Annotated[int | None, typer.Option(help="Threads. Default: the CPUs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    json: Json = False,
) -> None:
    """Store the spectrograms of another front-end, without decoding again. Repeating the command resumes."""
    import shutil

    from avstore.derive import DeriveStarted, outstanding
    from avstore.derive import derive as library_derive

    path = store_path(store)
    if dry_run:
        value = {"store": str(path), "front_end": front_end, **outstanding(path, front_end)}
        value["free"] = shutil.disk_usage(path).free
        if json:
            console.as_json(value)
        else:
            sizes = ("bytes", "free")
            console.pairs((k, console.size(v) if k in sizes else v) for k, v in value.items())
        return
    total = 0
    with console.Progress("derive", "tasks") as progress:

        def show(event: DeriveStarted | DeriveDone) -> None:
            nonlocal total
            if isinstance(event, DeriveStarted):
                total = event.tasks
            else:
                progress.update(total - event.left, total)

        done = library_derive(path, front_end, workers=workers, on_event=show)
    if json:
        console.as_json({k: v for k, v in done.__dict__.items() if k != "path"} | {"path": str(done.path)})
    if done.note:
        console.say(console.visible(done.note))
    console.say(f"{done.path}: {done.videos} videos; {done.tasks} tasks, {console.size(done.size)} written now")
    if done.pending:
        console.say(f"{done.pending} tasks are still to be ingested: repeat this command after the ingest")
