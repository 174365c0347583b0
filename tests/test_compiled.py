"""`compile=`: the networks alone, in place; the same names in checkpoints, the same losses, resumed or not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import config, store_in, tensors
from torch import nn

from avstore.errors import ExtraMissingError, InterruptedRun, UsageError
from trainers import compiled
from trainers.config import RunConfig, resolve
from trainers.encoders import AudioNet, VideoNet
from trainers.events import Event
from trainers.loop import train
from trainers.run import Run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Method(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio = VideoNet(10, 4, True), AudioNet(10, 4, True)
        self.head = nn.Linear(32, 4)


def test_networks_are_compiled_in_place_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    calls = []

    def fake(function: Any, **how: Any) -> Any:
        asked.append(how)
        return lambda *a: (calls.append(1), function(*a))[1]

    monkeypatch.setattr(torch, "compile", fake)
    method = Method().eval()
    names, x = list(method.state_dict()), torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        before = method.video(x)
        assert compiled.compile_networks(method, "off", CPU) == [] and not asked
        assert compiled.compile_networks(method, "compile", CPU) == ["video", "audio"]
        assert torch.equal(method.video(x), before) and len(calls) == 1
        method.video.forward_blocks(x)  # methods that take the maps run the compiled ones too
    assert len(calls) == 2 and list(method.state_dict()) == names
    assert asked == [{"mode": None, "dynamic": False}] * 2


def test_graphs_on_a_device_only_and_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: modes.append(how["mode"]) or function)
    monkeypatch.setattr(compiled, "why_not", lambda device: None)
    with pytest.raises(UsageError, match="compile=graphs on cpu"):
        compiled.compile_networks(Method(), "graphs", CPU)
    with pytest.raises(UsageError, match="2 processes"):
        compiled.compile_networks(Method(), "graphs", CUDA, 2)
    with pytest.raises(UsageError, match="accumulate=4"):  # the sum of gradients would be the last part's
        compiled.compile_networks(Method(), "graphs", CUDA, parts=4)
    assert compiled.compile_networks(Method(), "graphs", CUDA) and modes == ["reduce-overhead"] * 2
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    compiled.begin_part("compile")
    compiled.begin_part("graphs")
    assert len(begun) == 1


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ExtraMissingError) as e:
        compiled.compile_networks(Method(), "compile", CPU)
    assert "g++" in e.value.why and "compile=off" in e.value.next


def test_the_setting_and_its_former_names() -> None:
    assert resolve("avid", sets=["compile=graphs"]).loop.compile == "graphs"
    with pytest.raises(UsageError, match="compile"):
        resolve("avid", sets=["compile=fast"])
    run = resolve("avid")
    for old, new in ((False, "off"), (True, "compile")):
        told = run.to_json()
        told["values"]["compile"] = old
        del told["values"]["jpeg"]
        again = RunConfig.from_json(told)
        assert again.loop.compile == new and again.loop.jpeg == "cpu"
    # as it was when `compile` was true or false and there was no `jpeg`
    assert run.digest == "290efcd5a941b1cc" and run.replace(compile="compile").digest != run.digest


def losses(store: Any, path: Path, *sets: str, name: str = "avid", on_event: Any = None) -> list[float]:
    got: dict[int, float] = {}

    def hear(event: Event) -> None:
        if event.kind == "step":
            got[event.step] = event.values["loss"]
        if on_event:
            on_event(event)

    train(name, store, config(*sets, name=name), path, on_event=hear)
    return [got[k] for k in sorted(got)]


needs_compiler = pytest.mark.skipif(
    compiled.why_not(CPU) is not None, reason=f"torch.compile does not work here: {compiled.why_not(CPU)}"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own compiler
def test_losses_are_those_without_also_when_resumed(tmp_path: Path) -> None:
    """AVID: a bank that `after_step` writes in Python, a short last batch, several epochs."""
    store = store_in(tmp_path)
    # 10 videos: batches of 4, 4 and 2, whose batch norms of two clips multiply every difference: at the preset's rate
    # of 2e-3 the roundings of other kernels are a tenth of the loss after eight steps, at 1e-4 they stay below 1e-3
    how = ("batch=4", "learning_rate=1e-4")
    plain = losses(store, tmp_path / "plain", *how)
    made = losses(store, tmp_path / "made", *how, "compile=compile")
    assert len(made) == len(plain) >= 9
    assert made == pytest.approx(plain, rel=2e-3)
    assert list(tensors(Run(tmp_path / "made"))) == list(tensors(Run(tmp_path / "plain")))

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRun):
        losses(store, tmp_path / "parts", *how, "compile=compile", on_event=stop)
    rest = losses(store, tmp_path / "parts", *how, "compile=compile")
    assert rest == pytest.approx(made[4:], rel=1e-5)
