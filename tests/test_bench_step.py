"""bench step, toy sizes: every part answers, and what it says of certificates is true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import config, store_in
from torch.nn import functional as F

from avstore.errors import UsageError
from benchmarks import step
from trainers.compiled import why_not
from trainers.loop import train

SETS = ("width=4", "hidden=8", "dim=8", "size=32", "frames=4", "seconds=0.5", "batch=4", "negatives=8", "threads=1")
TOY = step.Sizes(rows=16, rounds=2, steps=1, banks=(50, 300), mining=(400,), queries=64)


def test_loop_and_rates() -> None:
    over, rates = step.run("avid", sets=SETS, sizes=TOY, only=["overhead", "rates"], threads=1)
    assert [r["step"] for r in over.rows] == ["forward and backward", "with optimiser and bank", "loop"]
    assert over.rows[0]["above"] == 0 and all(r["ms"] > 0 and r["clips/s"] > 0 for r in over.rows)
    assert "above forward and backward; the bar is 5 %" in over.notes[0]
    assert [r["form"] for r in rates.rows] == list(step.FORMS) and rates.rows[0]["times"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own compiler
def test_compiled_steps() -> None:
    missing = why_not(torch.device("cpu"))
    (table,) = step.run("avid", sets=SETS, sizes=TOY, only=["compiled"], threads=1)
    rows = {r["compile"]: r for r in table.rows}
    assert list(rows) == (["off", "graphs", "compile"] if missing else ["off", "compile", "graphs"])
    assert rows["off"]["times"] == 1 and rows["graphs"]["note"] == "not on a CPU"
    if missing is None:
        assert rows["compile"]["clips/s"] > 0 and rows["compile"]["losses apart"] < 1e-2
        assert 0 <= rows["compile"]["first loss apart"] < 1e-4  # one forward pass of float32 through the same weights
        assert "apart" in rows["compile"]["note"] and any("losses of 4 steps" in note for note in table.notes)


@pytest.mark.parametrize("name", ["crisscross", "supervised"])
def test_methods_with_views_and_labels(name: str) -> None:
    (over,) = step.run(name, "tiny", sets=["batch=4", "width=4", "size=32"], sizes=TOY, only=["overhead"], threads=1)
    assert over.rows[-1]["ms"] > 0


def test_bank_and_mining(tmp_path: Path) -> None:
    run = train("avid", store_in(tmp_path), config("steps=4", "draws=2"), tmp_path / "avid").run
    bank, mining = step.run("avid", sizes=TOY, only=["bank", "mining"], bank=run.path, threads=1)
    assert [r["videos"] for r in bank.rows] == [50, 300]
    assert all(r[c] > 0 for r in bank.rows for c in ("update ms", "draw ms", "gather ms"))
    assert [(r["bank"], r["engine"]) for r in mining.rows] == [
        (k, e) for k in (*step.BANKS, "avid, trained") for e in ("torch", "faiss")
    ]
    for row in mining.rows:
        assert 0 <= row["certified at once"] <= row["certified"] <= 1 and row["s in all"] > 0
        if row["bank"] in ("random", "correlated"):
            assert row["certified"] == 1 and row["ties"] == 0
    assert 4 <= mining.rows[-1]["videos"] <= 10


@pytest.mark.parametrize("kind", step.BANKS)
def test_banks_are_what_they_are_called(kind: str) -> None:
    bank = F.normalize(step.BANKS[kind](4000, torch.Generator().manual_seed(0)), dim=-1)
    assert bank.shape == (4000, 2, step.DIM) and torch.isfinite(bank).all()
    v, a = (bank[:400, j] @ bank[:400, j].T for j in range(2))
    off = ~torch.eye(400, dtype=torch.bool)
    together = float(torch.corrcoef(torch.stack([v[off], a[off]]))[0, 1])
    mean = float(v[off].mean())
    expected = {"random": (0.0, 0.0), "correlated": (0.6, 0.02), "class-only": (0.4, 0.02), "uncorrelated": (0.0, 0.02),
                "collapsed": (0.0, 0.999), "hubby": (0.6, 0.3)}[kind]  # fmt: skip
    assert together == pytest.approx(expected[0], abs=0.35) and mean == pytest.approx(expected[1], abs=0.2)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="did you mean mining"):
        step.run(only=["minin"])
    with pytest.raises(UsageError, match="did you mean hubby"):
        step.run(kinds=["huby"])
    with pytest.raises(UsageError, match="nothing to measure"):
        step.run(sizes=step.Sizes(rounds=0))
