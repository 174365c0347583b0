"""The table of methods: the only place where a method's name becomes code.

A line says what can be said without importing the method's file (help stays light); `load` imports it. A new method is
one file and one line here: `docs/adding-a-method.md` walks through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from avstore.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from avstore.views import Views


@dataclass(frozen=True)
class MethodFile:
    """What a method's file offers.

    config: its frozen dataclass. Fields frames, fps, size, seconds, front_end, max_offset, copies say what clip it is
    fed (`needs.Needs`); where that takes more than a field, the dataclass has a method `needs() -> Needs` instead.
    presets: at least REQUIRED. make: (config, rows of the selection) -> the module; of a line with labels also the
    names of the classes, in the order of their labels. load_stage: name of its method that takes the weights and state
    of the stage before. clips: (config, sample rate) -> how clips are cut; None: one clip, `AvidView(max_offset)`.
    teachers: config -> the sources of its teachers (`teacher.py`), whose digests the run keeps.
    """

    config: type[Any]
    presets: Mapping[str, Any]
    make: Callable[..., Any]
    load_stage: str | None = None
    clips: Callable[[Any, int], Views] | None = None
    teachers: Callable[[Any], tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Method:
    """A line of METHODS. `stage` names the method whose run this one starts from; `views`: clips of a video that it
    compares (1: one clip, its picture with its sound)."""

    load: Callable[[], MethodFile]
    paper: str
    summary: str
    picture: bool = True
    sound: bool = True
    labels: bool = False
    views: int = 1
    stage: str | None = None


REQUIRED = ("paper", "tiny")  # presets that every method has


def _avid() -> MethodFile:
    from trainers import avid

    return MethodFile(avid.Config, avid.PRESETS, avid.Avid)


def _avid_softmax() -> MethodFile:
    from trainers import avid

    return MethodFile(avid.SoftmaxConfig, avid.SOFTMAX_PRESETS, avid.Avid)


def _avid_cma() -> MethodFile:
    from trainers import avid_cma

    return MethodFile(avid_cma.Config, avid_cma.PRESETS, avid_cma.AvidCma, load_stage="load_avid")


METHODS: dict[str, Method] = {
    "avid": Method(_avid, "Morgado et al. 2021", "instance discrimination across sight and sound"),
    "avid-softmax": Method(_avid_softmax, "audio-focused report, ch. 4", "AVID as a (K+1)-way softmax"),
    "avid-cma": Method(_avid_cma, "Morgado et al. 2021", "AVID, then positives that agree in both", stage="avid"),
}


def method(name: str) -> Method:
    """The line of METHODS. UsageError with the closest names for an unknown one."""
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", did_you_mean(name, METHODS), "avstore train --list")
    return METHODS[name]
