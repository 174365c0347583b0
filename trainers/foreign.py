"""Checkpoints that others wrote: opened as tensors and nothing else, their wrappings taken off.

`torch.load(weights_only=True)` reads tensors, numbers, text and containers of these. A file that asks for more is
refused with what it asks for: opening it would run code of its choice.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avstore.errors import ConflictError, CorruptError

WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")


def load_tensors_only(path: Path) -> Any:
    """What `torch.save` wrote, as tensors, numbers, text and containers of these; nothing is executed.

    ConflictError for a file that asks for anything else, CorruptError for one that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as e:  # what torch raises for a file that it cannot read has no common class
        asked = [line.strip() for line in str(e).splitlines() if re.search("Unsupported (global|class)|GLOBAL ", line)]
        if type(e).__name__ == "UnpicklingError" and asked:
            raise ConflictError(
                f"{path} holds more than tensors, and is not opened",
                asked[0],
                "where you trust it: load it with torch yourself, and torch.save its state_dict alone",
            ) from e
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise CorruptError(f"{path} is no checkpoint of torch", first, "download it again") from e


def state_dict_in(whole: Any, path: Path) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The state dict inside a checkpoint, without `module.`; and what lies beside it."""
    left: list[tuple[str, str]] = []
    if isinstance(whole, Mapping):
        for key in WRAPPERS:
            if isinstance(whole.get(key), Mapping):
                for other in whole:
                    if other == "train_criterion" and isinstance(whole[other], Mapping):
                        left += [(f"{other}.{k}", _reason(k)) for k in whole[other]]
                    elif other != key:
                        left.append((str(other), "not weights"))
                whole = whole[key]
                break
    if not isinstance(whole, Mapping):
        raise ConflictError(f"{path} holds no state dict", f"it is a {type(whole).__name__}", "name another file")
    tensors = {}
    for name, x in whole.items():
        if isinstance(x, Tensor):
            tensors[str(name).removeprefix("module.")] = x
        else:
            left.append((str(name), "not a tensor"))
    return tensors, left


def _reason(name: str) -> str:
    if name.endswith(("view1_mem", "view2_mem")):
        return "memory bank of its authors' videos: its rows are not yours"
    if name.endswith("positive_set"):
        return "positives among its authors' videos"
    return "kept as the partition constant" if name.endswith("avg_exp_score") else "not weights"


def partition_in(whole: Any) -> float | None:
    """AVID's Z: the mean of the saved constants (those above 0)."""
    criterion = whole.get("train_criterion") if isinstance(whole, Mapping) else None
    if not isinstance(criterion, Mapping):
        return None
    values = [float(x) for k, x in criterion.items() if str(k).endswith("avg_exp_score") and float(x) > 0]
    return sum(values) / len(values) if values else None


def digest_of(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
