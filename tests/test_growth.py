"""`bench growth`: a row for each size, measured on stores that are gone afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from avstore.errors import ConflictError, UsageError
from avstore.store import open as open_store
from benchmarks.growth import run
from benchmarks.scale import simulate
from tests.tiny_store import Tiny, make_store


def test_rows_of_growth(tmp_path: Path) -> None:
    base = make_store(tmp_path / "base.zarr", [Tiny(3.0), Tiny(5.0)])
    table = run(base, tmp_path, videos=(16, 40), seconds=0.2)
    assert [row["videos"] for row in table.rows] == [16, 40] and not (tmp_path / "growth.zarr").exists()
    for row in table.rows:
        assert "note" not in row and row["clips/s"] > 0 and row["first batch s"] > 0, row
    with pytest.raises(UsageError, match="a batch has"):
        run(base, tmp_path, videos=(3,))


def test_simulated_stores_are_not_written_over(tmp_path: Path) -> None:
    with open_store(make_store(tmp_path / "base.zarr", [Tiny(40.0), Tiny(2.0)])) as base:
        with pytest.raises(ConflictError, match="is there already"):
            simulate(base, base.path, 5)
        with pytest.raises(UsageError):
            simulate(base, tmp_path / "x.zarr", 0)
    with (
        open_store(make_store(tmp_path / "long.zarr", [Tiny(40.0)])) as long,
        pytest.raises(UsageError, match="fits into a shard"),
    ):
        simulate(long, tmp_path / "x.zarr", 5)
