"""What people thought of the videos of SumMe and TVSum, read from the files that their makers publish.

    read("SumMe/")      the folder with GT/*.mat, and example_summary_and_segments.json for segments
    read("TVSum/")      ydata-tvsum50.mat with shot_TVSum.mat for segments
    read("eccv16.h5")   the HDF5 layout that DR-DSN's followers share: features, picks, change points, user summaries

Which F-score a set's papers print (SumMe the best over people, TVSum the mean) is said by the set, or by the attributes
`set` and `measure` that `avstore export` writes into HDF5; the shared file of others says nothing, and is scored as
whoever asks for it says (`bench summarize --measure`).

Not here: what is made of them (`summary.py`), and writing that layout (`avstore export`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from avstore.errors import CorruptError, NotFoundError, UsageError
from benchmarks.summary import summary_of

MEASURES = ("best", "mean")
STRIDE = 15  # frames between those that are scored, in all of this literature


@dataclass(frozen=True)
class Annotated:
    """One video as people saw it. `people`: bool (U, n_frames), their summaries; `scores`: float32 (U, n_frames), what
    they thought of each frame (SumMe: 1 where chosen); `segments`: int64 (m, 2), first and last frame, inclusive;
    `machine`: bool (n_frames,), a summary that came with the set; `features`: float32 (n_picks, D) of an HDF5 file."""

    name: str
    n_frames: int
    people: NDArray[np.bool_]
    scores: NDArray[np.float32]
    segments: NDArray[np.int64]
    picks: NDArray[np.int64]
    machine: NDArray[np.bool_] | None = None
    features: NDArray[np.float32] | None = None
    graded: bool = True  # False: no scores were given, `scores` repeats the summaries


@dataclass(frozen=True)
class Annotations:
    """A set: its videos by name (of an HDF5 file: by group, as split files name them), and which F-score its papers
    print: `best` over people, `mean`, or None where the file does not say."""

    name: str
    measure: str | None
    videos: dict[str, Annotated]


def read(path: str | os.PathLike[str]) -> Annotations:
    """The set at `path`; which one is seen from its files. NotFoundError, UsageError, CorruptError."""
    p = Path(path)
    if not p.exists():
        raise NotFoundError(f"no annotations at {p}", "", "a folder of SumMe or TVSum, or an HDF5 file")
    if p.is_file():
        return _eccv16(p)
    for sub in (p, p / "SumMe"):
        if (sub / "GT").is_dir():
            return _summe(sub)
    for sub in (p, p / "TVSum"):
        if (sub / "ydata-tvsum50.mat").is_file():
            return _tvsum(sub)
    raise UsageError(
        f"{p} holds no annotations that are known",
        "SumMe has GT/*.mat, TVSum ydata-tvsum50.mat",
        "name the folder that holds them, or an HDF5 file",
    )


def _picks(n_frames: int) -> NDArray[np.int64]:
    return np.arange(0, n_frames, STRIDE, dtype=np.int64)


def _segments(starts: Any, n_frames: int) -> NDArray[np.int64]:
    """From the first frames of segments, with or without 0 and n_frames among them."""
    first = np.unique(np.clip(np.concatenate([[0], np.asarray(starts, np.int64).reshape(-1)]), 0, n_frames))
    first = first[first < n_frames]
    return np.stack([first, np.concatenate([first[1:] - 1, [n_frames - 1]])], 1)


def _summe(folder: Path) -> Annotations:
    extra = folder / "example_summary_and_segments.json"
    given = _machine(extra) if extra.is_file() else {}
    videos = {}
    files = sorted((folder / "GT").glob("*.mat"))
    if not files:
        raise NotFoundError(f"no .mat file in {folder / 'GT'}", "", "SumMe's ground truth is one file for each video")
    for file in files:
        try:
            mat = loadmat(file)
            chosen = np.asarray(mat["user_score"]) > 0
        except (ValueError, KeyError, TypeError, OSError) as e:
            raise CorruptError(f"{file} cannot be read", f"{type(e).__name__}: {e}", "copy it anew") from e
        n = len(chosen)
        machine, starts = given.get(file.stem, (None, None))
        if machine is not None and len(machine) != n:
            raise CorruptError(f"{file.stem}: a summary of {len(machine)} frames for a video of {n}", f"in {extra}",
                               "copy it anew, or remove it: segments are then of two seconds")  # fmt: skip
        if starts is None:  # two seconds each, at the frame rate that the file states
            rate = float(np.asarray(mat["FPS"]).item()) if "FPS" in mat else 30.0
            starts = np.arange(0, n, max(1, round(2 * rate)))
        people = np.ascontiguousarray(chosen.T)
        videos[file.stem] = Annotated(
            file.stem, n, people, people.astype(np.float32), _segments(starts, n), _picks(n), machine, graded=False
        )
    return Annotations("SumMe", "best", videos)


def _machine(file: Path) -> dict[str, tuple[NDArray[np.bool_] | None, NDArray[np.int64] | None]]:
    """{video: (summary, first frames of segments)} of the JSON beside SumMe; CorruptError where it is none."""
    try:
        out = {}
        for name, here in json.loads(file.read_text(encoding="utf-8")).items():
            machine = np.asarray(here["summary"], np.float64) if here else None
            if machine is not None and (machine.ndim != 1 or not np.isin(machine, (0, 1)).all()):
                raise ValueError(f"the summary of {name} is no list of 0 and 1")
            starts = np.asarray(here["segment"], np.int64) if "segment" in here else None
            out[name] = (None if machine is None else machine.astype(bool), starts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise CorruptError(
            f"{file} cannot be read",
            f"{type(e).__name__}: {e}",
            "copy it anew, or remove it: segments are then of two seconds",
        ) from e
    return out


def _tvsum(folder: Path) -> Annotations:
    """A person's summary is made of the scores as a machine's is: best segments within 15 %."""
    shots_file = folder / "shot_TVSum.mat"
    videos = {}
    try:
        shots = loadmat(shots_file)["shot_boundaries"] if shots_file.is_file() else None
        with h5py.File(folder / "ydata-tvsum50.mat", "r") as file:
            table = file["tvsum50"]
            for i in range(table["video"].shape[0]):
                name = "".join(chr(c) for c in file[table["video"][i, 0]][()].reshape(-1))
                scores = file[table["user_anno"][i, 0]][()].astype(np.float32)
                n = scores.shape[1]
                starts = np.arange(0, n, 60) if shots is None else shots[i, 0]
                segments = _segments(starts, n)
                people = np.stack([summary_of(one, segments) for one in scores])
                videos[name] = Annotated(name, n, people, scores, segments, _picks(n))
    except (OSError, KeyError, ValueError) as e:
        raise CorruptError(f"{folder} cannot be read", f"{type(e).__name__}: {e}", "copy its files anew") from e
    return Annotations("TVSum", "mean", videos)


def _eccv16(path: Path) -> Annotations:
    videos = {}
    try:
        with h5py.File(path, "r") as file:
            name_of_set, measure = _said(file, path)
            for key in file:
                group = file[key]
                n = int(np.asarray(group["n_frames"]).item())
                people = np.asarray(group["user_summary"], np.float32) > 0 if "user_summary" in group else None
                users = np.zeros((0, n), bool) if people is None else people
                if "user_scores" in group:
                    scores = np.asarray(group["user_scores"], np.float32)
                else:
                    scores = users.astype(np.float32)
                name = group["video_name"][()] if "video_name" in group else key
                name = name.decode() if isinstance(name, bytes) else str(name)
                videos[key] = Annotated(
                    name,
                    n,
                    users,
                    scores,
                    np.asarray(group["change_points"], np.int64),
                    np.asarray(group["picks"], np.int64),
                    None,
                    np.asarray(group["features"], np.float32) if "features" in group else None,
                    "user_scores" in group,
                )
    except (OSError, KeyError, ValueError) as e:
        raise CorruptError(
            f"{path} is not in the eccv16 layout",
            f"{type(e).__name__}: {e}",
            "it holds a group for each video with features, picks, n_frames, change_points (and user_summary)",
        ) from e
    if not videos:
        raise UsageError(f"{path} holds no video", "", "avstore export STORE --layout eccv16 writes one")
    return Annotations(name_of_set, measure, videos)


def _said(file: Any, path: Path) -> tuple[str, str | None]:
    """(name, measure) of the attributes, else the file's name and None. ValueError for a measure that is none."""
    name, measure = file.attrs.get("set"), file.attrs.get("measure")
    if measure is not None and measure not in MEASURES:
        raise ValueError(f"its attribute measure is {measure!r}, not one of {', '.join(MEASURES)}")
    return (path.stem if name is None else str(name)), (None if measure is None else str(measure))
