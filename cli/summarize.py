"""`avstore summarize`: the summary of a video, as a video with its sound, with its scores and stills as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avstore.errors import AvstoreError, ConflictError, NotFoundError, UsageError, did_you_mean
from cli import console
from cli.choose import open_store
from cli.store import Json


def summarize(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="Any media file.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.mp4", help="The summary.")],
    run: Annotated[list[str], typer.Option(metavar="RUN", help="A run's folder or name; repeat it to compare runs.")],
    store: Annotated[
        Path | None, typer.Option(help="Whose frame size and rates are used. Default: the run's own store.")
    ] = None,
    scores: Annotated[
        str, typer.Option(help="dr-dsn (trained on this video alone) or uniform (a control).")
    ] = "dr-dsn",
    share: Annotated[float, typer.Option(help="Of the video that is kept.")] = 0.15,
    tower: Annotated[
        list[str] | None, typer.Option(help="Whose features; repeatable: joined. Default: video, else audio.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="latest, or a step.")] = "latest",
    epochs: Annotated[int | None, typer.Option(help="Of DR-DSN. Default: 100.")] = None,
    seed: Annotated[int, typer.Option(help="Of DR-DSN.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: Json = False,
) -> None:
    """Write the summary of a video, with its sound, by the features of a run.

    Beside OUT.mp4: OUT.scores.png, the score over time and what was chosen, and OUT.sheet.jpg, stills of it. With two
    runs OUT.RUN.mp4 for each, and both in the same pictures.
    """
    if scores not in ("dr-dsn", "uniform"):
        raise UsageError(f"--scores {scores!r}", did_you_mean(scores, ["dr-dsn", "uniform"]))
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"-o {out.name}: the summary is an mp4", "", f"-o {out.with_suffix('.mp4').name}")
    if not video.is_file():
        raise NotFoundError(f"there is no file {video}", "a summary is of a media file", "give its path")
    from avstore.codecs import encode_jpeg
    from avstore.durable import write_atomic
    from benchmarks.card import png
    from benchmarks.excerpt import stills, write_excerpt
    from benchmarks.sheet import as_store
    from benchmarks.strips import curves, moments, sheet
    from benchmarks.video_summary import summarise, with_seed
    from trainers.run import find_run

    runs = [find_run(r) for r in run]
    films = [out] if len(runs) == 1 else [out.with_suffix(f".{r.name}.mp4") for r in runs]
    curve, contact = out.with_suffix(".scores.png"), out.with_suffix(".sheet.jpg")
    if len(set(films)) < len(films):
        raise UsageError("two runs of one name", ", ".join(str(r.path) for r in runs), "summarize with one at a time")
    for path in (*films, curve, contact):
        if path.exists() and (not force or path.is_dir() or path.samefile(video)):
            raise ConflictError(f"{path} is there already", "", "--force replaces it, or another -o")
        if not path.parent.is_dir():
            raise NotFoundError(f"there is no folder {path.parent}", "", f"mkdir -p {path.parent}")
    found = []
    with console.Progress("summary", "steps") as progress, as_store(video, _store_of(store, runs[0])) as one:
        total = 2 * len(runs) + 2
        progress.update(1, total)
        for r in runs:
            found.append(
                summarise(one, r, checkpoint=checkpoint, towers=tower or (), by=scores, share=share,
                          config=with_seed(seed, epochs), device=device)
            )  # fmt: skip
            progress.update(1 + len(found), total)
        progress.stage_is("writing")
        written = []
        for s, film in zip(found, films, strict=True):
            written.append(write_excerpt(video, s.intervals, film, force))
            progress.update(1 + len(found) + len(written), total)
        write_atomic(curve, png(curves(found)))
        times = [moments(s) for s in found]
        flat = stills(video, [t for each in times for t in each])
        if flat:
            parts, at = [], 0
            for each in times:
                parts.append(flat[at : at + len(each)])
                at += len(each)
            write_atomic(contact, encode_jpeg(sheet(found, times, parts), 90))
    made = [*films, curve, *([contact] if flat else [])]
    if json:
        console.as_json({"files": [str(p) for p in made], "summaries": [s.to_json() for s in found]})
    for s, film, w in zip(found, films, written, strict=True):
        what = f"{w.frames} pictures" if w.frames else "no pictures"
        sound = f"{w.samples} samples of sound" if w.samples else "no sound"
        console.say(console.visible(f"{film}: {float(s.kept):.1f} of {float(s.seconds):.1f} s, {what}, {sound}"))
        console.say(console.visible(f"  scores: {s.told}"))
    console.say(console.visible("pictures: " + ", ".join(str(p) for p in made[len(films) :])))


def _store_of(given: Path | None, run: Any) -> Any:
    """The store named, else the one that the run was trained on, where it still is, else as every command chooses."""
    own = Path(run.snapshot.store)
    if given is not None or (own / "zarr.json").is_file():
        return open_store(own if given is None else given)
    try:
        return open_store(None)
    except AvstoreError as e:
        why = f"frame size and rates are a store's, and {run.name}'s own is not at {own}; {e.what}"
        raise NotFoundError("no store is named", why, "--store STORE: the run's, or another of its frame size") from e
