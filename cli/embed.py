"""`avstore embed`: a run's embeddings, one row per second, into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.choose import open_store
from cli.store import Json, StoreArgument


def embed(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")],
    store: StoreArgument = None,
    checkpoint: Annotated[str, typer.Option(help="latest, or a step.")] = "latest",
    name: Annotated[str | None, typer.Option(help="Name in the store. Default: that of the run's folder.")] = None,
    every: Annotated[int, typer.Option(help="A row for each so many seconds.")] = 1,
    batch: Annotated[int | None, typer.Option(help="Clips at once.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop what another checkpoint wrote by this name.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")] = False,
    json: Json = False,
) -> None:
    """Write one embedding per second and tower into the store. Repeating the command fills what is missing."""
    from trainers import embed as embedding
    from trainers.run import find_run

    opened = open_store(store)
    found = find_run(run)
    chosen = found.checkpoint(checkpoint)
    if dry_run:
        _preview(opened, found, chosen, json)
        return
    options: dict[str, Any] = {k: v for k, v in (("name", name), ("batch", batch)) if v is not None}
    with console.Progress("embed", "seconds") as progress:

        def show(event: embedding.Event) -> None:
            progress.update(event.done, event.total, media=event.done)

        done = embedding.embed(
            found, opened, checkpoint, every=every, device=device, replace=replace, on_event=show, **options
        )
    if json:
        console.as_json(done.__dict__)
    what = f"{done.seconds} seconds" if done.shards else "nothing was left to do"
    console.say(f"{opened.path}: embeddings {done.name} of step {done.step} ({', '.join(done.towers)}): {what}")
    if not done.complete:
        console.say("tasks of this store are still to be ingested: repeat this command after the ingest")
    console.say(f"next: avstore query --video FILE {opened.path}, or avstore bench retrieval {opened.path}")


def _preview(store: Any, run: Any, checkpoint: Any, json: bool) -> None:
    import shutil

    seconds = int(store.slots[store.numbers].sum())
    value = {"run": str(run.path), "step": checkpoint.step, "store": str(store.path), "videos": len(store),
             "seconds": seconds, "free": shutil.disk_usage(store.path).free}  # fmt: skip
    if json:
        console.as_json(value)
    else:
        console.pairs([*((k, v) for k, v in value.items() if k != "free"), ("free disk", console.size(value["free"]))])
