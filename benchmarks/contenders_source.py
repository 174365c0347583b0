"""Contenders that decode the source on the fly: a random seek, then decoding up to and through the clip.

Each function takes a `ClipSet` and yields the number of clips of batch after batch, shuffled, for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.contenders_clips import FRAMES, ClipSet, clip_list, in_threads


def pyav(clips: ClipSet) -> Iterator[int]:
    import av

    store, found = clip_list(clips.jpeg)
    height, width, fps = store.spec.height, store.spec.width, store.spec.fps

    def do(clip: int, out: np.ndarray) -> None:
        number, row = found[clip].tolist()
        start = row / fps - int(store.places[number])
        with av.open(str(Path(clips.media) / store.paths[number])) as file:
            stream = file.streams.video[0]
            stream.thread_count = 1
            first = float((stream.start_time or 0) * (stream.time_base or 0))
            file.seek(int((first + start) * 1_000_000))
            shown, k = None, 0
            for frame in file.decode(stream):
                until = ((frame.time or 0) - first - start) * fps  # rows before it show the frame before it
                if shown is not None and k < until:
                    picture = shown.to_ndarray(format="rgb24", width=width, height=height)
                    while k < min(until, FRAMES):
                        out[k] = picture
                        k += 1
                shown = frame
                if k == FRAMES:
                    break
            if shown is not None and k < FRAMES:
                out[k:] = shown.to_ndarray(format="rgb24", width=width, height=height)

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
