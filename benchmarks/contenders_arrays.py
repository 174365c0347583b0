"""Contenders that read arrays: avstore's loader, Zarr by others, and the limits (memory in, memory out).

Each function takes a `ClipSet` and yields the number of clips of batch after batch, shuffled, for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.contenders_clips import FRAMES, ClipSet, Grid, clip_list, in_threads, payloads, shuffled


def libjpeg(clips: ClipSet) -> Iterator[int]:
    from simplejpeg import decode_jpeg

    store, found = clip_list(clips.jpeg)
    held = [payloads(store, int(row)) for _, row in found]
    shape = (FRAMES, store.spec.height, store.spec.width, 3)

    def do(clip: int, out: np.ndarray) -> None:
        for i, data in enumerate(held[clip]):
            decode_jpeg(data, "RGB", False, False, 0, 0, 1, out[i])

    return in_threads(clips, len(found), do, shape)


def memcpy(clips: ClipSet) -> Iterator[int]:
    store, found = clip_list(clips.raw)
    shape = (FRAMES, store.spec.height, store.spec.width, 3)
    held = np.random.default_rng(0).integers(0, 256, (min(len(found), 512), *shape), np.uint8)
    return in_threads(clips, len(held), lambda clip, out: np.copyto(out, held[clip]), shape)


def avstore_loader(path: str, in_process: bool, **more: Any) -> Callable[[ClipSet], Iterator[int]]:
    """The loader as a trainer uses it, over the same clips: a row of the selection for each."""

    def batches(clips: ClipSet) -> Iterator[int]:
        from avstore.loader import Loader
        from avstore.sampler import Order
        from avstore.selection import Selection

        store, found = clip_list(getattr(clips, path))
        spec = store.spec
        chosen = Selection(np.ascontiguousarray(found[:, 0]), "grid", f"{len(found)} clips, a row each")
        order = Order(len(found), 1, seed=clips.seed, batch_size=clips.batch, drop_last=True)
        given = {"frames": FRAMES, "fps": spec.fps, "threads": clips.threads, "in_process": in_process, **more}
        with Loader(store, chosen, Grid(spec.sample_rate, spec.fps), order=order, **given) as loader:
            for batch in loader.steps():
                yield len(batch)

    return batches


def zarr_python(path: str, batched: bool, pipeline: str | None = None) -> Callable[[ClipSet], Iterator[int]]:
    def batches(clips: ClipSet) -> Iterator[int]:
        import zarr

        settings: dict[str, Any] = {"threading.max_workers": clips.threads, "async.concurrency": 16}
        if pipeline is not None:
            import zarrs  # noqa: F401

            settings |= {"codec_pipeline.path": pipeline, "codec_pipeline.chunk_concurrent_maximum": clips.threads}
        zarr.config.set(settings)
        _, found = clip_list(clips.raw)
        array: Any = zarr.open_array(getattr(clips, path) / "frames", mode="r")
        order = shuffled(clips, len(found))
        while True:
            rows = [int(found[next(order), 1]) for _ in range(clips.batch)]
            if batched:
                array.oindex[np.concatenate([np.arange(r, r + FRAMES) for r in sorted(rows)])]
            else:
                out = np.empty((clips.batch, FRAMES, *array.shape[1:]), np.uint8)
                for i, r in enumerate(rows):
                    out[i] = array[r : r + FRAMES]
            yield clips.batch

    return batches


def tensorstore(path: str, batched: bool) -> Callable[[ClipSet], Iterator[int]]:
    def batches(clips: ClipSet) -> Iterator[int]:
        import tensorstore as ts

        context = ts.Context({
            "data_copy_concurrency": {"limit": clips.threads}, "file_io_concurrency": {"limit": clips.threads},
            "cache_pool": {"total_bytes_limit": 64 * 2**20},
        })  # fmt: skip
        _, found = clip_list(clips.raw)
        where = {"driver": "file", "path": str(getattr(clips, path) / "frames")}
        array = ts.open({"driver": "zarr3", "kvstore": where}, context=context, read=True).result()
        order = shuffled(clips, len(found))
        out = np.empty((clips.batch, FRAMES, *array.shape[1:]), np.uint8)
        while True:
            rows = [int(found[next(order), 1]) for _ in range(clips.batch)]
            if batched:
                waiting = [ts.array(out[i]).write(array[r : r + FRAMES]) for i, r in enumerate(rows)]
                for future in waiting:
                    future.result()
            else:
                for i, r in enumerate(rows):
                    out[i] = array[r : r + FRAMES].read().result()
            yield clips.batch

    return batches
