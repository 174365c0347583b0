"""A search index over embeddings: cosine, on FAISS, exact unless it says otherwise.

Rows are L2-normalised vectors, each with the video and the second it belongs to; a search gives the best second of
each of the nearest videos. The exact kind searches the matrix in place; the approximate kind (IVF) measures its own
recall against the exact one. Not here: how embeddings are made (trainers.embed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import NotFoundError, UsageError, did_you_mean

if TYPE_CHECKING:
    from avstore.store import Store

KINDS = ("exact", "ivf")
MAX_QUERIES = 512  # per FAISS call: bounds the memory of the result lists
RECALL_AT = 10
RECALL_SAMPLE = 256


@dataclass(frozen=True)
class Hit:
    """One answer: the video's number, its second (on the video's clock) that matches best, and the cosine."""

    video: int
    second: int
    score: float


def normalised(vectors: np.ndarray, what: str = "embeddings") -> np.ndarray:
    """float32 C-contiguous (n, D), each row of length 1. UsageError for NaN, infinite or zero rows: NaN scores would
    make every comparison false, and with it every rank perfect."""
    x = np.ascontiguousarray(vectors, np.float32)
    if x.ndim != 2:
        raise UsageError(f"{what} must be a matrix (n, D), got shape {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise UsageError(
            f"{bad.size} of {len(x)} {what} are not finite",
            f"the first is row {bad[0]}",
            "the run diverged, or its embeddings are incomplete: train or embed it again",
        )
    norm = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    zero = np.flatnonzero(norm == 0)
    if zero.size:
        raise UsageError(
            f"{zero.size} of {len(x)} {what} are zero",
            f"the first is row {zero[0]}: it has no direction, so no cosine",
            "leave such videos out of the selection",
        )
    return (x / norm[:, None]).astype(np.float32)


class Index:
    """Searches rows (n, D) that belong to `video` (n,) and `second` (n,).

    kind: "exact" compares with every row; "ivf" looks only into the nearest `probes` of `cells` clusters, is
    approximate, and has `recall`: its measured share of the true 10 nearest rows on a sample of its own rows.
    """

    def __init__(
        self,
        rows: np.ndarray,
        video: np.ndarray,
        second: np.ndarray | None = None,
        *,
        kind: str = "exact",
        cells: int | None = None,
        probes: int | None = None,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise UsageError(f"no index kind {kind!r}", did_you_mean(kind, KINDS))
        if not len(rows):
            raise UsageError("an index needs at least one row", "", "avstore embed RUN STORE writes embeddings")
        self.rows = normalised(rows)
        self.video = np.ascontiguousarray(video, np.int64)
        self.second = np.zeros(len(self.rows), np.int64) if second is None else np.ascontiguousarray(second, np.int64)
        if self.video.shape != (len(self.rows),) or self.second.shape != (len(self.rows),):
            raise UsageError(
                f"{len(self.rows)} rows, but {self.video.shape} videos and {self.second.shape} seconds",
                "each row has one video number and one second",
            )
        self.kind = kind
        self.recall: float | None = None
        self._ivf: Any = None
        if kind == "ivf":
            self._build(cells, probes, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def _build(self, cells: int | None, probes: int | None, seed: int) -> None:
        import faiss

        n, dim = self.rows.shape
        cells = cells if cells is not None else max(1, min(n // 39, int(4 * np.sqrt(n))))
        probes = probes if probes is not None else max(1, cells // 16)
        if not 1 <= cells <= n or not 1 <= probes <= cells:
            raise UsageError(f"{cells} cells and {probes} probes for {n} rows", "1 <= probes <= cells <= rows")
        quantizer = faiss.IndexFlatIP(dim)
        ivf = faiss.IndexIVFFlat(quantizer, dim, cells, faiss.METRIC_INNER_PRODUCT)
        ivf.cp.seed = seed + 1
        ivf.cp.min_points_per_centroid = 1
        ivf.train(self.rows)
        ivf.add(self.rows)
        ivf.nprobe = probes
        self._ivf, self.cells, self.probes = ivf, cells, probes
        sample = np.random.default_rng(seed).permutation(n)[:RECALL_SAMPLE]
        k = min(RECALL_AT, n)
        true = self._exact(self.rows[sample], k)[1]
        found = ivf.search(self.rows[sample], k)[1]
        self.recall = float(np.mean([len(set(t) & set(f)) / k for t, f in zip(true, found, strict=True)]))

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        return faiss.knn(queries, self.rows, k, metric=faiss.METRIC_INNER_PRODUCT)

    def nearest_rows(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 (q, k), rows int64 (q, k)) by falling cosine; row -1 where the
        approximate kind found fewer."""
        q = normalised(queries, "queries")
        if q.shape[1] != self.rows.shape[1]:
            raise UsageError(
                f"queries have {q.shape[1]} dimensions, the index {self.rows.shape[1]}",
                "they come from another run or tower",
            )
        if k < 1:
            raise UsageError(f"k = {k}", "ask for at least one")
        k = min(k, len(self.rows))
        parts = [
            self._exact(q[i : i + MAX_QUERIES], k) if self._ivf is None else self._ivf.search(q[i : i + MAX_QUERIES], k)
            for i in range(0, len(q), MAX_QUERIES)
        ]
        if not parts:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def search(self, queries: np.ndarray, k: int, *, without: int | None = None) -> list[list[Hit]]:
        """For each query, the best second of each of the `k` nearest videos, by falling cosine, fewer where there are
        fewer. `without`: a video number to leave out (the query's own)."""
        if k < 1:
            raise UsageError(f"k = {k}", "ask for at least one")
        queries = np.atleast_2d(queries)
        out: list[list[Hit]] = [[] for _ in range(len(queries))]
        todo, depth = np.arange(len(queries)), 4 * k + 16
        while len(todo):
            depth = min(depth, len(self.rows))
            scores, rows = self.nearest_rows(queries[todo], depth)
            short = []
            for i, s, r in zip(todo.tolist(), scores, rows, strict=True):
                best: dict[int, Hit] = {}
                for score, row in zip(s.tolist(), r.tolist(), strict=True):
                    if row < 0:
                        break
                    number = int(self.video[row])
                    if number != without and number not in best:
                        best[number] = Hit(number, int(self.second[row]), score)
                        if len(best) == k:
                            break
                out[i] = list(best.values())
                if len(best) < k:
                    short.append(i)
            if depth == len(self.rows):
                break
            todo, depth = np.array(short, np.int64), depth * 8
        return out


def embedded_runs(store: Store) -> dict[str, list[str]]:
    """Runs that have embeddings in the store, with their towers; both sorted."""
    root = store.path / "embeddings"
    out: dict[str, list[str]] = {}
    for file in sorted(root.glob("[!.]*/[!.]*/zarr.json")) if root.is_dir() else ():
        out.setdefault(file.parent.parent.name, []).append(file.parent.name)
    return out


def choose_run(store: Store, run: str | None) -> str:
    """The run named, or the only one with embeddings in the store; NotFoundError lists what there is."""
    runs = embedded_runs(store)
    if run is not None:
        name = run.rstrip("/").rsplit("/", 1)[-1]
        if name not in runs:
            raise NotFoundError(
                f"no embeddings of run {name!r} in {store.path}",
                did_you_mean(name, runs) or "the store has no embeddings yet",
                f"avstore embed {run} {store.path} writes them",
            )
        return name
    if not runs:
        raise NotFoundError(
            f"{store.path} has no embeddings",
            "a query searches the embeddings that a trained run wrote into the store",
            f"avstore embed RUN {store.path}",
        )
    if len(runs) > 1:
        raise UsageError(
            f"{store.path} has embeddings of {len(runs)} runs", "which one?", f"--run {' | --run '.join(runs)}"
        )
    return next(iter(runs))


def read_rows(store: Store, run: str, tower: str) -> np.ndarray:
    """float16 (S, D): the embeddings array of a run's tower, one row per second of the tape, NaN where there is none.
    NotFoundError where the run has no such tower."""
    import zarr

    towers = embedded_runs(store).get(run, [])
    if tower not in towers:
        raise NotFoundError(
            f"run {run} has no {tower} embeddings in {store.path}",
            did_you_mean(tower, towers) or "it has none at all",
            f"avstore embed RUN {store.path}",
        )
    array = zarr.open_array(store.path / "embeddings" / run / tower, mode="r")
    return np.asarray(array[:])


def seconds_of(
    store: Store, rows: np.ndarray, numbers: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(vectors (n, D), video numbers (n,), seconds (n,)) of the rows that are there for `numbers` (default: all ok
    videos). A row counts as there when it is not all NaN: one that is NaN in part is damage,
    and an Index refuses it."""
    numbers = store.numbers if numbers is None else np.asarray(numbers, np.int64)
    place, slot = store.places[numbers], np.minimum(store.slots[numbers], len(rows) - store.places[numbers])
    slot = np.maximum(slot, 0)
    video = np.repeat(numbers, slot)
    second = np.arange(int(slot.sum())) - np.repeat(np.cumsum(slot) - slot, slot)
    tape = np.repeat(place, slot) + second
    vectors = rows[tape]
    there = ~np.isnan(vectors).all(axis=1)
    return vectors[there], video[there], second[there]


def video_means(store: Store, rows: np.ndarray, numbers: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(means float32 (m, D), video numbers (m,)): each second L2-normalised, averaged per video, normalised again.
    Videos without any row are left out."""
    vectors, video, _ = seconds_of(store, rows, numbers)
    if not len(video):
        return np.zeros((0, rows.shape[1]), np.float32), video
    unit = normalised(vectors)
    who, first = np.unique(video, return_inverse=True)
    total = np.zeros((len(who), unit.shape[1]), np.float64)
    np.add.at(total, first, unit)
    return normalised(total), who
