"""Tests of tests/gpu run on a CUDA device only: `pytest -m gpu`. Elsewhere each is skipped, with what is missing."""

from __future__ import annotations

import os

import pytest
import torch

# before the first product of the session: torch asks once, and would tell every deterministic run of a later test that
# cuBLAS is not
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "gpu" in item.path.parent.parts]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        # deterministic=true warns of kernels that torch has no deterministic form of (max pools backwards)
        item.add_marker(pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"))
        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = f"torch {torch.__version__} finds no device" if built else "this torch is built without CUDA"
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {why} (avstore doctor)"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that give the same bits each time, products in full float32: what the CPU's tests promise."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
