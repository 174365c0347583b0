"""Contenders of `bench loader`: the same clips, kept and delivered by avstore and by others, each as its users would.

Every contender runs in a process of its own (`python -m benchmarks.contenders NAME JSON`), so that memory is its own, a
package that breaks breaks alone, and none disturbs another's imports. It answers lines of JSON on stdin with lines on
stdout; `benchmarks.loader` asks. A contender is two functions: one that makes its files from the jpeg store (once), and
one that yields the clips of batch after batch, shuffled, for ever. Frames are ready as uint8 in memory when counted.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FRAMES = 16


@dataclass(frozen=True)
class ClipSet:
    """Where everything lies. A clip is 16 consecutive rows of a video, none overlapping; all have the same."""

    work: str
    media: str
    threads: int = 1
    batch: int = 16
    seed: int = 0

    @property
    def jpeg(self) -> Path:
        return Path(self.work) / "jpeg.zarr"

    @property
    def raw(self) -> Path:
        return Path(self.work) / "raw.zarr"

    @property
    def seconds(self) -> Path:
        """The raw frames once more, with an inner chunk of one second."""
        return Path(self.work) / "raw-seconds.zarr"

    def folder(self, name: str) -> Path:
        return Path(self.work) / name


@dataclass(frozen=True)
class Contender:
    """`batches` yields the number of clips in each batch. `ahead`: batches it may hold ready, not counted at first."""

    batches: Callable[[ClipSet], Iterator[int]]
    files: Callable[[ClipSet], list[Path]]
    make: Callable[[ClipSet], None] = lambda clips: None
    ahead: int = 0
    what: str = ""


def clip_list(path: Path) -> tuple[Any, np.ndarray]:
    """The store and int64 (n, 2): video number and absolute first tape row of each clip."""
    import avstore

    store = avstore.open(path)
    found = [
        (n, int(store.places[n]) * store.spec.fps + k * FRAMES)
        for n in store.numbers.tolist()
        for k in range(int(store.frames[n]) // FRAMES)
    ]
    return store, np.array(found, np.int64).reshape(-1, 2)


def shuffled(clips: ClipSet, n: int) -> Iterator[int]:
    """Clip numbers for ever, each epoch in another order."""
    chance = random.Random(clips.seed)
    while True:
        order = list(range(n))
        chance.shuffle(order)
        yield from order


def payloads(store: Any, row: int) -> list[bytes]:
    """The stored JPEGs of a clip."""
    from avstore.cut import fetch, spans

    array, per = store.arrays["frames"], store.spec.shard_seconds * store.spec.fps
    out: list[bytes] = []
    rows = list(range(row, row + FRAMES))
    for shard, start, stop in spans(rows, per):
        out += [c[:-4].tobytes() for c in fetch(store.reader, array, per, shard, rows[start:stop]) if c is not None]
    return out


def pack(frames: list[bytes]) -> bytes:
    """One record: the lengths, then the JPEGs."""
    return np.array([len(f) for f in frames], "<u4").tobytes() + b"".join(frames)


def unpack(record: bytes) -> np.ndarray:
    """uint8 (16, 128, 176, 3) of a record: libjpeg-turbo, as in all contenders that hold JPEGs."""
    from simplejpeg import decode_jpeg

    lengths = np.frombuffer(record, "<u4", FRAMES).tolist()
    at, view = 4 * FRAMES, memoryview(record)
    out = None
    for i, length in enumerate(lengths):
        frame = decode_jpeg(view[at : at + length], fastdct=False, fastupsample=False)
        if out is None:
            out = np.empty((FRAMES, *frame.shape), np.uint8)
        out[i] = frame
        at += length
    assert out is not None
    return out


def in_threads(clips: ClipSet, n: int, do: Callable[[int, np.ndarray], None], shape: tuple[int, ...]) -> Iterator[int]:
    """Batches whose clips are made by `do(clip, row of the batch)` in threads; four batches' memory, used in turn."""
    order = shuffled(clips, n)
    ring = np.zeros((4, clips.batch, *shape), np.uint8)
    with ThreadPoolExecutor(clips.threads) as pool:
        turn = 0
        while True:
            rows = ring[turn % 4]
            picks = [next(order) for _ in range(clips.batch)]
            parts = [list(range(k, clips.batch, clips.threads)) for k in range(clips.threads)]

            def part(mine: list[int], picks: list[int] = picks, rows: np.ndarray = rows) -> None:
                for i in mine:
                    do(picks[i], rows[i])

            list(pool.map(part, parts))
            turn += 1
            yield clips.batch


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
    """The loader as a trainer uses it; one clip at a random place, as many draws of a video as it has clips."""

    def batches(clips: ClipSet) -> Iterator[int]:
        from avstore.loader import Loader
        from avstore.sampler import Order
        from avstore.views import RandomView

        store, found = clip_list(getattr(clips, path))
        order = Order(len(store), -(-len(found) // len(store)), seed=clips.seed, batch_size=clips.batch)
        given = {"frames": FRAMES, "fps": store.spec.fps, **more}
        with Loader(store, None, RandomView(), order=order, threads=clips.threads, in_process=in_process,
                    **given) as loader:  # fmt: skip
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


def _torch_batches(data: Any, clips: ClipSet, loader: Any = None, **more: Any) -> Iterator[int]:
    """Batches of a torch DataLoader with as many workers as others have threads."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    made = (loader or DataLoader)(
        data, batch_size=clips.batch, num_workers=clips.threads, persistent_workers=True, drop_last=True, **more
    )
    while True:
        for batch in made:
            yield len(batch)


def in_memory(clips: ClipSet) -> Iterator[int]:
    store, found = clip_list(clips.jpeg)
    held = [pack(payloads(store, int(row))) for _, row in found]

    class Held:
        def __len__(self) -> int:
            return len(held)

        def __getitem__(self, i: int) -> np.ndarray:
            return unpack(held[i])

    return _torch_batches(Held(), clips, shuffle=True)


def make_webdataset(clips: ClipSet) -> None:
    import webdataset

    folder = clips.folder("webdataset")
    folder.mkdir()
    store, found = clip_list(clips.jpeg)
    order = random.Random(0).sample(range(len(found)), len(found))
    per = max(1, min(64, len(found) // 8))
    for k in range(0, len(order), per):
        with webdataset.TarWriter(str(folder / f"{k // per:05d}.tar")) as tar:
            for i in order[k : k + per]:
                tar.write({"__key__": f"{i:08d}", "clip": pack(payloads(store, int(found[i, 1])))})


def webdataset(clips: ClipSet) -> Iterator[int]:
    import webdataset as wds

    urls = sorted(str(p) for p in clips.folder("webdataset").glob("*.tar"))
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=clips.seed).shuffle(256).map(_webdataset_clip).repeat()
    return _torch_batches(data, clips)


def _webdataset_clip(sample: dict[str, Any]) -> np.ndarray:
    return unpack(sample["clip"])


def make_streaming(clips: ClipSet) -> None:
    from streaming import MDSWriter

    store, found = clip_list(clips.jpeg)
    with MDSWriter(out=str(clips.folder("streaming")), columns={"clip": "bytes"}) as writer:
        for _, row in found:
            writer.write({"clip": pack(payloads(store, int(row)))})


def streaming(clips: ClipSet) -> Iterator[int]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Clips(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, i: int) -> np.ndarray:
            return unpack(super().__getitem__(i)["clip"])

    data = Clips(local=str(clips.folder("streaming")), shuffle=True, shuffle_seed=clips.seed, batch_size=clips.batch)
    return _torch_batches(data, clips)


def make_litdata(clips: ClipSet) -> None:
    import litdata

    _, found = clip_list(clips.jpeg)
    parts = [(str(clips.jpeg), int(row)) for _, row in found]
    litdata.optimize(_litdata_record, parts, str(clips.folder("litdata")), chunk_bytes="64MB", num_workers=1)


def _litdata_record(part: tuple[str, int]) -> bytes:
    import avstore

    with avstore.open(part[0]) as store:
        return pack(payloads(store, part[1]))


def litdata(clips: ClipSet) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    folder = str(clips.folder("litdata"))
    data = StreamingDataset(folder, shuffle=True, seed=clips.seed, drop_last=True, transform=unpack)
    return _torch_batches(data, clips, StreamingDataLoader)


def pyav(clips: ClipSet) -> Iterator[int]:
    import av

    store, found = clip_list(clips.jpeg)
    height, width = store.spec.height, store.spec.width

    def do(clip: int, out: np.ndarray) -> None:
        number, row = found[clip].tolist()
        start = (row - int(store.places[number]) * store.spec.fps) / store.spec.fps
        with av.open(str(Path(clips.media) / store.paths[number])) as file:
            stream = file.streams.video[0]
            stream.thread_count = 1
            first = float((stream.start_time or 0) * (stream.time_base or 0))
            file.seek(int((first + start) * 1_000_000))
            shown, k = None, 0
            for frame in file.decode(stream):
                while k < FRAMES and shown is not None and (frame.time or 0) - first > start + k / store.spec.fps:
                    out[k] = shown
                    k += 1
                if k == FRAMES:
                    break
                if (frame.time or 0) - first >= start - 0.1:
                    shown = frame.to_ndarray(format="rgb24", width=width, height=height)
            if shown is not None:
                out[k:] = shown

    return in_threads(clips, len(found), do, (FRAMES, height, width, 3))


def torchcodec(clips: ClipSet) -> Iterator[int]:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    store, found = clip_list(clips.jpeg)
    size = store.spec.height, store.spec.width

    def do(clip: int, out: np.ndarray) -> None:
        number, row = found[clip].tolist()
        start = (row - int(store.places[number]) * store.spec.fps) / store.spec.fps
        file = str(Path(clips.media) / store.paths[number])
        decoder = VideoDecoder(file, dimension_order="NHWC", num_ffmpeg_threads=1, transforms=[Resize(size)])
        last = decoder.metadata.end_stream_seconds - 0.05
        times = [min(start + k / store.spec.fps, last) for k in range(FRAMES)]
        out[:] = decoder.get_frames_played_at(times).data.numpy()

    return in_threads(clips, len(found), do, (FRAMES, *size, 3))


def _frames(path: str) -> Callable[[ClipSet], list[Path]]:
    return lambda clips: [getattr(clips, path) / "frames"]


def _folder(name: str) -> Callable[[ClipSet], list[Path]]:
    return lambda clips: [clips.folder(name)]


def _media(clips: ClipSet) -> list[Path]:
    return [Path(clips.media)]


ZARRS = "zarrs.ZarrsCodecPipeline"
CONTENDERS: dict[str, Contender] = {
    "libjpeg-turbo": Contender(libjpeg, _frames("jpeg"), what="limit of jpeg: decoding in threads, JPEGs in memory"),
    "avstore jpeg": Contender(avstore_loader("jpeg", False), _frames("jpeg"), ahead=4),
    "avstore jpeg in-process": Contender(avstore_loader("jpeg", True), _frames("jpeg"), ahead=4),
    "avstore jpeg unchecked": Contender(avstore_loader("jpeg", False, check=False), _frames("jpeg"), ahead=4),
    "torch in memory": Contender(in_memory, _frames("jpeg"), ahead=5, what="records in a list under a DataLoader"),
    "webdataset": Contender(webdataset, _folder("webdataset"), make_webdataset, 5),
    "mosaicml-streaming": Contender(streaming, _folder("streaming"), make_streaming, 5),
    "litdata": Contender(litdata, _folder("litdata"), make_litdata, 5),
    "pyav on the fly": Contender(pyav, _media, what="random seeks into the source"),
    "torchcodec on the fly": Contender(torchcodec, _media, what="random seeks into the source"),
    "memcpy": Contender(memcpy, _frames("raw"), what="limit of raw: copying in threads, clips in memory"),
    "avstore raw": Contender(avstore_loader("raw", False), _frames("raw"), ahead=4),
    "avstore raw in-process": Contender(avstore_loader("raw", True), _frames("raw"), ahead=4),
    "avstore raw checked": Contender(avstore_loader("raw", False, check=True), _frames("raw"), ahead=4),
    "zarr-python": Contender(zarr_python("raw", False), _frames("raw")),
    "zarr-python batched": Contender(zarr_python("raw", True), _frames("raw")),
    "zarr-python 1 s chunks": Contender(zarr_python("seconds", False), _frames("seconds")),
    "zarr-python 1 s chunks batched": Contender(zarr_python("seconds", True), _frames("seconds")),
    "zarrs": Contender(zarr_python("raw", False, ZARRS), _frames("raw")),
    "zarrs batched": Contender(zarr_python("raw", True, ZARRS), _frames("raw")),
    "zarrs 1 s chunks": Contender(zarr_python("seconds", False, ZARRS), _frames("seconds")),
    "tensorstore": Contender(tensorstore("raw", False), _frames("raw")),
    "tensorstore batched": Contender(tensorstore("raw", True), _frames("raw")),
    "tensorstore 1 s chunks": Contender(tensorstore("seconds", False), _frames("seconds")),
    "tensorstore 1 s chunks batched": Contender(tensorstore("seconds", True), _frames("seconds")),
}


def all_files(paths: list[Path]) -> list[Path]:
    return [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]


def drop(paths: list[Path]) -> None:
    """Asks the kernel to forget these files: what can be dropped without privileges, clean pages."""
    for file in all_files(paths):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def measure(batches: Iterator[int], skip: int, seconds: float, limit: int = 0) -> dict[str, float]:
    """Clips and seconds of one run of 8 batches or more, or `limit` clips, after `skip` batches that may have been
    ready before it began."""
    for _ in range(skip):
        next(batches)
    done, count, begin = 0, 0, time.perf_counter()
    while True:
        done += next(batches)
        count += 1
        passed = time.perf_counter() - begin
        if (passed >= seconds and count >= 8) or (limit and done >= limit):
            return {"clips": done, "seconds": passed}


def main(name: str, given: dict[str, Any]) -> None:
    """Answers `make`, `run` and `drop` until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    clips, contender = ClipSet(**given), CONTENDERS[name]
    batches: Iterator[int] | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            out: dict[str, Any] = {}
            if asked["do"] == "make":
                shutil.rmtree(clips.folder(name), ignore_errors=True)  # what a run that was cut off left behind
                contender.make(clips)
            elif asked["do"] == "drop":
                drop(contender.files(clips))
            else:
                if batches is None:
                    batches = contender.batches(clips)
                    next(batches)
                out = measure(batches, contender.ahead, asked["seconds"], asked.get("clips", 0))
        except Exception as e:
            out = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"}
        answers.write(json.dumps(out) + "\n")
        answers.flush()
    late = threading.Timer(5, os._exit, (0,))  # a package may hang at exit
    late.daemon = True
    late.start()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
