"""docs/adding-a-method.md: its code is a method, as it stands there."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from test_methods import batch
from tiny_run import store_in

import trainers
from trainers import methods
from trainers.config import resolve
from trainers.embed import embed
from trainers.loop import train
from trainers.metrics import read_metrics

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-method.md"
SETS = ("width=4", "hidden=8", "dim=8", "frames=4", "size=32", "seconds=0.5", "batch=6", "epochs=2", "threads=1",
        "in_process=true", "precision=fp32", "statistics_clips=16", "log_every=1")  # fmt: skip


def blocks() -> dict[str, str]:
    """File that a block of code is for -> the code."""
    found = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) == PAGE.read_text().count("```python"), "a block that says not which file it is"
    return dict(found)


@pytest.fixture
def agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's method, in the table."""
    code = blocks()
    file = tmp_path / "agree.py"
    file.write_text(code["trainers/agree.py"])
    spec = importlib.util.spec_from_file_location("trainers.agree", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trainers.agree", module)
    monkeypatch.setattr(trainers, "agree", module, raising=False)
    spec.loader.exec_module(module)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    exec(compile(code["trainers/methods.py"], str(PAGE), "exec"), vars(methods))


def test_the_page_s_method_trains_and_embeds(agree: None, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    config = resolve("agree", preset="tiny", sets=SETS)
    result = train("agree", store, config, tmp_path / "agree")
    lines = read_metrics(result.run.path / "metrics.jsonl")
    assert result.step == 4 and all(math.isfinite(line["loss"]) for line in lines)
    assert {"feature_std_video", "feature_std_audio"} <= lines[-1].keys()
    done = embed(result.run, store)
    assert sorted(done.towers) == ["audio", "audio-trunk", "video", "video-trunk"] and done.complete


def test_its_loss_by_hand(agree: None) -> None:
    module = sys.modules["trainers.agree"]
    v, a = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0]])
    got = module.contrast(v, a, torch.tensor([0, 1]), torch.tensor([True, True, False]), 0.5)
    expected = [math.log1p(math.exp((0.6 - 0.8) / 0.5))] * 2
    assert got.tolist() == pytest.approx(expected, rel=1e-6)


def test_its_loss_falls_on_one_batch(agree: None) -> None:
    config = resolve("agree", preset="tiny", sets=SETS)
    method = methods.METHODS["agree"].load().make(config.method, 24)
    b = batch(config, list(range(8)))
    optimiser = torch.optim.Adam(method.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss, _metrics = method(b)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_page_is_of_this_tree() -> None:
    root = PAGE.parents[1]
    named = set(re.findall(r"`((?:trainers|avstore|tests)/\w+\.py)`", PAGE.read_text()))
    assert named and not [n for n in named if not (root / n).is_file()]
    assert ast.get_docstring(ast.parse(blocks()["trainers/agree.py"]))
