"""What a run is told: presets, TOML files and `key=value`, resolved into one frozen value.

A run has one flat namespace of keys. A method's own `Config` (its file: the paper's values) comes first; `TrainConfig`
below holds what the loop does for every method. Where a method declares a key of `TrainConfig` too (learning_rate,
batch, ...), its value is the one that counts, and the loop reads it from there: `RunConfig.loop` is always the truth.

    resolve("avid-cma", preset="tiny", sets=["positives=8", "avid.epochs=4"])

Not here: the methods (`methods.py`), where values come from (`settings.py`), how a text becomes one (`typed.py`), what
a store makes of them (`fit.py`), and where they are kept (`run.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from avstore.durable import canonical_json
from avstore.errors import NotFoundError, UsageError, did_you_mean
from trainers.methods import METHODS, method
from trainers.typed import typed

__all__ = ["METHODS", "RunConfig", "TrainConfig", "method", "resolve", "resolve_stage"]


@dataclass(frozen=True)
class TrainConfig:
    """What the loop does with any method. Keys that change no number of a run are in `FREE`."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"  # [ours] AVID's; methods that say otherwise declare it
    learning_rate: float = 1e-3  # [ours] of a method that declares none
    momentum: float = 0.9  # [ours] of sgd
    nesterov: bool = False  # [ours] of sgd
    weight_decay: float = 0.0  # [ours] L2 in adam and sgd (as torch does), decoupled in adamw
    larc: float = 0.0  # [ours] off; trust coefficient of LARC, before adam or sgd (CrissCross 0.001)
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # [ours] after the warm-up
    warmup_steps: int = 0  # [ours] linear from learning_rate / (warmup_steps + 1)
    milestones: tuple[int, ...] = ()  # [ours] epochs after which multistep multiplies by `decay`
    decay: float = 0.1  # [ours]
    final_rate: float = 0.0  # [ours] where the cosine ends (CrissCross 1e-4)
    clip_gradient: float = 0.0  # [ours] largest norm of the gradient; 0: as it is
    epochs: int = 1  # [ours] times `draws` passes over the videos
    steps: int = 0  # [ours] optimiser steps in all; 0: as `epochs` says
    draws: int = 1  # [ours] clips of each video in an epoch
    batch: int = 64  # [ours] clips of an optimiser step, over all processes
    accumulate: int = 1  # [ours] parts in which a batch goes through the nets (batch statistics are of a part)
    distinct: bool = False  # [ours] no two clips of one video in a batch
    drop_last: bool = False  # [ours] leave out an epoch's last, short batch
    seed: int = 0  # [ours]
    crop: Literal["resized", "random"] = "resized"  # [C] AVID; random: at the scale of evaluation's crop, any place
    crop_area: tuple[float, float] = (0.08, 1.0)  # [C] AVID: of a resized crop, share of the picture
    flip: float = 0.5  # [C] AVID
    brightness: float = 0.4  # [C] AVID: colour jitter
    contrast: float = 0.4  # [C] AVID
    saturation: float = 0.4  # [C] AVID
    hue: float = 0.2  # [C] AVID
    gray: float = 0.0  # [ours] off; share of clips that lose their colour (CrissCross 0.2)
    blur: float = 0.0  # [ours] off; share of clips blurred, sigma 0.1 to 2 pixels (CrissCross 0.5)
    cutout: int = 0  # [ours] off; largest side in pixels of a square that is dimmed (CrissCross 20)
    sound_gain: float = 0.1  # [C] AVID: loudness times 1 +- this
    time_mask: float = 0.0  # [ours] off; two bands of rows are blanked, each up to this share (CrissCross 0.1)
    freq_mask: float = 0.0  # [ours] off; two bands of bins, likewise (CrissCross 0.125)
    sound_crop: tuple[float, ...] = ()  # [ours] off; range of a random resized crop's sides (CrissCross 0.6,1.5)
    stored_spectrograms: bool = False  # [ours] read the store's rows instead of computing them from the sound
    statistics_clips: int = 512  # [ours] sound windows of the selection from which the bins' mean and deviation come
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # [ours] auto: bf16 where the hardware multiplies it
    channels_last: bool = True  # [ours]
    compile: Literal["off", "compile", "graphs"] = "off"  # [ours] torch.compile of the networks; graphs: in CUDA graphs
    device: str = "auto"  # [ours] auto: CUDA where there is a device, else the CPU
    threads: int = 0  # [ours] of torch on a CPU; 0: as torch chooses
    decode_threads: int = 0  # [ours] of the reader; 0: the loader's choice
    in_process: bool = False  # [ours] decode in threads of this process instead of a reader process
    jpeg: Literal["cpu", "device", "auto"] = "cpu"  # [ours] who decodes pictures; auto: the faster, measured at start
    deterministic: bool = False  # [ours] on CUDA: kernels that give the same bits each time, instead of the fastest
    log_every: int = 10  # [ours] steps between lines of metrics.jsonl
    checkpoint_every: int = 500  # [ours] steps between checkpoints; one more at the end, and when interrupted
    keep_last: int = 2  # [ours] newest checkpoints that stay
    keep_every: int = 0  # [ours] checkpoints at multiples of this many steps stay too; 0: none

    def __post_init__(self) -> None:
        wrong = []
        for name in (
            "batch",
            "draws",
            "epochs",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep_last",
            "statistics_clips",
        ):
            if getattr(self, name) < 1:
                wrong.append(f"{name} {getattr(self, name)} must be at least 1")
        for name in (
            "steps",
            "warmup_steps",
            "keep_every",
            "threads",
            "decode_threads",
            "weight_decay",
            "clip_gradient",
            "momentum",
            "larc",
            "final_rate",
        ):
            if getattr(self, name) < 0:
                wrong.append(f"{name} {getattr(self, name)} must not be negative")
        if not self.learning_rate > 0:
            wrong.append(f"learning_rate {self.learning_rate} must be above 0")
        wrong += [
            f"{name} {getattr(self, name)} must lie in 0 .. 1"
            for name in ("flip", "gray", "blur", "sound_gain", "time_mask", "freq_mask")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.cutout < 0:
            wrong.append(f"cutout {self.cutout} must not be negative")
        if self.larc and self.optimiser == "adamw":
            wrong.append("larc folds the weight decay into the gradient, which adamw keeps apart: take adam or sgd")
        if self.schedule == "cosine" and self.final_rate > self.learning_rate:
            wrong.append(f"final_rate {self.final_rate} is above learning_rate {self.learning_rate}")
        if self.sound_crop and not (len(self.sound_crop) == 2 and 0 < self.sound_crop[0] <= self.sound_crop[1]):
            wrong.append(f"sound_crop {self.sound_crop}: none, or a least and a largest share above 0, e.g. 0.6,1.5")
        if self.nesterov and not self.momentum:
            wrong.append("nesterov needs a momentum above 0")
        if self.batch % self.accumulate:
            wrong.append(f"batch {self.batch} does not divide into {self.accumulate} parts (accumulate)")
        for name in ("optimiser", "schedule", "crop", "precision", "compile", "jpeg"):
            options = typing.get_args(typing.get_type_hints(type(self))[name])
            if getattr(self, name) not in options:
                wrong.append(f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), options)}")
        if self.schedule == "multistep" and not self.milestones:
            wrong.append("schedule multistep needs milestones, e.g. --set milestones=8,12")
        if wrong:
            raise UsageError("these settings of a run do not hold", "; ".join(wrong), "correct them with --set")


# Keys that may differ when a run goes on: they change how it runs and what is kept, not what it computes (threads do,
# in the last bits: the checkpoint remembers them and a warning names the difference).
FREE = frozenset(
    {
        "device",
        "threads",
        "decode_threads",
        "in_process",
        "deterministic",
        "log_every",
        "checkpoint_every",
        "keep_last",
        "keep_every",
    }
)
# Keys that came later: at these values (off) they are no part of a digest, so that older runs keep theirs. A run that
# was made without them has these values, whatever the method's are today.
LATER: dict[str, Any] = {
    "nesterov": False, "gray": 0.0, "blur": 0.0, "cutout": 0, "time_mask": 0.0, "freq_mask": 0.0, "larc": 0.0,
    "final_rate": 0.0, "predictor_rate": 0.0, "sound_crop": (), "jpeg": "cpu",
    "crop": "resized",
}  # fmt: skip
LATER_OF: dict[str, dict[str, Any]] = {  # and of a method alone
    "l3": {"max_offset": 0.0}, "xdc": {"whiten": 0, "feature_momentum": 0.0}, "listen-to-look": {"teacher_rate": 0.0},
    "temporal": {"own_positives": True},
}  # fmt: skip
# Values that had another name: runs of before are read, and keep their digest.
FORMER: dict[str, dict[Any, Any]] = {"compile": {False: "off", True: "compile"}}
# Keys that belong to one stage of a method with stages; all others, where both stages have them, go to both.
OF_A_STAGE = frozenset(
    {
        "optimiser",
        "learning_rate",
        "momentum",
        "nesterov",
        "weight_decay",
        "larc",
        "schedule",
        "warmup_steps",
        "milestones",
        "decay",
        "final_rate",
        "clip_gradient",
        "epochs",
        "steps",
        "draws",
    }
)

# What a preset says to the loop, beside what the method's file says.
LOOP_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"checkpoint_every": 200},
    # few clips and a minute: mild crops and no colour jitter, which costs a tenth of the step here too
    "tiny": {
        "checkpoint_every": 100,
        "statistics_clips": 256,
        "crop_area": (0.6, 1.0),
        "brightness": 0.0,
        "contrast": 0.0,
        "saturation": 0.0,
        "hue": 0.0,
    },
}
# Preset small of a method whose file has none, and whose networks are AVID's by depth (`video_depth`): a CPU within the
# hour, or a GPU in minutes [ours]. Other networks and losses would want other values.
SMALL: dict[str, Any] = {
    "video_depth": 10,
    "width": 32,
    "small": True,
    "hidden": 256,
    "head_batch_norm": True,
    "size": 112,
    "front_end": "avid-linear129",
    "negatives": 256,
    "batch": 64,
    "learning_rate": 5e-4,
    "warmup_steps": 50,
    "schedule": "cosine",
    "draws": 4,
}


@dataclass(frozen=True)
class RunConfig:
    """A resolved configuration: the method's own and the loop's. `asked` are the keys that the user gave."""

    name: str
    method: Any
    loop: TrainConfig
    preset: str | None = None
    asked: frozenset[str] = frozenset()

    def values(self) -> dict[str, Any]:
        """Every key with its value, the method's own first."""
        own = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
        return own | {f.name: getattr(self.loop, f.name) for f in dataclasses.fields(self.loop) if f.name not in own}

    def replace(self, **values: Any) -> RunConfig:
        """The same with other values of some keys; both halves stay in agreement."""
        own = {f.name for f in dataclasses.fields(self.method)}
        loop = {f.name for f in dataclasses.fields(TrainConfig)}
        for key in values.keys() - own - loop:
            raise UsageError(f"{self.name} has no setting {key!r}", did_you_mean(key, own | loop))
        changed = dataclasses.replace(self.method, **{k: v for k, v in values.items() if k in own})
        both = {k: getattr(changed, k) for k in own & loop}
        looped = dataclasses.replace(self.loop, **({k: v for k, v in values.items() if k in loop} | both))
        return dataclasses.replace(self, method=changed, loop=looped)

    def settled(self) -> RunConfig:
        """The same with what the method's other settings decide (its configuration's `settled()`, key -> value, where
        it has one): so what is shown is what is done. UsageError for a key among them that the user gave another value.
        """
        if not callable(getattr(self.method, "settled", None)):
            return self
        fixed: dict[str, Any] = self.method.settled()
        for key in sorted(fixed.keys() & self.asked):
            if self.values()[key] != fixed[key]:
                raise UsageError(
                    f"{self.name}: {key}={self.values()[key]} would do nothing",
                    f"with these settings {key} is {fixed[key]}",
                    f"leave {key} away, or avstore train {self.name} --show-config",
                )
        return self.replace(**fixed)

    def to_json(self) -> dict[str, Any]:
        return {"method": self.name, "preset": self.preset, "asked": sorted(self.asked), "values": self.values()}

    @property
    def digest(self) -> str:
        """16 hex digits over the method and every key that changes a number."""
        later = LATER | LATER_OF.get(self.name, {})
        kept = {k: v for k, v in self.values().items() if k not in FREE and not (k in later and v == later[k])}
        for key, names in FORMER.items():
            before = {now: value for value, now in names.items()}
            if kept.get(key) in before:
                kept[key] = before[kept[key]]
        return hashlib.sha256(canonical_json({"method": self.name, "values": kept})).hexdigest()[:16]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_json`. UsageError where this version of avstore has other keys."""
        base = resolve(str(value["method"]), sets=())
        known = base.values()
        unknown = sorted(set(value["values"]) - set(known))
        if unknown:
            raise UsageError(
                f"the run was made with settings that this avstore does not know: {', '.join(unknown)}",
                "its config.json is of another version",
                "use the avstore that made it, or start a new run with --run",
            )
        hints = _hints(base)
        given = {k: v for k, v in (LATER | LATER_OF.get(base.name, {})).items() if k in known}
        named = {k: FORMER[k].get(v, v) if k in FORMER else v for k, v in value["values"].items()}
        given |= {k: typed(k, v, hints[k]) for k, v in named.items()}
        done = base.replace(**given).settled()  # runs of before that kept a value which did nothing keep their place
        return dataclasses.replace(done, preset=value.get("preset"), asked=frozenset(value.get("asked", ())))


def resolve(
    name: str, *, preset: str | None = None, toml_file: str | Path | None = None, sets: Sequence[str] = ()
) -> RunConfig:
    """The configuration of method `name`: its preset (default: the paper's values), then the TOML file, then `sets`.

    A TOML file holds `method`, `preset` and keys, and may hold a table for each stage (`[avid]`); `sets` are texts
    `key=value`, or `avid.key=value` for the stage alone. UsageError with the closest names for anything unknown, and
    for a value of the wrong type.
    """
    line = method(name)
    table = _read_toml(toml_file) if toml_file is not None else {}
    said = table.pop("method", name)
    if said != name:
        raise UsageError(f"{toml_file} is for method {said!r}", f"{name!r} was asked", f"avstore train {said}")
    inside = table.pop("preset", None)
    preset = preset if preset is not None else inside
    base = preset_of(name, preset)
    hints = _hints(base)
    given: dict[str, Any] = {}
    for key, value in [*_scoped(table, name, line.stage), *_parse_sets(sets, name, line.stage)]:
        if key not in hints:
            raise UsageError(
                f"{name} has no setting {key!r}", did_you_mean(key, hints), f"avstore train {name} --show-config"
            )
        given[key] = typed(key, value, hints[key])
    done = base.replace(**given)
    return dataclasses.replace(done, preset=preset, asked=frozenset(given)).settled()


def resolve_stage(
    name: str, *, preset: str | None = None, toml_file: str | Path | None = None, sets: Sequence[str] = ()
) -> RunConfig:
    """The configuration of the stage that `name` starts from, given what the user said to `name`.

    Same preset; a plain key goes to the stage too, unless it is one of OF_A_STAGE; `avid.key=value` and the table
    `[avid]` speak to the stage alone.
    """
    stage = method(name).stage
    if stage is None:
        raise UsageError(f"{name} has no stage before it", "it starts from random weights")
    table = _read_toml(toml_file) if toml_file is not None else {}
    preset = preset if preset is not None else table.get("preset")
    base = preset_of(stage, preset)
    hints = _hints(base)
    given: dict[str, Any] = {}
    flat = {k: v for k, v in table.items() if not isinstance(v, dict) and k not in ("method", "preset")}
    flat |= table.get(name, {})
    shared = [(k, v) for k, v in flat.items() if k in hints and k not in OF_A_STAGE]
    shared += [(k, v) for k, v in _parse_sets(sets, name, stage) if k in hints and k not in OF_A_STAGE]
    own = [*table.get(stage, {}).items(), *_parse_sets(sets, stage, None, only_scoped=True)]
    for key, value in [*shared, *own]:
        if key not in hints:
            raise UsageError(f"{stage} has no setting {key!r}", did_you_mean(key, hints))
        given[key] = typed(key, value, hints[key])
    done = base.replace(**given)
    return dataclasses.replace(done, preset=preset, asked=frozenset(given)).settled()


# ---- how it is done -----------------------------------------------------------------------------------------------


def preset_names(name: str) -> list[str]:
    """Presets that `name` can be trained with."""
    file = method(name).load()
    own = {f.name for f in dataclasses.fields(file.config)}
    return sorted({*file.presets, *({"small"} if own >= SMALL.keys() else ())})


def preset_of(name: str, preset: str | None) -> RunConfig:
    """A preset of a method as it is, without anything the user said; None: the paper's values."""
    file = method(name).load()
    chosen = "paper" if preset is None else preset
    if chosen not in preset_names(name):
        raise UsageError(f"{name} has no preset {chosen!r}", did_you_mean(chosen, preset_names(name)))
    own = file.presets.get(chosen, file.presets["paper"])
    base = RunConfig(name, own, TrainConfig()).replace()  # the method's values into the loop's keys
    extra = dict(LOOP_PRESETS.get(chosen, {}))
    if chosen not in file.presets:
        extra |= SMALL
    mine = {f.name for f in dataclasses.fields(own)}
    if chosen in file.presets:
        extra = {k: v for k, v in extra.items() if k not in mine}  # what the method's file says stands
    return base.replace(**extra)


def _hints(config: RunConfig) -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig) | typing.get_type_hints(type(config.method))


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise NotFoundError(f"configuration {path} cannot be read", e.strerror or str(e)) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not valid TOML", str(e)) from e


def _scoped(table: dict[str, Any], name: str, stage: str | None) -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if not isinstance(value, dict):
            yield key, value
        elif key == name:
            yield from value.items()
        elif key != stage:
            raise UsageError(
                f"a table [{key}] in the configuration of {name}", did_you_mean(key, [name, stage or name])
            )


def _parse_sets(sets: Sequence[str], name: str, stage: str | None, only_scoped: bool = False) -> list[tuple[str, Any]]:
    """(key, text) of what speaks to `name`; a prefix of `stage` is skipped, any other is an error."""
    out = []
    for text in sets:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {text!r} is not key=value", "", "e.g. --set epochs=10")
        scope, dot, rest = key.rpartition(".")
        if dot and scope == name:
            out.append((rest, value.strip()))
        elif dot and not only_scoped and scope != stage:
            raise UsageError(
                f"--set {text!r}: no stage is called {scope!r}", did_you_mean(scope, [name, stage or name])
            )
        elif not dot and not only_scoped:
            out.append((key, value.strip()))
    return out
