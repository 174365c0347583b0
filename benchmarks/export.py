"""`avstore export`: what a store knows, as HDF5, for tools that read no Zarr.

    export_embeddings(store, "out.h5")                  # every run and tower: vectors, video numbers, seconds
    export_eccv16(store, "eccv16_mine.h5", "avid")      # the layout that DR-DSN and its followers share

Declared for `eccv16`: n_frames and picks count frames of the source file; the features of a pick are the embedding of
the second in which the tape shows the frame nearest to it (by the `source` array), so the picks of one second share
their row; segments are made of these rows by KTS, at most one border for every two seconds, and begin with the first
source frame of a second. A file appears whole or not at all. Reading it back is `annotations.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from avstore.durable import machine_errors, read_json, sync_folder, temporary
from avstore.errors import AvstoreError, ConflictError, NotFoundError, UsageError
from avstore.index import choose_run, embedded_runs, read_rows, seconds_of
from benchmarks.annotations import STRIDE, Annotated, Annotations
from benchmarks.kts import change_points, segments_of

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

WRONG_FILM = 0.01  # share of frames by which a video may differ from what its annotations say
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written: names of its groups, videos in them, rows in all, (key, why) of videos left out, and of those
    in which zeros stand for what they lack."""

    path: str
    groups: list[str]
    videos: int
    rows: int
    left_out: list[tuple[str, str]]
    filled: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def writing(path: str | os.PathLike[str], force: bool = False) -> Iterator[h5py.File]:
    """An HDF5 file that becomes `path` only when the block ends well. ConflictError where something is there already
    and `force` is not given; MachineError where it cannot be written."""
    out = Path(path)
    if out.exists() and (not force or out.is_dir()):
        raise ConflictError(
            f"{out} is there already",
            "a folder is never replaced" if out.is_dir() else "",
            "name another file" if out.is_dir() else "--force replaces it, or name another file",
        )
    tmp = temporary(out)
    with machine_errors(out):
        try:
            with h5py.File(tmp, "w") as file:
                yield file
            with open(tmp, "rb") as closed:
                os.fsync(closed.fileno())
            os.rename(tmp, out)
        except BaseException:
            with suppress(OSError):
                os.unlink(tmp)
            raise
        sync_folder(out.parent)


def export_embeddings(
    store: Store,
    path: str | os.PathLike[str],
    runs: Sequence[str] | None = None,
    numbers: NDArray[np.integer] | None = None,
    *,
    force: bool = False,
) -> Exported:
    """Embeddings with what is known of their videos.

        videos/number, seconds, key, and each column    one entry for each video; text, "" where it has none
        embeddings/<run>/<tower>/vectors                float16 (n, D), one row for each second that is there
        embeddings/<run>/<tower>/video, second          int64 (n,): number of its video, second on that video's clock

    Lineage lies in the attributes of each tower's group, as JSON. runs: default all; numbers: default all ok videos.
    NotFoundError for a run without embeddings here, ConflictError for a file that is there.
    """
    names = list(embedded_runs(store)) if runs is None else [choose_run(store, r) for r in runs]
    if not names:
        choose_run(store, None)  # raises: the store has none
    chosen = _numbers(store, numbers)
    groups, total = [], 0
    with writing(path, force) as file:
        file.attrs["avstore"] = json.dumps({"store": store.fingerprint, "format": 1})
        videos = file.create_group("videos")
        videos["number"] = chosen
        videos["seconds"] = np.array(store.column("seconds", chosen), np.float64)
        for name in ("key", *(c for c in store.columns if c not in ("key", "number", "seconds"))):
            values = ["" if v is None else str(v) for v in store.column(name, chosen)]
            videos.create_dataset(name.replace("/", "_"), data=values, dtype=h5py.string_dtype())
        for name in names:
            for tower in embedded_runs(store)[name]:
                vectors, video, second = seconds_of(store, read_rows(store, name, tower), chosen)
                group = file.create_group(f"embeddings/{name}/{tower}")
                group["vectors"], group["video"], group["second"] = vectors, video, second
                group.attrs["avstore"] = json.dumps(_lineage(store, name, tower))
                groups.append(f"embeddings/{name}/{tower}")
                total += len(vectors)
    return Exported(str(path), groups, len(chosen), total, [])


def _numbers(store: Store, numbers: NDArray[np.integer] | None) -> NDArray[np.int64]:
    chosen = np.asarray(store.numbers if numbers is None else numbers, np.int64)
    if not len(chosen):
        raise UsageError("no video is selected", "", "avstore ls STORE lists them")
    return chosen


def _lineage(store: Store, run: str, tower: str) -> dict[str, Any]:
    found = read_json(store.path / "embeddings" / run / tower / "zarr.json")["attributes"].get("avstore", {})
    return dict(found)


def source_frames(store: Store, number: int) -> tuple[NDArray[np.int64], int]:
    """(int64 (rows,), n): for each tape row of a video the source frame that it shows, counted from the video's first,
    and how many source frames it has. UsageError for a video without pictures."""
    rows = int(store.frames[number])
    if not rows:
        raise UsageError(f"{store.key(number)} has no pictures", "its frames cannot be counted")
    first = int(store.places[number]) * store.spec.fps
    shown = store._rows_of_source(np.arange(first, first + rows)).astype(np.int64)
    shown -= shown[0]
    whole = store[number].start is None and store[number].end is None
    # the last frames of a file may lie between two rows; of a segment only what the tape shows is its own
    n = max(int(shown[-1]) + 1, int(store.facts["source_frames"][number] or 0) if whole else 0)
    return shown, n


def rows_of_picks(shown: NDArray[np.int64], picks: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64: for each pick the first tape row that shows the source frame nearest to it, the earlier of two."""
    after = np.searchsorted(shown, np.minimum(picks, shown[-1]))
    before = np.searchsorted(shown, shown[np.maximum(after - 1, 0)])
    nearer = np.abs(shown[before] - picks) <= np.abs(shown[after] - picks)
    return np.where(nearer, before, after)


def require_film(key: str, frames: int, said: Annotated) -> None:
    """ConflictError where a video of `frames` frames cannot be the one that was annotated."""
    if abs(frames - said.n_frames) > WRONG_FILM * said.n_frames:
        raise ConflictError(
            f"{key} has {frames} frames, the annotations of {said.name} {said.n_frames}",
            "more than 1 % apart: another cut or rate of the film",
            "ingest the file that was annotated",
        )


def export_eccv16(
    store: Store,
    path: str | os.PathLike[str],
    run: str | None = None,
    tower: str | Sequence[str] = "video",
    numbers: NDArray[np.integer] | None = None,
    *,
    annotations: Annotations | None = None,
    trained: Run | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """A group for each video, `video_1` ... in the order of keys, with

        features float32 (n_steps, D), picks int64 (n_steps,): every 15th source frame; n_frames, n_steps;
        change_points int64 (m, 2), n_frame_per_seg int64 (m,), video_name (the key without its suffix)

    and with `annotations` (each of its videos must be in the selection, by the last part of its key) also user_summary
    float32 (U, n_frames), user_scores, gtscore and gtsummary; picks, n_frames and segments are then those of the
    annotations, and a file whose frames differ from them by more than 1 % is a ConflictError: the wrong film.

    tower: several are put side by side, each of unit length, over the root of their number; `joint` is the tower of
    that name where the run has one, else the outputs of the model over snippets of the run `trained` (`joint.py`).
    Videos without a row of each tower are left out and named; an annotated video without sound is in, with zeros for
    the rows of sound and of both that it cannot have (`zeroed`), and named as `filled`. run: default the only one.
    NotFoundError where the run has no such tower or no video has rows, UsageError for a tower that is named twice.
    """
    name = choose_run(store, run)
    chosen = _numbers(store, numbers)
    towers = [tower] if isinstance(tower, str) else list(tower)
    if not towers or len(set(towers)) < len(towers):
        raise UsageError(f"towers {', '.join(towers) or 'none'}", "each once, one at least", "--tower video")
    tower = " + ".join(towers)
    each = []
    for t in towers:
        if t == "joint" and trained is not None and t not in embedded_runs(store)[name]:
            from benchmarks.joint import joint_rows

            each.append(joint_rows(store, name, trained, chosen))
        else:
            each.append(read_rows(store, name, t))
    todo = matched(store, chosen, annotations)
    silent = [n for n, said in todo if said is not None and any(zeroed(store, n, t) for t in towers)]
    each = [
        _with_zeros(store, rows, [n for n in silent if zeroed(store, n, t)])
        for t, rows in zip(towers, each, strict=True)
    ]
    rows = each[0] if len(each) == 1 else _side_by_side(each)
    first = next((t for t in towers if t in embedded_runs(store)[name]), embedded_runs(store)[name][0])
    lineage = {**_lineage(store, name, first), "towers": towers}
    every = int(lineage.get("every", 1))
    left_out: list[tuple[str, str]] = []
    groups: list[str] = []
    total = 0
    with writing(path, force) as file:
        file.attrs["avstore"] = json.dumps({"store": store.fingerprint, "layout": "eccv16", **lineage})
        if annotations is not None:  # how its summaries are scored does not hang on what the file is called
            file.attrs["set"] = annotations.name
            if annotations.measure is not None:
                file.attrs["measure"] = annotations.measure
        for done, (number, said) in enumerate(todo):
            if progress is not None:
                progress(done, len(todo))
            key = store.key(number)
            if not store.has_picture[number]:
                left_out.append((key, "it has no pictures"))
                continue
            shown, frames = source_frames(store, number)
            if said is not None:
                require_film(key, frames, said)
            n = frames if said is None else said.n_frames
            picks = np.arange(0, n, STRIDE, dtype=np.int64) if said is None else said.picks
            second = rows_of_picks(shown, picks) // store.spec.fps // every * every
            place = int(store.places[number])
            inside = place + -(-len(shown) // store.spec.fps) <= len(rows)  # else it came after the last embed
            features = rows[place + second].astype(np.float32) if inside else np.full((1, 1), np.nan)
            if np.isnan(features).all():
                left_out.append((key, f"it has no {tower} embeddings of {name}"))
                continue
            if not np.isfinite(features).all():
                raise AvstoreError(
                    f"{tower} embeddings of {name} are not whole for {key}",
                    f"second {int(second[~np.isfinite(features).all(1)][0])} has none",
                    f"avstore embed {name} {store.path}",
                )
            segments = _segments(rows, place, shown, n, store.spec.fps, every) if said is None else said.segments
            group = file.create_group(f"video_{len(groups) + 1}")
            group["features"], group["picks"] = features, picks
            group["n_frames"], group["n_steps"] = n, len(picks)
            group["change_points"], group["n_frame_per_seg"] = segments, segments[:, 1] - segments[:, 0] + 1
            group["video_name"] = str(PurePosixPath(key).with_suffix("")) if said is None else said.name
            if said is not None:
                _people(group, said)
            groups.append(group.name.strip("/"))
            total += len(picks)
        if not groups:
            raise NotFoundError(
                f"no video of the selection has {tower} embeddings of {name}",
                "; ".join(f"{k}: {w}" for k, w in left_out[:3]),
                f"avstore embed {name} {store.path}",
            )
    missing = {key for key, _ in left_out}
    filled = [(store.key(n), "it is silent: zeros for its sound") for n in silent if store.key(n) not in missing]
    return Exported(str(path), groups, len(groups), total, left_out, filled)


def zeroed(store: Store, number: int, tower: str) -> bool:
    """Whether a video's rows of a tower are zeros in features for summaries, where silent videos count too: it shows
    pictures and has no sound, of which the tower is made."""
    return bool(store.has_picture[number]) and not store.has_sound[number] and not tower.startswith("video")


def _with_zeros(store: Store, rows: NDArray[np.floating], silent: Sequence[int]) -> NDArray[np.floating]:
    """Rows with zeros in the seconds of these videos; as they are where no other video has any."""
    if not len(silent) or not np.isfinite(rows).any():
        return rows
    out = rows.copy()
    for number in silent:
        place = int(store.places[number])
        out[place : place + int(-(-store.seconds(number) // 1))] = 0
    return out


def _side_by_side(each: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """(S, D1 + D2 + ...): rows of unit length, together of unit length; NaN where one of them is not there."""
    rows = min(len(x) for x in each)
    parts = [x[:rows].astype(np.float32) for x in each]
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in parts]
    out: NDArray[np.float32] = (np.concatenate(unit, axis=1) / np.sqrt(len(unit))).astype(np.float32)
    out[~np.isfinite(out).all(1)] = np.nan
    return out


def matched(
    store: Store, chosen: NDArray[np.int64], annotations: Annotations | None
) -> list[tuple[int, Annotated | None]]:
    """(number, what people said of it) in the order of the annotations, of keys where there are none. NotFoundError
    where an annotated video is not there once."""
    ordered = sorted(chosen.tolist(), key=store.key)
    if annotations is None:
        return [(n, None) for n in ordered]
    by_name: dict[str, list[int]] = {}
    for n in ordered:
        by_name.setdefault(PurePosixPath(store.key(n)).stem, []).append(n)
    out: list[tuple[int, Annotated | None]] = []
    wrong = []
    for said in annotations.videos.values():
        found = by_name.get(said.name.replace(" ", "_")) or by_name.get(said.name) or []
        if len(found) == 1:
            out.append((found[0], said))
        else:
            wrong.append(f"{said.name} ({len(found)} files)")
    if wrong:
        raise NotFoundError(
            f"{len(wrong)} of {len(annotations.videos)} annotated videos are not found once each in {store.path}",
            ", ".join(wrong[:5]),
            "file names without their suffix must be the names of the annotations",
        )
    return out


def _segments(
    rows: NDArray[np.floating], place: int, shown: NDArray[np.int64], n: int, fps: int, every: int
) -> NDArray[np.int64]:
    """int64 (m, 2) by KTS over the seconds' embeddings, in source frames."""
    seconds = np.arange(0, -(-len(shown) // fps), every)
    cuts = change_points(rows[place + seconds], most=len(seconds) * every // 2)
    first = shown[seconds[cuts] * fps]
    return segments_of(first, n)


def _people(group: Any, said: Annotated) -> None:
    group["user_summary"] = said.people.astype(np.float32)
    if said.graded:
        group["user_scores"] = said.scores
    mean = said.scores.mean(0)
    at = mean[said.picks]
    group["gtscore"] = ((at - at.min()) / (np.ptp(at) or 1.0)).astype(np.float32)
    group["gtsummary"] = (said.people.mean(0)[said.picks] >= 0.5).astype(np.float32)
