"""Stores really ingested from generated media, made once per test session and shared read-only between modules."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avstore.ingest import ingest
from tests.ingest_media import mixed

SMALL: dict[str, Any] = {"size": (128, 160), "fps": 16, "sample_rate": 24000, "shard_seconds": 8, "front_ends": ()}
_made: dict[str, Path] = {}


def source(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> Path:
    """Six clips of the demo set, two sounds (one longer than a shard), a silent clip at 8 fps, two broken files."""
    if "source" not in _made:
        folder = mixed(tiny_media, tmp_path_factory.mktemp("small") / "in")
        (folder / "liar.mp4").unlink()
        silent_video(folder / "silent" / "slow.mp4", 3, 8)
        _made["source"] = folder
    return _made["source"]


def small_store(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path, **options: Any) -> Path:
    """The store of `source` with SMALL and `options`. Not to be changed: copy it."""
    name = repr(sorted(options.items()))
    if name not in _made:
        folder = source(tmp_path_factory, tiny_media)
        path = tmp_path_factory.mktemp("store") / "small.zarr"
        summary = ingest(folder, path, **{**SMALL, **options})
        assert (summary.ok, summary.failed) == (9, 2), summary.failures
        _made[name] = path
    return _made[name]


def silent_video(path: Path, seconds: int, fps: int) -> None:
    """H.264 without sound, 160x128; frame k is flat, its red value 16 + 8 k."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for k in range(seconds * fps):
            picture = np.zeros((128, 160, 3), np.uint8)
            picture[..., 0] = 16 + 8 * k
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
