"""avstore: videos with sound, decoded once into a plain Zarr v3 store; clips cut from it at the speed of the machine.

    import avstore

    store = avstore.open("kinetics.zarr")
    clip = store.clip(0, offset=1.5, n=16, fps=16)      # frames (T, H, W, 3) uint8, waveform (samples,) int16

Importing this package loads neither torch nor PyAV; what needs them imports them when it is called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from avstore.ingest import ingest as ingest
    from avstore.store import Clip as Clip
    from avstore.store import Store as Store
    from avstore.store import open as open
    from avstore.verify import verify as verify

_HOMES = {
    "open": "avstore.store",
    "Store": "avstore.store",
    "Clip": "avstore.store",
    "ingest": "avstore.ingest",
    "verify": "avstore.verify",
}

__all__ = ["Clip", "Store", "__version__", "ingest", "open", "verify"]


def _load(name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def _public(name: str) -> property:
    # the setter ignores: importing the submodule avstore.ingest would put the module in the place of the function
    return property(lambda _: _load(name), lambda _, __: None)


_Package = type("_Package", (ModuleType,), {name: _public(name) for name in _HOMES})
sys.modules[__name__].__class__ = _Package
