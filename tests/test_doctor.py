"""`avstore doctor`: the checks of the GPU road, each with what to install, whatever this machine has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from avstore import dali
from cli import doctor
from cli.main import app
from trainers import search

GPU = ("driver", "cuda", "nvdec", "dali", "nvimagecodec", "compile")


def test_every_gpu_check_is_there_and_says_what_to_install(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", "--folder", str(tmp_path)])
    checks = {c["check"]: c for c in json.loads(done.stdout)["checks"]}
    assert set(GPU) | {"faiss", "disk"} <= set(checks)
    for name in GPU:
        assert checks[name]["state"] in ("ok", "none"), checks[name]
        assert ("install" in checks[name]) == (checks[name]["state"] != "ok")
    assert "faiss-" in checks["faiss"]["text"]
    assert "free" in checks["disk"]["text"] and "MiB/s" in checks["disk"]["text"]
    plain = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path)]).stdout
    assert all(name in plain for name in GPU) and ("->" in plain) == any("install" in c for c in checks.values())


def test_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "cuda_devices", lambda: 2)
    monkeypatch.setattr(dali, "has_nvdec", lambda: True)
    monkeypatch.setattr(dali, "installed", lambda: "nvidia-dali-cuda130 2.4.0")
    monkeypatch.setattr(dali, "why_not", lambda kind: None)
    assert doctor._nvdec()[0] == "ok"
    assert doctor._dali() == ("ok", "nvidia-dali-cuda130 2.4.0: ingest --decode dali works")
    monkeypatch.setattr(dali, "has_nvdec", lambda: False)
    assert doctor._nvdec()[0] == "none" and "cannot be reached" in doctor._nvdec()[1]
    monkeypatch.setattr(dali, "why_not", lambda kind: None if kind == "dali-cpu" else "there is no CUDA device")
    state, text = doctor._dali()
    assert state == "ok" and "CPU alone" in text and "no CUDA device" in text
    monkeypatch.setattr(dali, "why_not", lambda kind: "DALI does not start: OSError: libfoo")
    assert doctor._dali()[0] == "broken"


def test_faiss_names_its_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "faiss_flavour", lambda: "cpu")
    assert doctor._faiss()[1].startswith("faiss-cpu")
