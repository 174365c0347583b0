"""What a run is told: the table of methods, presets, TOML files and `key=value`, resolved into one frozen value.

A run has one flat namespace of keys. A method's own `Config` (its file: the paper's values) comes first; `TrainConfig`
below holds what the loop does for every method. Where a method declares a key of `TrainConfig` too (learning_rate,
batch, ...), its value is the one that counts, and the loop reads it from there: `RunConfig.loop` is always the truth.

    resolve("avid-cma", preset="tiny", sets=["positives=8", "avid.epochs=4"])

Not here: what a store makes of these values (`data.fit`), and where they are kept (`run.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import tokenize
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from avstore.durable import canonical_json
from avstore.errors import NotFoundError, UsageError, did_you_mean


@dataclass(frozen=True)
class TrainConfig:
    """What the loop does with any method. Keys that change no number of a run are in `FREE`."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"  # [ours] AVID's; methods that say otherwise declare it
    learning_rate: float = 1e-3  # [ours] of a method that declares none
    momentum: float = 0.9  # [ours] of sgd
    weight_decay: float = 0.0  # [ours] L2 in adam and sgd (as torch does), decoupled in adamw
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # [ours] after the warm-up
    warmup_steps: int = 0  # [ours] linear from learning_rate / (warmup_steps + 1)
    milestones: tuple[int, ...] = ()  # [ours] epochs after which multistep multiplies by `decay`
    decay: float = 0.1  # [ours]
    clip_gradient: float = 0.0  # [ours] largest norm of the gradient; 0: as it is
    epochs: int = 1  # [ours] times `draws` passes over the videos
    steps: int = 0  # [ours] optimiser steps in all; 0: as `epochs` says
    draws: int = 1  # [ours] clips of each video in an epoch
    batch: int = 64  # [ours] clips of an optimiser step, over all processes
    accumulate: int = 1  # [ours] parts in which a batch goes through the nets (batch statistics are of a part)
    distinct: bool = False  # [ours] no two clips of one video in a batch
    drop_last: bool = False  # [ours] leave out an epoch's last, short batch
    seed: int = 0
    crop_area: tuple[float, float] = (0.08, 1.0)  # [C] AVID: random resized crop, share of the picture
    flip: float = 0.5  # [C] AVID
    brightness: float = 0.4  # [C] AVID: colour jitter
    contrast: float = 0.4  # [C]
    saturation: float = 0.4  # [C]
    hue: float = 0.2  # [C]
    sound_gain: float = 0.1  # [C] AVID: loudness times 1 +- this
    stored_spectrograms: bool = False  # [ours] read the store's rows instead of computing them from the sound
    statistics_clips: int = 512  # [ours] sound windows of the selection from which the bins' mean and deviation come
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # [ours] auto: bf16 where the hardware multiplies it
    channels_last: bool = True  # [ours]
    compile: bool = False  # [ours] torch.compile
    device: str = "auto"  # [ours] auto: CUDA where there is a device, else the CPU
    threads: int = 0  # [ours] of torch on a CPU; 0: as torch chooses
    decode_threads: int = 0  # [ours] of the reader; 0: the loader's choice
    in_process: bool = False  # [ours] decode in threads of this process instead of a reader process
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
        ):
            if getattr(self, name) < 0:
                wrong.append(f"{name} {getattr(self, name)} must not be negative")
        if not self.learning_rate > 0:
            wrong.append(f"learning_rate {self.learning_rate} must be above 0")
        if self.batch % self.accumulate:
            wrong.append(f"batch {self.batch} does not divide into {self.accumulate} parts (accumulate)")
        for name in ("optimiser", "schedule", "precision"):
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
        "log_every",
        "checkpoint_every",
        "keep_last",
        "keep_every",
    }
)
# Keys that belong to one stage of a method with stages; all others, where both stages have them, go to both.
OF_A_STAGE = frozenset(
    {
        "optimiser",
        "learning_rate",
        "momentum",
        "weight_decay",
        "schedule",
        "warmup_steps",
        "milestones",
        "decay",
        "clip_gradient",
        "epochs",
        "steps",
        "draws",
    }
)
REQUIRED = ("paper",)  # presets that every method has


@dataclass(frozen=True)
class MethodFile:
    """What a method's file offers."""

    config: type[Any]
    presets: Mapping[str, Any]
    make: Callable[[Any, int], Any]  # (config, rows of the selection) -> the module
    load_stage: str | None = None  # its method that takes the weights and state of the stage before


@dataclass(frozen=True)
class Method:
    """A line of METHODS. `load` imports the file; `stage` names the method whose run this one starts from."""

    load: Callable[[], MethodFile]
    paper: str
    summary: str
    picture: bool = True
    sound: bool = True
    labels: bool = False
    views: int = 1
    stage: str | None = None


def _avid() -> MethodFile:
    from trainers import avid

    return MethodFile(avid.Config, avid.PRESETS, avid.Avid)


def _avid_cma() -> MethodFile:
    from trainers import avid_cma

    return MethodFile(avid_cma.Config, avid_cma.PRESETS, avid_cma.AvidCma, load_stage="load_avid")


METHODS: dict[str, Method] = {
    "avid": Method(_avid, "Morgado et al. 2021", "instance discrimination across sight and sound"),
    "avid-cma": Method(_avid_cma, "Morgado et al. 2021", "AVID, then positives that agree in both", stage="avid"),
}

# What a preset says to the loop and, where a method's file has no preset of that name, to its keys.
LOOP_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"checkpoint_every": 200},
    # few clips and a minute: mild crops and no colour jitter, which costs a tenth of the step here too
    "tiny": {
        "checkpoint_every": 100, "statistics_clips": 256, "crop_area": (0.6, 1.0), "brightness": 0.0, "contrast": 0.0,
        "saturation": 0.0, "hue": 0.0,
    },
}
SMALL: dict[str, Any] = {  # a CPU within the hour, or a GPU in minutes [ours]
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


def method(name: str) -> Method:
    """The line of METHODS. UsageError with the closest names for an unknown one."""
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", did_you_mean(name, METHODS), "avstore train --list")
    return METHODS[name]


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

    def to_json(self) -> dict[str, Any]:
        return {"method": self.name, "preset": self.preset, "asked": sorted(self.asked), "values": self.values()}

    @property
    def digest(self) -> str:
        """16 hex digits over the method and every key that changes a number."""
        kept = {k: v for k, v in self.values().items() if k not in FREE}
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
        given = {k: _typed(k, v, hints[k]) for k, v in value["values"].items()}
        done = base.replace(**given)
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
    base = _preset(name, preset)
    hints = _hints(base)
    given: dict[str, Any] = {}
    for key, value in [*_scoped(table, name, line.stage), *_parse_sets(sets, name, line.stage)]:
        if key not in hints:
            raise UsageError(
                f"{name} has no setting {key!r}", did_you_mean(key, hints), f"avstore train {name} --show-config"
            )
        given[key] = _typed(key, value, hints[key])
    done = base.replace(**given)
    return dataclasses.replace(done, preset=preset, asked=frozenset(given))


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
    base = _preset(stage, preset)
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
        given[key] = _typed(key, value, hints[key])
    done = base.replace(**given)
    return dataclasses.replace(done, preset=preset, asked=frozenset(given))


@dataclass(frozen=True)
class Row:
    """A line of `--show-config`."""

    key: str
    value: Any
    paper: Any  # the paper's value; None for keys of the loop
    source: str  # where it comes from: the comment behind the field


def show_config(config: RunConfig) -> list[Row]:
    """Every key of a run with its value, the paper's value, and where that comes from."""
    paper = _preset(config.name, "paper").method
    own, loop = comments(type(config.method)), comments(TrainConfig)
    rows = []
    for key, value in config.values().items():
        of_method = key in own
        rows.append(Row(key, value, getattr(paper, key) if of_method else None, own[key] if of_method else loop[key]))
    return rows


def comments(of: type[Any]) -> dict[str, str]:
    """Field name -> the comment behind it in the source of a dataclass ('' where there is none)."""
    source = inspect.getsource(of)
    out: dict[str, str] = {f.name: "" for f in dataclasses.fields(of)}
    word, depth = None, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token.string, 0)
        if (
            token.type == tokenize.NAME
            and token.string in out
            and depth == 0
            and not token.line[: token.start[1]].strip()
        ):
            word = token.string
        elif token.type == tokenize.COMMENT and word and not out[word]:
            out[word] = token.string.lstrip("# ").strip()
        elif token.type == tokenize.NEWLINE and depth == 0:
            word = None
    return out


# ---- how it is done -----------------------------------------------------------------------------------------------


def preset_names(name: str) -> list[str]:
    """Presets that `name` can be trained with."""
    return sorted({*method(name).load().presets, *LOOP_PRESETS})


def _preset(name: str, preset: str | None) -> RunConfig:
    file = method(name).load()
    chosen = "paper" if preset is None else preset
    if chosen not in file.presets and chosen not in LOOP_PRESETS:
        raise UsageError(f"{name} has no preset {chosen!r}", did_you_mean(chosen, preset_names(name)))
    own = file.presets.get(chosen, file.presets["paper"])
    base = RunConfig(name, own, TrainConfig()).replace()  # the method's values into the loop's keys
    extra = dict(LOOP_PRESETS.get(chosen, {}))
    if chosen not in file.presets:
        if chosen != "small":
            raise UsageError(f"{name} has no preset {chosen!r}", did_you_mean(chosen, file.presets))
        extra |= {k: v for k, v in SMALL.items() if k in base.values()}
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


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` (from TOML, JSON or text) as the type of the field. UsageError naming key, value and type."""
    try:
        return _convert(value, hint)
    except (TypeError, ValueError) as e:
        raise UsageError(f"{key} = {value!r}", f"expected {_words(hint)}", f"e.g. --set {key}=...") from e


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for option in arguments:
            if value == option or (isinstance(value, str) and value == str(option)):
                return option
        raise ValueError(value)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in arguments:
                return None
            raise ValueError(value)
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(value, option)
                except (TypeError, ValueError):
                    continue
        raise ValueError(value)
    if origin is tuple:
        parts = [p for p in value.strip("()[] ").split(",") if p.strip()] if isinstance(value, str) else list(value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(p, arguments[0]) for p in parts)
        if len(parts) != len(arguments):
            raise ValueError(value)
        return tuple(_convert(p, a) for p, a in zip(parts, arguments, strict=True))
    if hint is bool:
        if isinstance(value, bool):
            return value
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError(value)
    if hint is int:
        if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
            raise ValueError(value)
        return int(value)
    if hint is float:
        if isinstance(value, bool):
            raise ValueError(value)
        number = float(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(value)
        return number
    if hint is str:
        if not isinstance(value, str):
            raise ValueError(value)
        return value
    raise TypeError(f"fields of type {hint} cannot be set")


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in arguments)
    if origin is tuple:
        each = "values" if not arguments else _words(arguments[0])
        return f"{each} separated by commas" + ("" if Ellipsis in arguments else f" ({len(arguments)} of them)")
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}.get(
        hint, str(hint)
    )


def as_text(value: Any) -> str:
    """A value as `--set` takes it."""
    return (
        ",".join(as_text(v) for v in value)
        if isinstance(value, tuple | list)
        else (json.dumps(value) if isinstance(value, bool) or value is None else str(value))
    )
