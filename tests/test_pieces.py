"""`bench pieces`: a row for each piece, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_store import Tiny, default_spec, make_store

from avstore.errors import UsageError
from avstore.store import open as open_store
from benchmarks import pieces
from cli.main import invoke


def test_every_piece_is_beside_memcpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_store(tmp_path / "raw.zarr", [Tiny(3.0), Tiny(5.0)])
    with open_store(path) as store:
        work, clips = pieces._pieces(store)
        assert clips == 8  # 48 and 80 frames in clips of 16
        for name, piece in work.items():
            piece(clips - 1, 3)
            assert name
    asked = ["bench", "pieces", str(path), "--threads", "1", "--rounds", "1", "--seconds", "0.02", "--json"]
    assert invoke(asked) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["piece"] for r in rows] == list(work) and rows[0]["of memcpy, 1 thr."] == 1.0
    assert all(r["us a clip, 1 thr."] > 0 for r in rows)


def test_pieces_bring_the_same_pixels(tmp_path: Path) -> None:
    """Copied out of the mapping, read in parts, read aside and cut: one clip, one content."""
    path = make_store(tmp_path / "raw.zarr", [Tiny(3.0)])
    with open_store(path) as store:
        work, _ = pieces._pieces(store)
        ring = next(c.cell_contents for c in work["copy in memory"].__closure__ if hasattr(c.cell_contents, "ndim")
                    and c.cell_contents.ndim == 5 and len(c.cell_contents) == pieces.RING)  # fmt: skip
        expected = store.clip(int(store.numbers[0]), 1.0, n=16, fps=16, seconds=0).frames
        for name in ("copy out of the mapped shard", "one vectored read, frames and checksums",
                     "read aside, then copy", "cut_frames by reading", "cut_frames by reading, checked"):  # fmt: skip
            ring[5] = 0
            work[name](1, 5)
            assert (ring[5] == expected).all(), name


def test_a_store_of_jpegs_has_no_pieces(tmp_path: Path) -> None:
    path = make_store(tmp_path / "jpeg.zarr", [Tiny(2.0)], default_spec(codec="jpeg"))
    with open_store(path) as store, pytest.raises(UsageError, match="no raw frames"):
        pieces.run(store)
    with open_store(make_store(tmp_path / "raw.zarr", [Tiny(2.0)])) as store, pytest.raises(UsageError, match="rounds"):
        pieces.run(store, rounds=0)
