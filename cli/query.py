"""`avstore query`: the nearest videos by sight or sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avstore.errors import ConflictError, NotFoundError, UsageError
from cli import console
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument

if TYPE_CHECKING:
    import numpy as np

    from avstore.store import Store


def query(
    store: StoreArgument = None,
    video: Annotated[
        str | None, typer.Option(metavar="FILE|NUMBER", help="Ask by sight: any file, or a video of the store.")
    ] = None,
    audio: Annotated[
        str | None, typer.Option(metavar="FILE|NUMBER", help="Ask by sound: any file, or a video of the store.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="video or audio: what is compared. Default: as asked.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many.")] = 5,
    run: Annotated[str | None, typer.Option(help="Whose embeddings. Default: the only ones in the store.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only videos with column=value; repeatable.")] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="An IVF index: faster on millions of rows; its recall is printed.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also one page with moving pictures and players; no network.")
    ] = None,
    json: Json = False,
) -> None:
    """Find the videos whose sight or sound is nearest, and the second that matches best.

    The score of a video is the largest cosine between any second of the query and any of its own.
    """
    if (video is None) == (audio is None):
        raise UsageError(
            "a query needs --video or --audio" if video is None else "--video and --audio exclude each other",
            "a file or the number of a video in the store",
            "avstore query --video clip.mp4, or avstore query --audio 12 --to video",
        )
    asked, modality = (video, "video") if video is not None else (audio, "audio")
    assert asked is not None
    target = to if to is not None else modality
    if target not in ("video", "audio"):
        raise UsageError(f"--to {target!r}", "video or audio")
    if k < 1:
        raise UsageError(f"-k {k}", "at least one")
    from avstore.index import Index, choose_run, read_rows, seconds_of

    opened = open_store(store)
    name = choose_run(opened, run)
    chosen = opened.select(**selection(where, None, None, 0)).numbers
    gallery = seconds_of(opened, read_rows(opened, name, target), chosen)
    if not len(gallery[1]):
        raise NotFoundError(
            f"no video of the selection has {target} embeddings of {name}", "", "avstore embed RUN STORE"
        )
    rows_asked, seconds_asked, own = _vectors(opened, asked, modality, name, run)
    index = Index(*gallery, kind="ivf" if approximate else "exact")
    best: dict[int, tuple[float, int, int]] = {}  # video -> score, its second, the query's
    found_each = index.search(rows_asked, k, without=own if modality == target else None)
    for second, hits in zip(seconds_asked.tolist(), found_each, strict=True):
        for hit in hits:
            best[hit.video] = max(best.get(hit.video, (-2.0, 0, 0)), (hit.score, hit.second, second))
    if approximate:
        console.say(f"approximate: recall@10 {index.recall:.3f} against exact search, measured on this index")
    rows = []
    for i, (number, (score, at, asked_at)) in enumerate(sorted(best.items(), key=lambda v: (-v[1][0], v[0]))[:k]):
        found = opened[number]
        rows.append({"rank": i + 1, "path": found.key, "second": at, "label": found.columns.get("label"),
                     "score": round(score, 6), "number": number, "query_second": asked_at})  # fmt: skip
    if html is not None:
        across = f" to {target}" if target != modality else ""
        _page(html, opened, rows, asked, own, f"{name}, by {modality}{across}")
    if json:
        for row in rows:
            console.as_json(row)
        return
    console.columns(
        ["rank", "path", "second", "label", "score", "number"],
        [[r["rank"], r["path"], r["second"], r["label"] or "", f"{r['score']:.3f}", r["number"]] for r in rows],
    )


def _page(file: Path, store: Store, rows: list[dict[str, Any]], asked: str, own: int | None, how: str) -> None:
    """The query and its answers as one HTML file."""
    from avstore.durable import write_atomic
    from benchmarks.page import page
    from benchmarks.sheet import answers, as_store

    if own is not None:
        parts = answers(store, rows, query=store.key(own), query_store=store, query_video=own)
    else:
        with as_store(Path(asked), store) as one:
            number = int(one.numbers[0])
            parts = answers(store, rows, query=Path(asked).name, query_store=one, query_video=number)
    write_atomic(file, page("Nearest videos", f"{how}, in {store.path.name}", parts).encode())
    console.say(f"wrote {file} ({console.size(file.stat().st_size)}): open it in a browser")


def _vectors(
    store: Store, asked: str, modality: str, name: str, run: str | None
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """The query's embeddings (s, D), the second of each, and its number where it is a video of the store."""
    import numpy as np

    from avstore.index import read_rows, seconds_of

    path = Path(asked)
    if asked.isdigit() and not path.exists():
        number = store[int(asked)].number
        rows, _, seconds = seconds_of(store, read_rows(store, name, modality), np.array([number]))
        if not len(rows):
            raise NotFoundError(
                f"video {number} ({store.key(number)}) has no {modality} embeddings of {name}",
                f"it has {'no sound' if modality == 'audio' and not store.has_sound[number] else 'none in the store'}",
                "ask with another video, or embed it again",
            )
        return rows, seconds, number
    if not path.is_file():
        raise NotFoundError(
            f"there is no file {path}", "a query is a media file, or the number of a video", "avstore ls lists numbers"
        )
    from benchmarks.lineage import maker, step_of
    from trainers.embed import embed_file
    from trainers.run import find_run

    made = maker(store, name, run)
    if made is None:
        made = find_run(run or name)  # says that there is none, or which configuration is another
        raise ConflictError(
            f"the embeddings {name} were not made by {made.path}",
            "a query must come from the same networks",
            f"name their run with --run, or avstore embed {made.path} {store.path} --name {name} --replace",
        )
    found = embed_file(made, store, path, which=step_of(store, name, made))
    if modality not in found:
        raise UsageError(f"{path} has no {'picture' if modality == 'video' else 'sound'}", f"--{modality} asks by it")
    return found[modality], np.arange(len(found[modality])), None
