"""`bench methods`: the budget of each row, what is set for whom, and the whole bench on a tiny store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import avstore
from avstore.errors import UsageError
from avstore.store import Store
from benchmarks import methods as bench
from tests.tiny_store import Tiny, default_spec, make_store
from trainers.methods import METHODS
from trainers.run import Run

SMALL = ("width=4", "frames=2", "hidden=8", "dim=8", "negatives=4", "batch=4", "positives=2", "statistics_clips=8",
         "in_process=true", "threads=1", "precision=fp32", "fps=8")  # fmt: skip
ALONE = [s for s in SMALL if not s.startswith("positives")]  # for avid


@pytest.fixture
def store(tmp_path: Path) -> Store:
    videos = [
        Tiny(2, key=f"{'test' if i % 3 == 0 else 'train'}/{i:02d}.mp4", label=["cat", "dog"][i % 2],
             split="test" if i % 3 == 0 else "train")
        for i in range(18)
    ]  # fmt: skip
    return avstore.open(make_store(tmp_path / "s.zarr", videos, default_spec(sample_rate=24000)))


def test_a_row_shares_its_budget_with_its_stages(tmp_path: Path) -> None:
    of = {m: [(s.method, s.steps) for s in bench.stages(m, 200, 0, tmp_path)] for m in METHODS}
    assert of["avid"] == [("avid", 200)]
    assert of["avid-cma"] == [("avid", 100), ("avid-cma", 100)]
    assert of["temporal"] == [("avid", 100), ("avid-cma", 50), ("temporal", 50)]
    assert of["sscl"] == [("sscl-stage-1", 100), ("sscl", 100)]
    assert of["ccl"] == [("avid", 100), ("ccl", 100)]  # its teacher
    assert of["listen-to-look"][0] == ("avid", 100)
    assert all(sum(n for _, n in rows) == 200 for rows in of.values())
    assert bench.stages("temporal", 7, 0, tmp_path)[-1].path == tmp_path / "temporal-s0"
    assert sum(s.steps for s in bench.stages("temporal", 7, 0, tmp_path)) == 7


def test_stages_of_one_budget_are_shared_and_others_are_not(tmp_path: Path) -> None:
    cma, ccl = bench.stages("avid-cma", 200, 1, tmp_path), bench.stages("ccl", 200, 1, tmp_path)
    assert cma[0] == ccl[0]
    assert cma[0] != bench.stages("avid-cma", 100, 1, tmp_path)[0] != bench.stages("avid", 100, 1, tmp_path)[0]


def test_every_method_gets_the_common_settings_that_it_has(tmp_path: Path) -> None:
    for method in METHODS:
        values = bench.configuration(method, 20, 3).values()
        assert (values["steps"], values["seed"]) == (20, 3)
        for key, value in bench.COMMON.items():
            if key in values and key not in bench.KEPT.get(method, ()):
                assert values[key] == value, (method, key)
    assert bench.configuration("avid", 20, 0, ["width=16"]).values()["width"] == 16


def test_the_table_and_a_second_time(store: Store, tmp_path: Path) -> None:
    args = {"methods": ["avid-cma", "ccl"], "steps": 4, "seeds": 2, "sets": SMALL, "raw": False}
    stored = sorted(store.path.rglob("*"))
    table = bench.bench(store, tmp_path / "out", **args)
    rows = {r["method"]: r for r in table.rows}
    assert set(rows) == {"avid-cma", "ccl", "random weights of avid-cma", "chance"}
    assert rows["avid-cma"]["of"] == 2 and len(rows["avid-cma"]["v-a"]) == 2
    shown = {r[0]: dict(zip(table.columns, r, strict=True)) for r in table.cells()}
    mean, sd = rows["avid-cma"]["v-a"]
    assert shown["avid-cma"]["v-a"] == f"{mean:.3f} ± {sd:.3f}"
    assert rows["chance"]["v-v"] == pytest.approx(0.5, abs=0.1)
    assert "a-a" not in rows["ccl"]  # its student sees and does not hear
    run = Run(tmp_path / "out" / "avid-cma-s0")
    assert run.checkpoint().step == 2 and (tmp_path / "out" / "stages" / "avid-2-s0").is_dir()
    assert run.config.values()["width"] == 4
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json*")}
    again = bench.bench(store, tmp_path / "out", **args)
    assert again.to_markdown() == table.to_markdown()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json*")} == before  # nothing was done again
    assert sorted(store.path.rglob("*")) == stored  # nothing is written into it


def test_folds_leave_each_seed_its_own(tmp_path: Path) -> None:
    videos = [Tiny(1, key=f"{i:02d}.mp4", label=["cat", "dog"][i % 2]) for i in range(18)]
    store = avstore.open(make_store(tmp_path / "s.zarr", videos, default_spec(sample_rate=24000)))
    bench.bench(store, tmp_path, methods=["avid"], steps=2, seeds=2, sets=ALONE, fold_count=3, raw=False)
    a, b = (set(Run(tmp_path / f"avid-s{s}").snapshot.numbers.tolist()) for s in (0, 1))
    assert len(a) == len(b) == 12 and a != b


def test_a_vector_of_zeros_resembles_its_like_only() -> None:
    x, who = np.array([[3.0, 4.0], [0, 0], [0, 0], [1, 0]], np.float32), np.array([7, 7, 9, 2])
    means, videos = bench._means(x, who)
    assert videos.tolist() == [2, 7, 9]
    np.testing.assert_allclose(means, [[1, 0, 0], [0.6 / 2**0.5, 0.8 / 2**0.5, 1 / 2**0.5], [0, 0, 1]], atol=1e-7)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"methods": ["avidd"]}, "avidd"),
        ({"sets": ["widht=4"]}, "width"),
        ({"sets": ["steps=4"]}, "--steps"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 1, "methods": ["avid-cma"]}, "each has at least one"),
        ({"label": "lable"}, "label"),
    ],
)
def test_wrong_ways(store: Store, tmp_path: Path, change: dict[str, object], said: str) -> None:
    given: dict[str, object] = {"methods": ["avid"], "steps": 4, "seeds": 1, **change}
    with pytest.raises(avstore.errors.AvstoreError, match=said):
        bench.bench(store, tmp_path / "x", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
    assert issubclass(UsageError, avstore.errors.AvstoreError)
