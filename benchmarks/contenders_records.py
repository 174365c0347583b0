"""Contenders that keep each clip as a record of JPEGs and decode it in worker processes, each as its users would.

For each a `make_...(clips)` that writes its files from the jpeg store, once, and a function that yields the number of
clips of batch after batch, shuffled, for ever. All decode with libjpeg-turbo, into the clip's own array.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.contenders_clips import FRAMES, ClipSet, clip_list, pack, payloads, unpack


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
    with MDSWriter(out=str(clips.folder("mosaicml-streaming")), columns={"clip": "bytes"}) as writer:
        for _, row in found:
            writer.write({"clip": pack(payloads(store, int(row)))})


def streaming(clips: ClipSet) -> Iterator[int]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Clips(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, i: int) -> np.ndarray:
            return unpack(super().__getitem__(i)["clip"])

    data = Clips(
        local=str(clips.folder("mosaicml-streaming")), shuffle=True, shuffle_seed=clips.seed, batch_size=clips.batch
    )
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


def make_ffcv(clips: ClipSet) -> None:
    """FFCV's format has no record of several JPEGs: a clip becomes sixteen image fields, encoded anew by FFCV."""
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    store, found = clip_list(clips.jpeg)

    class Clips:
        def __len__(self) -> int:
            return len(found)

        def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
            return tuple(unpack(pack(payloads(store, int(found[i, 1])))))

    folder = clips.folder("ffcv")
    folder.mkdir()
    fields = {f"frame{k:02d}": RGBImageField(write_mode="jpg", jpeg_quality=store.spec.quality) for k in range(FRAMES)}
    DatasetWriter(str(folder / "clips.beton"), fields, num_workers=1).from_indexed_dataset(Clips())


def ffcv(clips: ClipSet) -> Iterator[int]:
    """Its own threads decode each field of a batch by compiled code; the fields stay apart, sixteen arrays of B."""
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    pipelines = {f"frame{k:02d}": [SimpleRGBImageDecoder()] for k in range(FRAMES)}
    loader = Loader(
        str(clips.folder("ffcv") / "clips.beton"), batch_size=clips.batch, num_workers=clips.threads, seed=clips.seed,
        order=OrderOption.RANDOM, pipelines=pipelines, drop_last=True, os_cache=True,
    )  # fmt: skip
    while True:
        for batch in loader:
            yield len(batch[0])
