"""Does a store serve a method: exact, approximate (one line each) or not at all; and which of its videos are used.

config, notes = fit(config, store)
selection = select(store, config, where=["split=train"])
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import ConflictError
from avstore.frontends import named
from avstore.views import AvidView, RandomView, Views
from avstore.windows import Extents, clip_samples, frame_rows, picture_samples, to_samples
from trainers.config import RunConfig
from trainers.methods import method as find_method
from trainers.needs import Needs

if TYPE_CHECKING:
    from avstore.selection import Selection
    from avstore.store import Store


def needs_of(config: RunConfig) -> Needs:
    """What the method asks of a store, from its configuration; equal to the `needs` of its module.

    The configuration's own `needs()` where it has one, else its fields of the same names and its line of METHODS.
    """
    if callable(getattr(config.method, "needs", None)):
        found = config.method.needs()
        if not isinstance(found, Needs):
            raise TypeError(f"{type(config.method).__name__}.needs() gives {type(found).__name__}, not Needs")
        return found
    line, c = find_method(config.name), config.values()
    return Needs(
        frames=c.get("frames", 0),
        fps=c.get("fps", 16),
        size=c.get("size", 0),
        seconds=c.get("seconds", 0.0),
        front_end=c.get("front_end"),
        picture=line.picture is not False,  # None: of a configuration with `needs()`
        sound=line.sound is not False,
        labels=line.labels,
        max_offset=c.get("max_offset", 0.0),
        copies=c.get("copies", 1),
    )


def policy_of(config: RunConfig, sample_rate: int) -> Views:
    """How the method's clips are cut: its own policy, or AVID's single clip."""
    clips = find_method(config.name).load().clips
    if clips is not None:
        return clips(config.method, sample_rate)
    return AvidView(to_samples(needs_of(config).max_offset, sample_rate))


def views_of(config: RunConfig) -> int:
    """V: windows of a clip times its copies."""
    return policy_of(config, 24000).views * needs_of(config).copies


def largest_size(height: int) -> int:
    """The crop that frames of this height are for: 7/8 of it (112 of 128, 224 of 256), a multiple of 16."""
    return max(16, height * 7 // 8 // 16 * 16)


def fit(config: RunConfig, store: Store, train: bool = True) -> tuple[RunConfig, list[str]]:
    """The configuration as this store can serve it, and what that makes approximate, one line each. `train` False: for
    embedding, which takes one clip a second and no labels.

    The frame size and rate follow the store, unless the preset is `paper` or the user named the key: then what the
    store lacks is a ConflictError that names the ingest option.
    """
    needs, spec, notes = needs_of(config), store.spec, []
    frame = f"{spec.height}x{spec.width}"
    insists = {k for k in ("size", "fps") if config.preset == "paper" or k in config.asked}
    if needs.picture and not spec.picture:
        raise ConflictError(
            f"{config.name} needs pictures, {store.path} is a store of sound",
            "it was ingested from sound alone",
            "ingest videos into another store",
        )
    changes: dict[str, Any] = {}
    if needs.picture:
        best = largest_size(spec.height)
        if needs.size > spec.height or (needs.size > best and "size" not in insists):
            if "size" in insists:
                raise ConflictError(
                    f"{config.name} is asked for pictures of {needs.size} pixels, {store.path} has {frame}",
                    f"frames of {spec.height} lines serve crops of {best}",
                    _ingest_size(needs.size),
                )
            changes["size"] = best
            notes.append(
                f"approximate: pictures of {best} pixels instead of {needs.size}, for the store has "
                f"{spec.height}x{spec.width} ({_ingest_size(needs.size)} for more)"
            )
        elif needs.size > best:
            notes.append(f"approximate: centre crops of 7/8 of {spec.height} lines are enlarged to {needs.size} pixels")
        if needs.fps != "native" and needs.fps > spec.fps:
            if "fps" in insists:
                raise ConflictError(
                    f"{config.name} is asked for {needs.fps} frames a second, {store.path} has {spec.fps}",
                    "frames that were not kept cannot be read",
                    f"ingest into another store with --fps {needs.fps}",
                )
            changes["fps"] = spec.fps
            notes.append(
                f"approximate: {spec.fps} frames a second instead of {needs.fps} (ingest --fps {needs.fps} for more)"
            )
        if needs.fps == "native":
            rates = [Fraction(r) for r in store.facts["source_fps"] if r]
            faster = sum(r > spec.fps * Fraction(101, 100) for r in rates)
            if faster:
                notes.append(
                    f"approximate: {faster} of {len(rates)} videos have more frames a second than the tape's {spec.fps}"
                )
    if needs.sound and needs.front_end is not None:
        recipe = named(needs.front_end)
        if recipe.sample_rate > spec.sample_rate:
            raise ConflictError(
                f"front-end {recipe.name} needs sound of {recipe.sample_rate} Hz, {store.path} has {spec.sample_rate}",
                f"the bands above {spec.sample_rate // 2} Hz were not kept",
                f"ingest into another store with --sample-rate {recipe.sample_rate}",
            )
    if train and needs.labels and "label" not in store.columns:
        raise ConflictError(
            f"{config.name} needs labels, {store.path} has no column label",
            "its videos lay in no folders named so",
            "ingest a folder with one subfolder per class",
        )
    if train and needs.labels:
        notes += _labels(config, store)
    if changes:
        config = config.replace(**changes)
    if train:
        notes += _cuts(config, store)
    if needs.picture and config.loop.crop_area[1] > 0.9:
        wide = _wider(store)
        if wide:
            notes.append(
                f"approximate: random crops lie inside the stored {frame} picture; {wide} videos are wider than it "
                f"(ingest --size {spec.height}x{-(-spec.height // 9) * 16} keeps all of a 16:9 picture)"
            )
    return config, notes


def _labels(config: RunConfig, store: Store) -> list[str]:
    """Videos without a label; ConflictError where there are not two classes to tell apart."""
    found = store.column("label", store.numbers)
    classes = {str(x) for x in found if x is not None}
    if len(classes) < 2:
        raise ConflictError(
            f"{config.name} needs labels, {store.path} has {len(classes)} class{'' if len(classes) == 1 else 'es'}",
            "there is nothing to tell apart",
            "ingest a folder with one subfolder per class, or a list with a column label",
        )
    missing = sum(x is None for x in found)
    return [f"approximate: {missing} of {len(found)} videos have no label and teach nothing"] if missing else []


def _cuts(config: RunConfig, store: Store) -> list[str]:
    """Videos too short for the clips asked of them, or whose whole sound is longer than what is heard of it."""
    needs, rate, numbers = needs_of(config), store.spec.sample_rate, store.numbers
    policy = policy_of(config, rate)
    sound = max(to_samples(needs.seconds, rate), 1) if needs.sound else 1
    fps = store.spec.fps if needs.fps == "native" else needs.fps
    picture = max(clip_samples(needs.frames, fps, rate), 1) if needs.picture else 1
    if not len(numbers):
        return []
    frames, sounds = store.frames[numbers], store.sound[numbers]
    extents = Extents(picture_samples(frames, store.spec.fps, rate), sounds[:, 0], sounds[:, 1])
    half = np.full((len(numbers), max(policy.numbers, 1)), 0.5)
    cut = policy.starts(extents, half, np.zeros(len(numbers), np.int64), picture, sound)
    pictures, starts = (np.asarray(x, np.int64).reshape(len(numbers), -1) for x in (cut.picture, cut.sound))
    said, parts = [], []
    whole = isinstance(policy, RandomView) and policy.whole_sound
    if needs.picture:  # a native rate below the tape's needs longer still: the metric `looped` counts what comes
        last = frame_rows(pictures, max(needs.frames, 1), fps, store.spec.fps, rate)[..., -1]
        looped = int(((last >= frames[:, None]).any(1) & (frames > 0)).sum())
        if looped:
            parts.append(f"the pictures of {looped} are shorter than {needs.frames} frames and loop")
    if needs.sound and not whole:
        heard = sounds[:, 1] > sounds[:, 0]
        padded = int(((starts + sound > sounds[:, 1, None]).any(1) & heard).sum())
        if padded:
            parts.append(f"the sound of {padded} is shorter than {needs.seconds:g} s and ends in zeros")
    if parts:
        said.append(f"approximate: of {len(numbers)} videos {', '.join(parts)}")
    if whole:
        longer = int((sounds[:, 1] > sound).sum())
        if longer:
            what = f"approximate: the sound of {longer} of {len(numbers)} videos is longer"
            said.append(f"{what} than {needs.seconds:g} s and cut")
    closer = int(np.asarray(cut.shrunk).sum())
    if closer:
        said.append(
            f"approximate: {closer} of {len(numbers)} videos are too short for the {policy.views} windows asked: "
            "they move closer together"
        )
    return said


def _ingest_size(size: int) -> str:
    profiles = {112: "ingest with --profile 112", 224: "ingest with --profile 224"}
    height = -(-size * 8 // 7 // 16) * 16
    return profiles.get(size, f"ingest with --size {height}x{height * 11 // 8 // 16 * 16}")


def _wider(store: Store) -> int:
    """Ok videos whose picture is wider than the stored frame."""
    limit = Fraction(store.spec.width, store.spec.height)
    shown = (store.facts["display"][int(n)] for n in store.numbers)
    return sum(1 for d in shown if d and Fraction(int(d[0]), int(d[1])) > limit) if store.spec.fit == "short" else 0


def select(
    store: Store,
    config: RunConfig,
    *,
    where: Sequence[str] = (),
    list: str | Path | Sequence[str] | None = None,
    subset: int | None = None,
    subset_seed: int = 0,
) -> Selection:
    """The videos that a method trains on: held-out splits (test, val, ...) only where `where` names the split, and
    only videos with the picture and sound that the method needs (dropped ones are counted in the description)."""
    needs = needs_of(config)
    named_split = any(text.replace("!=", "=").split("=")[0].strip() == "split" for text in where)
    return store.select(
        where=where,
        list=list,
        subset=subset,
        seed=subset_seed,
        held_out=named_split,
        need_sound=needs.sound,
        need_picture=needs.picture,
    )
