"""`avstore query`: the nearest videos by sight or sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avstore.errors import NotFoundError, UsageError
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
    json: Json = False,
) -> None:
    """Find the videos whose sight or sound is nearest, and the second that matches best."""
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
    vector, own = _vector(opened, asked, modality, name, run)
    index = Index(*gallery, kind="ivf" if approximate else "exact")
    hits = index.search(vector, k, without=own if modality == target else None)[0]
    if approximate:
        console.say(f"approximate: recall@10 {index.recall:.3f} against exact search, measured on this index")
    rows = []
    for i, hit in enumerate(hits):
        found = opened[hit.video]
        rows.append({"rank": i + 1, "path": found.key, "second": hit.second, "label": found.columns.get("label"),
                     "score": round(hit.score, 6), "number": hit.video})  # fmt: skip
    if json:
        for row in rows:
            console.as_json(row)
        return
    console.columns(
        ["rank", "path", "second", "label", "score", "number"],
        [[r["rank"], r["path"], r["second"], r["label"] or "", f"{r['score']:.3f}", r["number"]] for r in rows],
    )


def _vector(store: Store, asked: str, modality: str, name: str, run: str | None) -> tuple[np.ndarray, int | None]:
    """The query's embedding (D,), its seconds averaged, and its number where it is a video of the store."""
    import numpy as np

    from avstore.index import normalised, read_rows, video_means

    path = Path(asked)
    if asked.isdigit() and not path.exists():
        number = store[int(asked)].number
        means, who = video_means(store, read_rows(store, name, modality), np.array([number]))
        if not len(who):
            raise NotFoundError(
                f"video {number} ({store.key(number)}) has no {modality} embeddings of {name}",
                f"it has {'no sound' if modality == 'audio' and not store.has_sound[number] else 'none in the store'}",
                "ask with another video, or embed it again",
            )
        return means[0], number
    if not path.is_file():
        raise NotFoundError(
            f"there is no file {path}", "a query is a media file, or the number of a video", "avstore ls lists numbers"
        )
    rows = _embed_file(store, path, modality, name, run)
    return normalised(normalised(rows).mean(axis=0, keepdims=True))[0], None


def _embed_file(store: Store, path: Path, modality: str, name: str, run: str | None) -> Any:
    """Embeddings (seconds, D) of a file that need not be in the store."""
    from trainers.embed import embed_file
    from trainers.run import find_run

    found = embed_file(find_run(run or name), store, path)
    if modality not in found:
        raise UsageError(f"{path} has no {'picture' if modality == 'video' else 'sound'}", f"--{modality} asks by it")
    return found[modality]
