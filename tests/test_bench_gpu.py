"""`bench gpu`: at toy size on a CPU it runs, part by part, and what fails costs that part alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from avstore.errors import UsageError
from benchmarks import gpu, gpu_store, gpu_train
from benchmarks.gpu import PARTS, Bench, Part, Report, Row
from cli import bench_gpu

QUICK = ("limits", "train", "jpeg", "bank", "search", "adam", "batch-norm")


def run(*parts: str, **how: object) -> Report:
    return gpu.run(device="cpu", parts=parts, **how)  # type: ignore[arg-type]


def test_quick_parts_on_a_cpu(tmp_path: Path) -> None:
    report = run(*QUICK)
    assert list(report.parts) == [p for p in PARTS if p in QUICK] and report.size == "toy"
    assert {name: part["why"] for name, part in report.parts.items() if part["why"]} == {}
    rows = {row["what"]: row for part in report.parts.values() for row in part["rows"]}
    for row in rows.values():
        assert row.get("value") is not None or row["note"], row  # measured, or why not
    steps = [r for r in report.parts["train"]["rows"] if r.get("value")]
    assert steps and all(r["limit"] > 0 and r["of"] == pytest.approx(r["value"] / r["limit"]) for r in steps)
    (adam,) = report.parts["adam"]["rows"]
    assert adam["value"] == 0
    assert all(r["value"] == 1 for r in report.parts["search"]["rows"] if r["what"].startswith("queries with"))
    assert "refuses a CPU" in report.parts["batch-norm"]["rows"][0]["note"]
    as_json, as_markdown = report.write(tmp_path / "out")
    assert json.loads(as_json.read_text())["parts"].keys() == report.parts.keys()
    text = as_markdown.read_text()
    assert "these numbers show that the script runs, and nothing else" in text and "| what | value |" in text


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path: Path) -> None:
    report = run(minutes=30)
    assert list(report.parts) == list(PARTS)
    assert {name: part["why"] for name, part in report.parts.items() if part["why"]} == {}
    retrieval = [r for r in report.parts["run"]["rows"] if r["what"].startswith("R@1")]
    assert retrieval and all(0 <= r["value"] <= 1 for r in retrieval)
    assert next(r for r in report.parts["ingest"]["rows"] if r["what"].startswith("ingest --decode pyav"))["value"] > 0


def test_the_report_in_short_and_figures_in_their_size(tmp_path: Path) -> None:
    rows = [
        {"what": "a", "value": 2.0, "unit": "clips/s", "limit": 8.0},
        {"what": "b", "value": 2.0, "unit": "s", "limit": 1.0},  # twice as long as need be
        {"what": "c", "value": 4e-7, **gpu.wanted(4e-7, "==", 0)},
        {"what": "d", "value": float("nan"), "limit": 1.0, **gpu.wanted(float("nan"), "<=", 1), "note": "empty"},
        {"what": "e", **gpu.wanted(None, ">=", 0.8, "of the bare loop"), "note": "not measured: a CPU"},
        {"what": "f", "value": 12345.6, "limit": float("inf"), **gpu.wanted(12345.6, ">=", 3)},
    ]
    part = {"rows": [gpu._ratio(r) for r in rows], "why": "it was late", "seconds": 3.0}
    a, b, c, d, e, f = part["rows"]
    assert a["of"] == 0.25 and b["of"] == 0.5 and "of" not in f
    assert c["met"] is False and f["met"] is True and "met" not in e and e["asked"] == ">= 0.8 of the bare loop"
    assert d["met"] is False and "value" not in d and d["note"] == "not measured: it came out as nan; empty"
    report = Report({"device": "x"}, "full", 3.0, {"adam": part})
    as_json, as_markdown = report.write(tmp_path)  # JSON without NaN, or all would be lost with one figure
    assert json.loads(as_json.read_text())["parts"]["adam"]["rows"][2]["value"] == 4e-7
    text = as_markdown.read_text()
    assert "| c | 4e-07 | == 0 | no |" in text and "12,346" in text and "toy" not in text.lower()
    short = report.verdicts()
    assert [r["what"] for r in short.rows] == ["c", "d", "e", "f", "did not end"]
    assert short.rows[-1]["note"] == "it was late" and "| adam | c | 4e-07 | == 0 | no |" in text


def test_the_wait_for_data_is_the_hosts_and_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_prefetch import Cuda, Feed

    from trainers.prefetch import Ahead

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    row = gpu_store.waiting({"host": 0.004, "device": 0.003})
    assert row["value"] == pytest.approx(0.007) and row["met"] is True
    assert "the host for the reader 0.40%, the device for copies and augmentation 0.30%" in row["note"]
    row = gpu_store.waiting({"host": 0.02})
    assert row["met"] is False and "no device" in row["note"]

    cuda, told = Cuda(), []

    class Steps:
        """A trainer whose device waits 1 ms for each batch."""

        def step(self, feed: Any, meter: Any = None) -> None:
            next(feed)
            cuda.wait = 1.0
            cuda.run()
            if meter is not None:
                meter.steps, meter.clips, meter.data = meter.steps + 1, meter.clips + 4, meter.data + 1e-4
                told.append(meter)

    bench = Bench("cpu", gpu.SIZES["toy"], Path())
    cuda.wait = 1.0
    feed = Ahead(Feed(10**6, cuda.log, cuda.now), cuda.side, lambda: True, cuda)
    rate, times = gpu_store._timed(bench, Steps(), feed)  # type: ignore[arg-type]
    wall = 4 * len(told) / rate
    assert times["device"] == pytest.approx(1e-3 * len(told) / wall)  # the batch that warmed up is not in it
    assert times["host"] == pytest.approx(1e-4 * len(told) / wall)


def breaks(bench: Bench) -> Iterator[Row]:
    yield {"what": "before", "value": 1.0}
    raise ValueError("no such\ncard")


def test_a_part_that_fails_costs_that_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "limits", Part("broken", breaks, 10))
    report = run("limits", "batch-norm")
    assert report.parts["limits"]["why"] == "ValueError: no such card"
    assert report.parts["limits"]["rows"] == [{"what": "before", "value": 1.0}]
    assert report.parts["batch-norm"]["why"] is None
    assert "Did not end: ValueError" in report.to_markdown()


def test_a_part_in_a_process_of_its_own() -> None:
    report = run("batch-norm", alone=True)
    assert (
        report.parts["batch-norm"]["why"] is None and "refuses a CPU" in report.parts["batch-norm"]["rows"][0]["note"]
    )
    none = run("batch-norm", minutes=0.01)
    assert "minutes were over" in none.parts["batch-norm"]["why"] and not none.parts["batch-norm"]["rows"]


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(bench_gpu.gpu)
    how = ["--part", "batch-norm", "--part", "adam", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*how, "--json"])
    assert done.exit_code == 0 and list(json.loads(done.stdout)["parts"]) == ["adam", "batch-norm"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md"]
    monkeypatch.setitem(PARTS, "batch-norm", Part("broken", breaks, 10))
    done = CliRunner().invoke(app, how)
    assert done.exit_code == 1 and "Did not end: ValueError: no such card" in done.stdout


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="warp"):
        run("warp")
    with pytest.raises(UsageError, match="huge"):
        run("adam", size="huge")
    with pytest.raises(UsageError, match="minutes"):
        run("adam", minutes=0)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            gpu.run(device="cuda")


def test_multiplications_are_counted_from_shapes() -> None:
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 2 * 2 * 2, 5))
    # 4 x 2^3 outputs of 2 x 27 products each, then 5 x 32
    assert gpu_train.multiplications(net, torch.zeros(1, 2, 4, 4, 4)) == 32 * 54 + 160


@pytest.mark.slow
def test_r2plus1d_18_is_forty_gigamacs() -> None:
    """torchvision's published 40.52 G for 16 frames of 112 pixels."""
    macs = gpu_train.multiplications(gpu_train.Head(64), torch.zeros(1, 3, 16, 112, 112))
    assert macs / 1e9 == pytest.approx(40.5, abs=0.1)
