"""A second device that is none: tensors that say they are on `meta`, hold their numbers on the CPU, and refuse to meet
tensors of the CPU where CUDA would. What moves, what stays behind and what mixes shows without a GPU.

    with TwoDevices(): method.to(FAR); method(batch)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

FAR = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_, aten.copy)  # between devices
_TENSOR = torch.tensor
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)  # CUDA takes indices on the CPU


class Far(torch.Tensor):
    """A tensor on FAR; `near` is its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR
        )
        made.near = near
        return made

    def __init__(self, near: torch.Tensor) -> None: ...

    def tolist(self) -> Any:
        return self.near.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:  # type: ignore[override]
        return _TENSOR(data, dtype=dtype or self.dtype).to(FAR)  # torch's own never comes to a mode

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """While it is on, what is made on FAR is a `Far`, and an operation on tensors of both devices is an error."""

    def __enter__(self) -> Any:
        torch.tensor = _tensor  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *what: Any) -> None:
        torch.tensor = _TENSOR
        super().__exit__(*what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _tensor(data: Any, *, device: Any = None, **how: Any) -> torch.Tensor:
    made = _TENSOR(data, **how)
    return made if device is None else made.to(device)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    near = [x for x in tensors if not isinstance(x, Far) and x.dim()]
    kind = func.overloadpacket
    allowed = kind in COPIES or (kind in INDEXED and isinstance(args[0], Far))
    if far and near and not allowed:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    asked = kwargs.get("device")
    there = bool(far) if asked is None else torch.device(asked).type == FAR.type
    if kind is aten.copy_:
        there = isinstance(args[0], Far)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    out = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    if not there:
        return out
    out = tree_map(lambda x: Far(x) if isinstance(x, torch.Tensor) and not isinstance(x, Far) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if far else out


def _near(x: Any) -> Any:
    return x.near if isinstance(x, Far) else x
