"""What a run's networks weigh and what computed them: counted by hand, noted at each start, printed by the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import config, store_in

from avstore.errors import CorruptError
from benchmarks.report import about
from trainers import machine
from trainers.loop import train
from trainers.towers import Towers

CPU = torch.device("cpu")


def test_parameters_by_hand(tmp_path: Path) -> None:
    towers = Towers(seed=0, width=4, hidden=8, dim=8)
    for p in towers.video.parameters():
        p.requires_grad_(False)
    found = machine.parameters(towers)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in towers.named_children()}
    assert found["networks"] == {"video": sizes["video"], "audio": sizes["audio"]}
    assert found["frozen"] == sizes["video"] and found["trained"] == sum(sizes.values()) - sizes["video"]


def test_a_start_is_noted_where_something_changed(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    assert machine.read_machine(tmp_path) is None
    machine.note_machine(tmp_path, net, CPU, "fp32", 0)
    machine.note_machine(tmp_path, net, CPU, "fp32", 5)
    found = machine.read_machine(tmp_path)
    assert found is not None and [s["step"] for s in found["starts"]] == [0]
    assert found["parameters"] == {"trained": 8, "frozen": 0, "networks": {}}
    machine.note_machine(tmp_path, net, CPU, "bf16", 7)
    found = machine.read_machine(tmp_path)
    assert found is not None and [(s["step"], s["precision"]) for s in found["starts"]] == [(0, "fp32"), (7, "bf16")]
    assert machine.sentence(found) == "8 parameters, on 1 x cpu, fp32; 1 x cpu, bf16 from step 7"
    machine.note_machine(tmp_path, net, CPU, "fp32", 3)  # from an earlier checkpoint: what came after is done again
    found = machine.read_machine(tmp_path)
    assert found is not None and [s["step"] for s in found["starts"]] == [0]
    found["starts"] = [{"step": 0, "devices": ["H100", "H100", "A100"]}]
    found["parameters"] = {"trained": 15_379_136, "frozen": 4_725_696, "networks": {"towers.video": 15_379_136}}
    assert machine.short(found) == [("parameters", "15.4 M"), ("devices", "2 x H100 + 1 x A100")]
    assert machine.sentence(found).startswith("15.4 M parameters, 4.7 M frozen (video 15.4 M), on 2 x H100")
    (tmp_path / "machine.json").write_text(json.dumps({"parameters": {}, "starts": []}))
    with pytest.raises(CorruptError, match="damaged"):
        machine.read_machine(tmp_path)


def test_a_run_notes_it_and_the_report_prints_it(tmp_path: Path) -> None:
    run = train("avid", store_in(tmp_path, codec="jpeg"), config("steps=1"), tmp_path / "runs" / "mine").run
    found = machine.read_machine(run.path)
    assert found is not None and found["starts"][0]["devices"] == ["cpu"] and found["starts"][0]["step"] == 0
    assert set(found["parameters"]["networks"]) == {"towers.video", "towers.audio"}
    text = about(run)
    assert "parameters" in text and "1 x cpu" in text and "audio " in text
    (run.path / "machine.json").unlink()  # of an older version
    assert "1 x cpu" not in about(run)
