"""Published checkpoints: read without executing anything, their names mapped to ours, written as a weights file.

    AVID, AVID-CMA (facebookresearch/AVID-CMA)   {'model', 'optimizer', 'train_criterion', 'epoch'}, names `module.*`
    CrissCross (pritamqu/CrissCross)             one backbone per file, or a whole training checkpoint
    torchvision, VCOP family                     video networks whose names are ours already

    found = read_published(["AVID-CMA_Audioset.pth.tar"])     # maps, checks every name and shape, reports
    write_weights(found, "avid-cma.safetensors")
    found.module()                                            # the networks, in eval mode

Files are opened by `foreign.py`, names are in `families.py`, `converted_run.py` makes a run of it. What is done to the
numbers: CrissCross' sound network sees (bins, frames), ours (frames, bins): its kernels are transposed, which is the
same function. Biases in front of a batch normalisation are taken off its running mean, the same function again. Nothing
else. The weights stay their authors' (AVID and CrissCross: CC BY-NC 4.0); none are shipped.

`torch.load(weights_only=True)` only: a file that asks for more is refused, with what it asks for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avstore.durable import canonical_json, write_atomic
from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError
from trainers.families import as_ours, family_of, sort_names
from trainers.foreign import digest_of, load_tensors_only, partition_in, state_dict_in
from trainers.published import Config, Published

FORMAT = 1


@dataclass(frozen=True)
class Found:
    """A checkpoint in our names.

    config: what networks these are. state: of `Published(config)`, float32. mapped: (their name, ours). left: (their
    name, why it was not taken). partition: AVID's Z, where the file has it. families: names of what was recognised.
    """

    config: Config
    state: dict[str, Tensor]
    mapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    partition: float | None = None
    families: tuple[str, ...] = ()

    def module(self) -> Published:
        """The networks with these weights, in eval mode on the CPU."""
        module = Published(self.config)
        module.load_state_dict(self.state)
        return module.eval()

    @property
    def is_avid(self) -> bool:
        """Whether a run of method `avid` can hold them: both of AVID's networks, of one width, with its heads."""
        c = self.config
        return (
            set(self.families) == {"avid-video", "avid-audio"}
            and c.video_width == c.audio_width
            and c.video_head == c.audio_head
            and len(c.video_head) == 3
            and c.video_head[0] == c.video_head[1]
        )


# ---- reading ------------------------------------------------------------------------------------------------------


def read_published(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """The networks of one published file, or of two that hold one modality each.

    Raises NotFoundError without a file, CorruptError where it cannot be read, ConflictError where it asks to execute
    code, where its tensors are of no network known here, or where two files hold the same one.
    """
    if not paths:
        raise UsageError("nothing to convert", "no file was named", "avstore convert FILE -o weights.safetensors")
    parts = [_read_one(Path(path)) for path in paths]
    found = parts[0]
    for more in parts[1:]:
        found = _join(found, more)
    return found


def _read_one(path: Path) -> Found:
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", "a checkpoint is a file that you have downloaded")
    if path.suffix == ".safetensors":
        ours, tensors = _read_safetensors(path)
        if ours is not None:
            return ours
        whole: Any = tensors
    else:
        whole = load_tensors_only(path)
    tensors, left = state_dict_in(whole, path)
    source = f"{path.name} sha256 {digest_of(path)[:16]}"
    sorted_names = sort_names(tensors)
    slots = sorted_names.slots
    left += sorted_names.left
    values: dict[str, Any] = {"video_net": None, "audio_net": None, "source": source}
    state: dict[str, Tensor] = {}
    mapped: list[tuple[str, str]] = []
    families: list[str] = []
    for kind in ("video", "audio"):
        theirs = slots.pop(kind, {})
        if not theirs:
            continue
        family = family_of(kind, {k: tensors[name] for k, name in theirs.items()}, sorted_names.avid)
        if family is None:
            some = ", ".join(sorted(theirs)[:3])
            raise ConflictError(
                f"{path} holds a {kind} network that is not known here",
                f"its tensors are called {some}, ...",
                "known are those of AVID, AVID-CMA, CrissCross, torchvision's video ResNets and the VCOP family",
            )
        families.append(family.name)
        values |= family.values
        for inside, name in theirs.items():
            mine = family.rename(inside)
            if mine is None:
                left.append((name, "a classifier: trunks only are taken"))
                continue
            state[f"{kind}.{mine}"] = family.transform(tensors[name])
            mapped.append((name, f"{kind}.{mine}"))
    for slot in ("video_head", "audio_head"):
        if slot in slots:
            sizes, norm = _head(slot, slots.pop(slot), tensors, state, mapped, left)
            values |= {slot: sizes, "head_norm": norm}
    if not families:
        raise ConflictError(
            f"{path} holds no network known here",
            f"{len(tensors)} tensors, the first is {next(iter(tensors), 'none')}",
            "known are those of AVID, AVID-CMA, CrissCross, torchvision's video ResNets and the VCOP family",
        )
    found = Found(Config(**values), state, mapped, left, partition_in(whole), tuple(families))
    _require_whole(found, path)
    return found


def _head(
    slot: str,
    theirs: dict[str, str],
    whole: Mapping[str, Tensor],
    state: dict[str, Tensor],
    mapped: list[tuple[str, str]],
    left: list[tuple[str, str]],
) -> tuple[tuple[int, ...], str]:
    """AVID's `0, 2, 4` of linear layers, CrissCross' `layer1 ... layer3` of linear and batch normalisation."""
    tensors = {k: whole[name] for k, name in theirs.items()}
    if any(k.startswith("layer") for k in tensors):
        layers = sorted({k.split(".")[0] for k in tensors})
        for n, layer in enumerate(layers):
            bias = tensors[f"{layer}.0.bias"].float()
            for k in [k for k in tensors if k.startswith(f"{layer}.")]:
                part, _, what = k.removeprefix(f"{layer}.").partition(".")
                mine = f"{slot}.{3 * n + int(part)}.{what}"
                if (part, what) == ("0", "bias"):
                    left.append((theirs[k], "taken off the running mean of its batch normalisation"))
                    continue
                x = tensors[k]
                state[mine] = x.float() - bias if what == "running_mean" else as_ours(x)
                mapped.append((theirs[k], mine))
        return tuple(int(tensors[f"{layer}.0.weight"].shape[0]) for layer in layers), "all"
    places = sorted({int(k.split(".")[0]) for k in tensors})
    for k, name in theirs.items():
        state[f"{slot}.{k}"] = as_ours(tensors[k])
        mapped.append((name, f"{slot}.{k}"))
    return tuple(int(tensors[f"{p}.weight"].shape[0]) for p in places), "none"


def _require_whole(found: Found, path: Path) -> None:
    """ConflictError unless every tensor of our networks is there, in its shape, and none too many."""
    mine = Published(found.config).state_dict()
    counters = {k for k in mine if k.endswith("num_batches_tracked") and k not in found.state}
    found.state.update({k: mine[k] for k in counters})  # files of torch before 0.4.1 have none; nothing reads them
    wrong = [
        k
        for k in sorted({*mine, *found.state})
        if k not in mine or k not in found.state or mine[k].shape != found.state[k].shape
    ]
    if wrong:
        k = wrong[0]
        shapes = [tuple(s[k].shape) if k in s else "nothing" for s in (found.state, mine)]
        raise ConflictError(
            f"{path} does not fit {' and '.join(found.families)}",
            f"{len(wrong)} tensors differ, first {k}: {shapes[0]} there, {shapes[1]} here",
            "the file is damaged, or of a network that is not known here",
        )
    bad = [k for k, x in found.state.items() if x.is_floating_point() and not bool(torch.isfinite(x).all())]
    if bad:
        raise ConflictError(f"{path} holds numbers that are not finite", f"first in {bad[0]}", "download it again")


def _join(one: Found, other: Found) -> Found:
    """Two files of one modality each."""
    kinds = [{k.split(".")[0].split("_")[0] for k in f.state} for f in (one, other)]
    if kinds[0] & kinds[1]:
        raise ConflictError(
            f"two files with a {sorted(kinds[0] & kinds[1])[0]} network",
            f"{one.config.source}; {other.config.source}",
            "name one file for each modality",
        )
    has = other.config
    kind = "video" if "video" in kinds[1] else "audio"
    names = [f"{kind}_net", f"{kind}_width", f"{kind}_pool", f"{kind}_head"]
    names += ["frames", "fps", "size"] if kind == "video" else ["seconds", "front_end"]
    values: dict[str, Any] = {n: getattr(has, n) for n in names}
    if has.video_head or has.audio_head:
        values["head_norm"] = has.head_norm
    config = dataclasses.replace(one.config, **values, source=f"{one.config.source}; {has.source}")
    return Found(
        config,
        one.state | other.state,
        one.mapped + other.mapped,
        one.left + other.left,
        one.partition if one.partition is not None else other.partition,
        one.families + other.families,
    )


# ---- our own file -------------------------------------------------------------------------------------------------


def write_weights(found: Found, path: str | os.PathLike[str]) -> Path:
    """A safetensors file that says itself what it is: `read_published` takes it back, bit for bit. Whole or not."""
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is no name of a weights file", "they end in .safetensors", f"-o {path}.safetensors")
    about = {
        "format": FORMAT,
        "config": dataclasses.asdict(found.config),
        "partition": found.partition,
        "families": list(found.families),
    }
    data = save({k: x.contiguous() for k, x in found.state.items()}, {"avstore": canonical_json(about).decode()})
    write_atomic(path, data)
    return path


def _read_safetensors(path: Path) -> tuple[Found | None, dict[str, Tensor]]:
    """(ours, its tensors), or (None, tensors) of somebody else's file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            about = (f.metadata() or {}).get("avstore")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise CorruptError(f"{path} cannot be read", str(e), "convert it again") from e
    if about is None:
        return None, tensors
    value = json.loads(about)
    if value.get("format") != FORMAT:
        raise ConflictError(f"{path} is of another format", f"this avstore reads format {FORMAT}", "convert it again")
    known = {f.name for f in dataclasses.fields(Config)}
    if set(value["config"]) != known:
        raise ConflictError(f"{path} was written by another avstore", "its settings differ", "convert it again")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["config"].items()}
    config = Config(**values)
    found = Found(config, tensors, [(k, k) for k in tensors], [], value["partition"], tuple(value["families"]))
    _require_whole(found, path)
    return found, tensors
