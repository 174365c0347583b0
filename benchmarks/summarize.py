"""`avstore bench summarize`: summaries of SumMe and TVSum against people, with the controls that this metric needs.

Five random splits of 80 / 20, or those of a published file; DR-DSN trained on the train part of each and scored on its
test part, the same parts for every row. Random scores come close to trained ones here (Otani et al., CVPR 2019), so the
table always holds random, uniform and people, and rank correlations beside the F-score. A video may be in several test
parts: it is no cross-validation, and `sd` is over splits (and seeds).

Paired tests (`paired.py`) over splits and seeds compare each two trained rows, and each with random and uniform.

Declared: rank correlations are of the scores at the sampled frames (every 15th) with each person's at the same frames
(with each person's summary, 0 or 1, where a set has no scores: SumMe, and the shared HDF5 files), averaged over people;
`uniform` takes two-second blocks at equal distances; `people` is each person against the others. A control has one
value for each split, which is paired with every seed of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avstore import draws
from avstore.errors import ConflictError, NotFoundError, UsageError, did_you_mean
from benchmarks import paired
from benchmarks.annotations import MEASURES, Annotated, Annotations
from benchmarks.kept import Kept
from benchmarks.summary import agreement, f_score, frame_scores, rank_correlation, summary_of
from benchmarks.table import Table

SHARE = 0.15
BLOCK = 60  # frames of a block of the uniform control: two seconds at 30 a second
COLUMNS = ("scores", "F", "sd F", "F of splits", "tau", "rho", "of")
# as their papers print them, from GoogLeNet or their own features; not from the videos here
PUBLISHED: dict[str, tuple[tuple[str, dict[str, float]], ...]] = {
    "SumMe": (
        ("DR-DSN, as printed in Lavania et al. Table 2", {"F": 0.414}),
        ("XDC, ibid.", {"F": 0.414}),
        ("AVID-CMA, ibid.", {"F": 0.422}),
        ("temporally cognizant, visual, ibid.", {"F": 0.427}),
        ("temporally cognizant, audio-visual, ibid.", {"F": 0.435}),
        ("DSNet anchor-based, supervised, its README", {"F": 0.502}),
        ("DSNet anchor-free, supervised, ibid.", {"F": 0.512}),
        ("CA-SUM, its worst split in its public logs", {"F": 0.399}),
        ("CA-SUM, its best split, ibid.", {"F": 0.525}),
    ),
    "TVSum": (("people, Otani et al. 2019 Table 2", {"tau": 0.177, "rho": 0.204}),),
}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Split:
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass
class Values:
    """Of one row of the table: a list entry for each (split, seed)."""

    f: list[float] = field(default_factory=list)
    tau: list[float] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)


def random_splits(names: Sequence[str], count: int = 5, seed: int = 0, share: float = 0.8) -> list[Split]:
    """`count` independent draws of 80 / 20. UsageError for fewer than two videos."""
    if len(names) < 2 or count < 1:
        raise UsageError(f"{count} splits of {len(names)} videos", "two videos and one split at least")
    ordered = sorted(names)
    out = []
    for i in range(count):
        u = draws.uniform(seed, "probe", i, np.arange(len(ordered)), 0)[..., 0]
        place = np.argsort(u, kind="stable")
        n = min(len(ordered) - 1, max(1, round(share * len(ordered))))
        out.append(Split(tuple(ordered[j] for j in sorted(place[:n])), tuple(ordered[j] for j in sorted(place[n:]))))
    return out


def read_splits(path: str | Path, names: Sequence[str]) -> list[Split]:
    """A published file: a JSON list of {"train_keys": [...], "test_keys": [...]}; a key may carry a path before it.

    ConflictError naming the keys that the annotations lack.
    """
    p = Path(path)
    if not p.is_file():
        raise NotFoundError(f"no split file {p}", "", "a JSON list of train_keys and test_keys")
    try:
        table = json.loads(p.read_text())
        splits = [
            Split(*(tuple(str(k).rsplit("/", 1)[-1] for k in part[side]) for side in ("train_keys", "test_keys")))
            for part in table
        ]
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(
            f"{p} is no split file", f"{type(e).__name__}: {e}", "a JSON list of train_keys and test_keys"
        ) from e
    missing = sorted({k for s in splits for k in (*s.train, *s.test)} - set(names))
    if missing:
        raise ConflictError(
            f"{len(missing)} videos of {p.name} are not among the annotations: {', '.join(missing[:5])}",
            f"these are called {', '.join(list(names)[:3])}, ...",
            "published splits name the groups of the shared HDF5 file: give that file",
        )
    return splits


def uniform_summary(n_frames: int, share: float = SHARE, block: int = BLOCK) -> NDArray[np.bool_]:
    """Blocks of `block` frames at equal distances, together at most floor(share * n_frames) frames."""
    room = int(share * n_frames)
    count = max(1, room // block)
    length = min(block, room)
    out = np.zeros(n_frames, np.bool_)
    for i in range(count):
        first = int((i + 0.5) * n_frames / count - length / 2)
        out[first : first + length] = True
    return out


def score_of(video: Annotated, scores: NDArray[np.floating], measure: str) -> tuple[float, float, float]:
    """(F, tau, rho) of scores at the video's picks."""
    summary = summary_of(frame_scores(scores, video.picks, video.n_frames), video.segments, SHARE)
    return (getattr(agreement(summary, video.people), measure), *_correlations(video, scores))


def _correlations(video: Annotated, scores: NDArray[np.floating]) -> tuple[float, float]:
    return rank_correlation(scores, video.scores[:, video.picks])


def people(video: Annotated, measure: str) -> tuple[float, float, float]:
    """(F, tau, rho): each person's summary against the others' (best or mean of them), each person's scores with the
    others', averaged over people."""
    u = len(video.people)
    if u < 2:
        raise UsageError(f"{video.name} was annotated by {u} person", "agreement among people needs two")
    each = np.zeros((u, u))
    for i in range(u):
        for j in range(i + 1, u):
            each[i, j] = each[j, i] = f_score(video.people[i], video.people[j])
    others = [np.delete(each[i], i) for i in range(u)]
    f = float(np.mean([o.max() if measure == "best" else o.mean() for o in others]))
    at = video.scores[:, video.picks]
    both = [rank_correlation(at[i], np.delete(at, i, 0)) for i in range(u)]
    return f, float(np.mean([t for t, _ in both])), float(np.mean([r for _, r in both]))


def random_scores(video: Annotated, number: int, draw: int, seed: int = 0) -> NDArray[np.float64]:
    """Uniform numbers for the picks of video `number`."""
    return draws.uniform(seed, "shuffle", draw, number, np.arange(len(video.picks)))[..., 0]


def summarize(
    annotations: Annotations,
    features: Mapping[str, Mapping[str, NDArray[np.floating]]] | None = None,
    *,
    splits: Sequence[Split] | None = None,
    split_count: int = 5,
    split_seed: int = 0,
    seeds: int = 1,
    random_draws: int = 10,
    measure: str | None = None,
    published: str | None = None,
    config: Any = None,
    places: Mapping[str, Mapping[str, Any]] | None = None,
    kept: Kept | None = None,
    progress: Progress | None = None,
) -> Table:
    """The table. features: {row's name: {video: (n_picks, D)}}, DR-DSN trained on each, `seeds` times for each split.
    measure: `best` or `mean` over people, by default as the annotations say; published: whose figures stand beside,
    by default those of the set that the annotations are called after. places: {row's name: its `step`, `epoch`, `of
    run`} of features that are of checkpoints, of which the last ones are compared; kept: finished trainings, not done
    again.

    Raises UsageError where a video has nobody's summary, features lack a video or have another number of rows than its
    picks, where neither the annotations nor `measure` say how F is formed, and for a set without published figures.
    """
    videos = annotations.videos
    measure = _measure(annotations, measure)
    theirs = _published(annotations.name, published)
    if seeds < 1:
        raise UsageError(f"{seeds} seeds", "a row is trained once at least", "--seeds 1")
    nobody = [n for n, v in videos.items() if not len(v.people)]
    if nobody:
        raise UsageError(f"nobody's summary of {', '.join(nobody[:3])}", "there is nothing to compare with")
    for row, given in (features or {}).items():
        for name, video in videos.items():
            if name not in given or len(given[name]) != len(video.picks):
                got = "none" if name not in given else str(len(given[name]))
                raise UsageError(f"{row}: {got} features of {name}", f"it has {len(video.picks)} sampled frames")
    parts = list(splits) if splits is not None else random_splits(list(videos), split_count, split_seed)
    number = {name: i for i, name in enumerate(sorted(videos))}
    rows: list[dict[str, Any]] = []
    compared: dict[str, Values] = {}
    trained = list((features or {}).items())
    total = 3 + len(trained) * len(parts) * seeds
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, total)

    for name, given in trained:
        values = Values()
        for split in parts:
            for seed in range(seeds):
                _add(values, _dr_dsn(annotations, given, split, seed, measure, config, kept or Kept(None)))
                step(name)
        place = (places or {}).get(name, {})
        rows.append(_row(f"DR-DSN on {name}", values, len(parts)) | dict(place))
        if place.get("step") in (None, max(p["step"] for p in (places or {name: {"step": 0}}).values())):
            compared[f"DR-DSN on {name}"] = values
    drawn = {
        name: np.mean(
            [score_of(v, random_scores(v, number[name], k, split_seed), measure) for k in range(random_draws)], 0
        )
        for name, v in videos.items()
    }
    controls = {"random": _over(parts, drawn)}
    rows.append(_row(f"random ({random_draws} draws)", controls["random"], len(parts)))
    step("random")
    even = {
        n: (getattr(agreement(uniform_summary(v.n_frames), v.people), measure), None, None) for n, v in videos.items()
    }
    controls["uniform"] = _over(parts, even)
    rows.append(_row("uniform", controls["uniform"], len(parts)))
    if all(v.machine is not None for v in videos.values()):
        given_summaries = {
            n: (getattr(agreement(v.machine, v.people), measure), *_correlations(v, v.machine[v.picks].astype(float)))
            for n, v in videos.items()
            if v.machine is not None
        }
        rows.append(_row("the summary that comes with the set", _over(parts, given_summaries), len(parts)))
    step("uniform")
    persons = {n: people(v, measure) for n, v in videos.items()}
    every = np.mean(list(persons.values()), 0)
    rows.append(_row("people, each against the others", _over(parts, persons), len(parts)))
    step("people")
    rows += [{"scores": f"published: {n}", **v} for n, v in theirs]
    return Table(
        f"summaries of {annotations.name}: {len(videos)} videos, {len(parts)} splits",
        COLUMNS,
        rows,
        (
            f"F: {'the best over people' if measure == 'best' else 'the mean over people'}, averaged over the test "
            "videos of a split, then over splits; tau, rho: rank correlation with each person's "
            f"{_ranked_with(videos.values())} at the picks",
            f"people over all {len(videos)} videos: F {every[0]:.3f}, tau {every[1]:.3f}, rho {every[2]:.3f}",
            "sd over splits and seeds; differences below it say nothing. published: theirs, other features and splits",
            *differences(compared, controls, seeds),
        ),
    )


def _measure(annotations: Annotations, asked: str | None) -> str:
    if asked is not None and asked not in MEASURES:
        raise UsageError(f"no measure {asked!r}", did_you_mean(asked, MEASURES), "--measure best, or mean")
    said = asked or annotations.measure
    if said is None:
        raise UsageError(
            f"{annotations.name} does not say how its summaries are scored",
            "SumMe's papers print the best F over people, TVSum's the mean",
            "--measure best, or --measure mean",
        )
    return said


def _published(name: str, asked: str | None) -> tuple[tuple[str, dict[str, float]], ...]:
    """Of the set that is asked for, else of the one whose name is in that of the annotations: of `SumMe`, or
    `eccv16_dataset_summe_google_pool5`."""
    if asked is not None and asked not in PUBLISHED:
        raise UsageError(f"no published figures of {asked}", did_you_mean(asked, PUBLISHED), "--published SumMe")
    called = [s for s in PUBLISHED if s.lower() in name.lower()]
    chosen = asked or (called[0] if len(called) == 1 else "")
    return PUBLISHED.get(chosen, ())


def _ranked_with(videos: Iterable[Annotated]) -> str:
    """What tau and rho were computed on, in words."""
    graded = {v.graded for v in videos}
    if len(graded) > 1:
        return "scores (summary, 0 or 1, of videos without scores)"
    return "scores" if graded == {True} else "summary, 0 or 1, for the set has no scores,"


def differences(compared: Mapping[str, Values], controls: Mapping[str, Values], seeds: int) -> list[str]:
    """Lines with paired tests over (split, seed): each two of the rows `compared`, and each with the controls, whose
    one value of a split stands for each seed. By F, and by tau where both have it."""
    if not compared:
        return []
    out = []
    for column in ("f", "tau"):
        told = {"f": "F", "tau": "tau"}[column]
        rows = {n: getattr(v, column) for n, v in compared.items()}
        even = {n: [x for x in getattr(v, column) for _ in range(seeds)] for n, v in controls.items()}
        out += [f"{told}: {line}" for line in paired.lines({**rows, **even}, "splits and seeds", tuple(even))]
    return out or ["one split and one seed: no paired test of rows can be made; --splits 5 or --seeds 5"]


def _dr_dsn(
    annotations: Annotations,
    given: Mapping[str, NDArray[np.floating]],
    split: Split,
    seed: int,
    measure: str,
    config: Any,
    kept: Kept,
) -> list[tuple[float, float, float]]:
    import dataclasses

    from benchmarks import dr_dsn

    c = dataclasses.replace(config if config is not None else dr_dsn.Config(), seed=seed)

    def made() -> dict[str, np.ndarray]:
        net, _ = dr_dsn.train({n: given[n] for n in split.train}, c)
        of = (score_of(annotations.videos[n], dr_dsn.scores(net, given[n], c.normalise), measure) for n in split.test)
        return {"F, tau, rho": np.array(list(of), np.float64)}

    h = hashlib.sha256()
    for names in (split.train, split.test):
        for n in names:
            h.update(f"{n} {given[n].shape}".encode() + np.ascontiguousarray(given[n], "<f4").tobytes())
    for n in split.test:
        video = annotations.videos[n]
        for x in (video.people, video.scores, video.segments, video.picks):
            h.update(f"{x.shape} {x.dtype}".encode() + np.ascontiguousarray(x).tobytes())
    key = {"bench": "summarize", "videos": h.hexdigest()[:24], "measure": measure, "dr-dsn": dataclasses.asdict(c),
           "of": [len(split.train), len(split.test)]}  # fmt: skip
    return [tuple(row) for row in kept.arrays(key, made)["F, tau, rho"].tolist()]


def _over(parts: Sequence[Split], of: Mapping[str, Any]) -> Values:
    values = Values()
    for split in parts:
        _add(values, [of[n] for n in split.test])
    return values


def _add(values: Values, rows: Sequence[Any]) -> None:
    for i, kept in enumerate((values.f, values.tau, values.rho)):
        column = [r[i] for r in rows if r[i] is not None]
        if column:
            kept.append(float(np.mean(column)))


def _row(name: str, values: Values, splits: int) -> dict[str, Any]:
    seeds = len(values.f) // splits
    per_split = np.array(values.f).reshape(splits, seeds).mean(1)
    return {
        "scores": name,
        "F": float(np.mean(values.f)),
        "sd F": float(np.std(values.f, ddof=1)) if len(values.f) > 1 else None,
        "F of splits": tuple(round(float(x), 3) for x in per_split),
        "tau": float(np.mean(values.tau)) if values.tau else None,
        "rho": float(np.mean(values.rho)) if values.rho else None,
        "of": len(values.f),
        "values": list(values.f),
    }


def rows_of(table: Table) -> Iterator[tuple[str, float]]:
    """(name, F) of every row that was measured here."""
    for row in table.rows:
        if "of" in row:
            yield row["scores"], row["F"]
