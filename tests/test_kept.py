"""What is kept is not done again, and damage is seen."""

from __future__ import annotations

import numpy as np
import pytest

from avstore.errors import CorruptError
from benchmarks.kept import Kept


def test_kept_once_by_key(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(3.0), "y": np.zeros((2, 0), np.int64)}

    kept = Kept(tmp_path / "work")
    for _ in range(2):
        found = kept.arrays({"a": 1}, make)
        assert found["x"].tolist() == [0, 1, 2] and found["y"].shape == (2, 0)
    assert len(calls) == 1
    kept.arrays({"a": 2}, make)
    Kept(None).arrays({"a": 1}, make)  # keeps nothing, finds nothing
    assert len(calls) == 3
    assert kept.value({"v": 1}, lambda: {"accuracy": 0.5}) == kept.value({"v": 1}, lambda: 1 / 0) == {"accuracy": 0.5}
    assert (tmp_path / "work" / "keys.jsonl").read_text().count('"a":') == 2


def test_damage_is_told(tmp_path):
    kept = Kept(tmp_path)
    kept.arrays({"a": 1}, lambda: {"x": np.ones(4)})
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CorruptError, match="damaged"):
        kept.arrays({"a": 1}, lambda: {"x": np.ones(4)})
