"""Device and kernels of a process, on a stand-in for CUDA: one device each, named; flags set and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from avstore.errors import UsageError
from trainers.process import choose_device, kernels

CUDA = torch.device("cuda", 0)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return chosen


def test_each_process_takes_its_own_device(two_devices: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == torch.device("cuda", 0) and choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="no device cuda:2"):
        choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cuda") == torch.device("cuda", 1) == two_devices[-1]
    with pytest.raises(UsageError, match="several processes"):  # all four on one device: NCCL would hang or refuse
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UsageError) as e:
        choose_device("cuda")
    assert "--nproc-per-node 2" in e.value.next


def flags() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()


def test_the_fastest_kernels_or_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with kernels(torch.device("cpu"), True):
        assert flags() == before
    with kernels(CUDA, False):
        assert flags() == (True, False, False)
    with pytest.raises(KeyError), kernels(CUDA, True):
        import os

        assert flags() == (False, True, True) and os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
        raise KeyError("out")
    assert flags() == before
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # asked for by whoever called us
    with kernels(CUDA, False):
        assert flags() == (before[0], True, False)
