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
    compares (1: one clip, its picture with its sound). None: its settings say."""

    load: Callable[[], MethodFile]
    paper: str
    summary: str
    picture: bool | None = True
    sound: bool | None = True
    labels: bool = False
    views: int | None = 1
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


def _temporal() -> MethodFile:
    from trainers import temporal as t

    return MethodFile(t.Config, t.PRESETS, t.Temporal, load_stage="load_avid_cma", clips=t.snippet_views)


def _crisscross() -> MethodFile:
    from trainers import crisscross as c

    return MethodFile(c.Config, c.PRESETS, c.CrissCross, clips=c.two_views)


def _sscl_stage_1() -> MethodFile:
    from trainers import sscl

    return MethodFile(sscl.Config, sscl.PRESETS, sscl.StageOne)


def _sscl() -> MethodFile:
    from trainers import sscl

    return MethodFile(sscl.Config, sscl.PRESETS, sscl.StageTwo, load_stage="load_stage_one")


def _supervised() -> MethodFile:
    from trainers import supervised as m

    return MethodFile(m.Config, m.PRESETS, m.Supervised, clips=m.clips)


def _simclr() -> MethodFile:
    from trainers import simclr as m

    return MethodFile(m.Config, m.PRESETS, m.SimClr, clips=m.clips)


def _moco() -> MethodFile:
    from trainers import moco as m

    return MethodFile(m.Config, m.PRESETS, m.MoCo, clips=m.clips)


def _byol() -> MethodFile:
    from trainers import byol as m

    return MethodFile(m.Config, m.PRESETS, m.Byol, clips=m.clips)


def _simsiam() -> MethodFile:
    from trainers import simsiam as m

    return MethodFile(m.Config, m.PRESETS, m.SimSiam, clips=m.clips)


def _barlow_twins() -> MethodFile:
    from trainers import barlow_twins as m

    return MethodFile(m.Config, m.PRESETS, m.BarlowTwins, clips=m.clips)


def _iic() -> MethodFile:
    from trainers import iic as m

    return MethodFile(m.Config, m.PRESETS, m.Iic, clips=m.clips)


def _l3() -> MethodFile:
    from trainers import l3 as m

    return MethodFile(m.Config, m.PRESETS, m.L3, clips=m.clips)


def _avts() -> MethodFile:
    from trainers import avts as m

    return MethodFile(m.Config, m.PRESETS, m.Avts, clips=m.clips)


def _xdc() -> MethodFile:
    from trainers import xdc as m

    return MethodFile(m.Config, m.PRESETS, m.Xdc, clips=m.clips)


def _cm_acc() -> MethodFile:
    from trainers import cm_acc as m

    return MethodFile(m.Config, m.PRESETS, m.CmAcc, clips=m.clips)


def _avcl() -> MethodFile:
    from trainers import avcl as m

    return MethodFile(m.Config, m.PRESETS, m.Avcl, clips=m.clips)


def _ccl() -> MethodFile:
    from trainers import ccl as m

    return MethodFile(m.Config, m.PRESETS, m.Ccl, clips=m.clips, teachers=lambda c: c.sources())


def _listen_to_look() -> MethodFile:
    from trainers import listen_to_look as m

    return MethodFile(m.Config, m.PRESETS, m.ListenToLook, clips=m.clips, teachers=lambda c: (c.teacher,))


def _published() -> MethodFile:
    from trainers import published as p

    return MethodFile(p.Config, p.PRESETS, p.Published)


METHODS: dict[str, Method] = {
    "avid": Method(_avid, "Morgado et al. 2020", "instance discrimination across sight and sound"),
    "avid-softmax": Method(_avid_softmax, "audio-focused report, ch. 4", "AVID as a (K+1)-way softmax"),
    "avid-cma": Method(_avid_cma, "Morgado et al. 2021", "AVID, then positives that agree in both", stage="avid"),
    "temporal": Method(
        _temporal, "Lavania et al.", "AVID-CMA that fills in masked snippets", views=None, stage="avid-cma"
    ),
    "crisscross": Method(_crisscross, "Sarkar and Etemad 2023", "predicts across sight, sound and time", views=2),
    "sscl-stage-1": Method(_sscl_stage_1, "Zhang et al. 2021", "sight learns alone, then teaches sound"),
    "sscl": Method(_sscl, "Zhang et al. 2021", "then sound teaches sight", stage="sscl-stage-1"),
    "avcl": Method(_avcl, "Liu et al. 2022", "fuses, aligns and contrasts a clip and the whole sound"),
    "ccl": Method(
        _ccl, "Chen et al. 2021", "distils teachers of sound and images by composition", sound=None, labels=True
    ),
    "listen-to-look": Method(
        _listen_to_look, "Gao et al. 2020", "one picture and its sound learn what a clip model says", labels=True
    ),
    "simclr": Method(_simclr, "Chen et al. 2020", "a batch' pictures and sounds find their partners"),
    "moco": Method(_moco, "He et al. 2020", "contrast with queues of a momentum copy's keys"),
    "byol": Method(_byol, "Grill et al. 2020", "predicts a momentum copy's view of the other modality"),
    "simsiam": Method(_simsiam, "Chen, He 2021", "predicts the other modality, whose side takes no gradient"),
    "barlow-twins": Method(_barlow_twins, "Zbontar et al. 2021", "dimensions that agree and do not repeat each other"),
    "iic": Method(_iic, "Tao et al. 2020", "contrast with other videos and with the own one without its time"),
    "l3": Method(_l3, "Arandjelovic, Zisserman 2017", "do this picture and this sound belong together?"),
    "avts": Method(_avts, "Korbar et al. 2018", "in time or not: other videos first, then shifted sound", views=2),
    "xdc": Method(_xdc, "Alwassel et al. 2020", "each modality learns the clusters of the other"),
    "cm-acc": Method(_cm_acc, "Ma et al. 2021", "contrast with keys chosen for their gradients"),
    "supervised": Method(
        _supervised, "AVCL's baselines", "labels of picture, sound or both", picture=None, sound=None, labels=True
    ),
}


# Networks that are used and never trained: `avstore convert` makes their runs. No `train --list` shows them.
FROZEN: dict[str, Method] = {"published": Method(_published, "as the checkpoint says", "weights that others published")}


def method(name: str) -> Method:
    """The line of METHODS (or FROZEN). UsageError with the closest names for an unknown one."""
    if name in FROZEN:
        return FROZEN[name]
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", did_you_mean(name, METHODS), "avstore train --list")
    return METHODS[name]
