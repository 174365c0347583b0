"""What every method of METHODS keeps: its word to the store, its settings, masks, state and embeddings.

Parametrised over the table, so that a new line is held to it without another test.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shlex
import sys
from typing import Any

import pytest
import torch
import typer
from torch import Tensor

from avstore.durable import canonical_json
from avstore.errors import UsageError
from avstore.frontends import named, spectrogram
from avstore.views import AvidView, RandomView
from cli.main import app
from trainers import fit
from trainers.batch import Batch
from trainers.config import RunConfig, preset_names, resolve, resolve_stage
from trainers.methods import METHODS, REQUIRED
from trainers.settings import show_config
from trainers.teacher import Teacher

CLASSES = ("axe", "bee", "cat")
ROWS = 24
# Smaller than any preset, where a method has the key and takes the value: tests are of the contract, not of learning.
SMALLER: dict[str, Any] = {
    "width": 4, "hidden": 16, "dim": 16, "size": 32, "frames": 4, "seconds": 0.6, "negatives": 8, "positives": 3,
    "teacher_epochs": 1, "within_negatives": 4, "hard_pool": 6, "queue": 8, "clusters": 4, "epochs": 2,
    "refresh_epochs": 1,
}  # fmt: skip
NETWORK = ("width", "hidden", "dim")
PAIRS = [(name, preset) for name in METHODS for preset in preset_names(name)]


def smaller(config: RunConfig, keys: Any = tuple(SMALLER)) -> RunConfig:
    for key in keys:
        now = config.values().get(key)
        if isinstance(now, int | float) and not isinstance(now, bool) and now > SMALLER[key]:
            try:
                config = config.replace(**{key: SMALLER[key]})
            except UsageError:
                continue  # the method does not take it: it stays as it was
    return config


def build(config: RunConfig, rows: int = ROWS) -> Any:
    """The method as a run begins with it: after its stage, where it has one, and with teachers that answer."""
    method = bare(config, rows)
    file, stage = METHODS[config.name].load(), METHODS[config.name].stage
    if stage is not None and file.load_stage is not None:
        before = before_it(config.name, stage, config.preset or "paper")
        getattr(method, file.load_stage)(
            {k[4:]: x for k, x in before.items() if k.startswith("net/")},
            {k[4:]: x for k, x in before.items() if k.startswith("own/")},
        )
    return method


@functools.cache
def before_it(name: str, stage: str, preset: str) -> dict[str, Tensor]:
    """What the stage of a method ends with after it saw every row once."""
    config = smaller(resolve_stage(name, preset=preset))
    method = build(config).train()
    method.start_epoch(0)
    for first in range(0, ROWS, 12):
        with torch.no_grad():
            method(batch(config, list(range(first, first + 12))))
        method.after_step()
    return state(method)


def bare(config: RunConfig, rows: int = ROWS) -> Any:
    line = METHODS[config.name]
    more = (CLASSES,) if line.labels else ()
    method = line.load().make(config.method, rows, *more)
    for module in method.modules():
        if isinstance(module, Teacher):
            table = torch.randn(rows, module.dim, generator=torch.Generator().manual_seed(8))
            module.give(lambda b, table=table: table[b.row])
    return method


@functools.cache
def tiny(name: str) -> RunConfig:
    return smaller(resolve(name, preset="tiny"))


@functools.cache
def audio_shape(front_end: str, seconds: float) -> tuple[int, int]:
    rate = max(24000, named(front_end).sample_rate)
    return tuple(spectrogram(torch.zeros(1, round(seconds * rate)), front_end, rate).shape[1:])  # type: ignore[return-value]


def batch(config: RunConfig, rows: list[int], *, seed: int = 0, epoch: int = 0, blank: tuple[int, ...] = ()) -> Batch:
    """Clips whose content is a fixed function of row and seed; those at places `blank` show and sound nothing."""
    needs, views, n = fit.needs_of(config), fit.views_of(config), len(rows)
    here = torch.tensor([i not in blank for i in range(n)])
    shape = (n,) if views == 1 else (n, views)

    def content(*size: int) -> Tensor:
        """Row's own pattern, and noise, drawn clip by clip: so clips do not depend on what is beside them."""
        out = torch.empty(*shape, *size)
        for i, row in enumerate(rows):
            g, noise = torch.Generator().manual_seed(100 + row), torch.Generator().manual_seed(1000 * seed + row)
            pattern = torch.randn(*size, generator=g)
            out[i] = pattern + 0.5 * torch.randn(*shape[1:], *size, generator=noise)
            if i in blank:
                out[i] = 0
        return out

    video = content(3, needs.frames, needs.size, needs.size) if needs.picture else None
    audio = None
    if needs.sound and needs.front_end is not None:
        audio = content(1, *audio_shape(needs.front_end, needs.seconds))
    labels = torch.tensor([-1 if i in blank else row % len(CLASSES) for i, row in enumerate(rows)])
    return Batch(
        row=torch.tensor(rows), position=torch.arange(n), draw=torch.zeros(n, dtype=torch.long), has_picture=here,
        has_sound=here.clone(), epoch=epoch, seed=3, video=video, audio=audio, views=views,
        labels=labels if needs.labels else None,
        sound_share=here.float() if views == 1 else here[:, None].expand(n, views).float(),
    )  # fmt: skip


def step(method: Any, optimiser: Any, b: Batch) -> tuple[float, dict[str, Any]]:
    optimiser.zero_grad()
    loss, metrics = method(b)
    loss.backward()
    optimiser.step()
    method.after_step()
    return float(loss.detach()), metrics


def state(method: Any) -> dict[str, Tensor]:
    """Everything a checkpoint would hold, copied."""
    both = {f"net/{k}": x for k, x in method.state_dict().items()}
    both |= {f"own/{k}": x for k, x in method.method_state().items()}
    return {k: x.detach().clone() for k, x in both.items()}


# ---- words: settings and what they ask of a store ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), PAIRS)
def test_the_module_asks_what_its_configuration_says(name: str, preset: str) -> None:
    """`fit` compares the configuration with a store; the module is fed by its own word."""
    config = smaller(resolve(name, preset=preset), NETWORK)
    with torch.device("meta") if preset != "tiny" else torch.device("cpu"):
        try:
            module = bare(config, 80)
        except (NotImplementedError, RuntimeError):  # not every network can be made without memory
            module = None
    module = bare(config, 80) if module is None else module
    assert module.needs == fit.needs_of(config)
    line, needs = METHODS[name], module.needs
    assert needs.labels == line.labels
    if line.picture is None or line.sound is None:
        assert hasattr(type(config.method), "needs"), "what its settings say, they say in `needs()`"
    assert line.picture in (None, needs.picture) and line.sound in (None, needs.sound)
    assert module.config == config.method


@pytest.mark.parametrize("name", METHODS)
def test_lines_say_how_many_views(name: str) -> None:
    views = {fit.views_of(resolve(name, preset=preset)) for preset in preset_names(name)}
    said = METHODS[name].views
    assert len(views) > 1 if said is None else views == {said}, f"METHODS says {said}, its clips are {views}"


def test_lines_say_which_modalities_settings_choose() -> None:
    by_setting = {(n, k) for n, m in METHODS.items() for k in ("picture", "sound") if getattr(m, k) is None}
    assert by_setting == {("ccl", "sound"), ("supervised", "picture"), ("supervised", "sound")}
    for modality, seen in (("v", (True, False)), ("a", (False, True)), ("av", (True, True))):
        needs = fit.needs_of(resolve("supervised", sets=[f"modality={modality}"]))
        assert (needs.picture, needs.sound) == seen
    assert not fit.needs_of(resolve("ccl", sets=["teachers=image"])).sound


S1 = {"avcl", "simclr", "moco", "byol", "simsiam", "barlow-twins", "iic", "supervised"}


@pytest.mark.parametrize("name", METHODS)
def test_sources_are_tagged(name: str) -> None:
    """Each value is of a paper, of code, recalled, or ours; S1's are those of the methods that S1 has."""
    rows = show_config(resolve(name))
    untagged = [r.key for r in rows if not re.search(r"\[(S\d|C|M|ours)\b", r.source)]
    assert not untagged, f"nobody said {untagged}"
    assert any("[S1]" in r.source for r in rows) == (name in S1)
    for row in rows:  # the paper's value is shown wherever there is one
        assert (row.paper is None) == (row.of == "loop" and row.source.startswith("[ours]")), row


@pytest.mark.parametrize("name", sorted(S1))
def test_s1_crops_and_nothing_else(name: str) -> None:
    """Section 3.2 names random crops of 112 x 112, and no other augmentation; tiny goes on as AVID's tiny does."""
    loop = resolve(name).loop
    tiny_loop, avid = resolve(name, preset="tiny").loop, resolve("avid", preset="tiny").loop
    keys = ("flip", "brightness", "contrast", "saturation", "hue", "gray", "blur", "cutout", "sound_gain", "time_mask",
            "freq_mask")  # fmt: skip
    assert loop.crop == "random" and not any(getattr(loop, k) for k in keys) and not loop.sound_crop
    assert all(getattr(tiny_loop, k) == getattr(avid, k) for k in (*keys, "crop", "crop_area"))


def test_pictures_of_the_other_papers() -> None:
    """CCL's opts.py: crops of a quarter to all, flips, no jitter. L3 as AVID. CM-ACC: flips, no jitter."""
    ccl, l3, avid, acc = (resolve(n).loop for n in ("ccl", "l3", "avid", "cm-acc"))
    assert (ccl.crop, ccl.crop_area, ccl.flip, ccl.hue, ccl.contrast) == ("resized", (0.25, 1.0), 0.5, 0, 0)
    keys = ("crop", "crop_area", "flip", "brightness", "contrast", "saturation", "hue", "sound_gain")
    assert all(getattr(l3, k) == getattr(avid, k) for k in keys)
    assert (acc.flip, acc.brightness, acc.hue) == (0.5, 0, 0)


def test_l3_cuts_as_avid_does() -> None:
    assert fit.policy_of(resolve("l3"), 24000) == fit.policy_of(resolve("avid"), 24000) == AvidView(12000)
    assert fit.policy_of(resolve("l3", preset="tiny"), 24000) == RandomView()
    with pytest.raises(UsageError, match="max_offset"):
        resolve("l3", sets=["max_offset=-1"])


SCHEDULED = [n for n, m in METHODS.items() if "schedule" in {f.name for f in dataclasses.fields(m.load().config)}]


@pytest.mark.parametrize("name", SCHEDULED)
def test_every_schedule_of_the_loop_can_be_set(name: str) -> None:
    for schedule in ("constant", "cosine", "multistep"):
        loop = resolve(name, sets=[f"schedule={schedule}", "milestones=45,90", "decay=0.2"]).loop
        assert (loop.schedule, loop.milestones, loop.decay) == (schedule, (45, 90), 0.2)


def commands(name: str) -> list[str]:
    """The lines of a method's docstring that are typed into a shell, parts of && lines apart."""
    doc = sys.modules[METHODS[name].load().config.__module__].__doc__ or ""
    lines = re.findall(r"^    (avstore [^\n]+)", doc, re.M)
    return [part.strip() for line in lines for part in re.split(r"\s#", line)[0].split("&&")]


@pytest.mark.parametrize("name", METHODS)
def test_commands_of_its_docstring_can_be_typed(name: str) -> None:
    found = [shlex.split(c) for c in commands(name)]
    assert any(words[:2] == ["avstore", "train"] for words in found)
    for words in found:
        assert words[:2] == ["avstore", "train"], words
        values = typer.main.get_command(app).commands["train"].make_context("train", words[2:]).params
        for hidden in ("where", "list_", "fold"):
            assert not values[hidden]
        resolve(values["method"], preset=values["preset"], sets=list(values["set_"] or ()))


@pytest.mark.parametrize(("name", "preset"), PAIRS)
def test_settings_survive_json_and_text(name: str, preset: str) -> None:
    from trainers.typed import as_text

    config = resolve(name, preset=preset)
    again = RunConfig.from_json(json.loads(canonical_json(config.to_json())))
    assert again == config and again.digest == config.digest
    own = {f.name: getattr(config.method, f.name) for f in dataclasses.fields(config.method)}
    paper = resolve(name).values()  # what is empty there cannot be said, and need not be
    typed = resolve(name, sets=[f"{k}={as_text(v)}" for k, v in own.items() if v != () or paper[k] != ()])
    assert typed.method == config.method


@pytest.mark.parametrize("name", METHODS)
def test_files_are_complete(name: str) -> None:
    file = METHODS[name].load()
    assert set(REQUIRED) <= set(file.presets)
    doc = sys.modules[file.config.__module__].__doc__ or ""
    assert "avstore train" in doc and len(doc) > 400, "the docstring tells paper, idea and command"
    assert METHODS[name].paper and METHODS[name].summary
    rows = [r for r in show_config(resolve(name)) if r.of == "method"]
    assert {r.key for r in rows} == {f.name for f in dataclasses.fields(file.config)}
    silent = [r.key for r in rows if not r.source and r.key != "seed"]
    assert not silent, f"no source behind {silent}"
    assert all(r.value == r.paper for r in rows)
    with pytest.raises(UsageError, match="did you mean"):
        resolve(name, sets=["learning_rat=1"])


# ---- deeds: steps on synthetic clips ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_steps_reach_every_parameter(name: str) -> None:
    config = tiny(name)
    method = build(config).train()
    trainable = {k: p for k, p in method.named_parameters() if p.requires_grad}
    assert trainable, "nothing to train"
    optimiser = torch.optim.SGD(trainable.values(), lr=1e-4)
    reached: set[str] = set()
    told: set[str] = set()
    for i in range(4):  # two epochs of two steps: some methods need a look at all clips before they teach
        if i % 2 == 0:
            method.start_epoch(i // 2)
        rows = [12 * (i % 2) + k for k in range(12)]
        loss, metrics = step(method, optimiser, batch(config, rows, seed=i, epoch=i // 2))
        assert math.isfinite(loss)
        for k, p in trainable.items():
            if p.grad is not None:
                assert torch.isfinite(p.grad).all(), k
                if bool(p.grad.any()):
                    reached.add(k)
        told |= metrics.keys()
        for k, v in metrics.items():
            assert not isinstance(v, Tensor) or not v.requires_grad, f"metric {k} holds the graph"
            assert math.isfinite(float(v)), k
    assert "loss" in told
    missed = sorted(set(trainable) - reached)
    assert not missed, f"no gradient ever reached {missed[:5]} ({len(missed)} of {len(trainable)})"
    # where labels teach, features cannot collapse unseen: the accuracy shows it
    wanted = "accuracy" if METHODS[name].labels else "std"
    assert any(wanted in k for k in told), f"no {wanted} among {sorted(told)}"


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n, p in PAIRS if p != "tiny"])
def test_every_preset_builds_and_trains(name: str, preset: str) -> None:
    """Of small networks and clips; its own names, heads, losses and front-end. tiny: the test above."""
    config = smaller(resolve(name, preset=preset))
    method = build(config).train()
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-4)
    method.start_epoch(0)
    for i in range(2):
        loss, _ = step(method, optimiser, batch(config, [8 * i + k for k in range(8)], seed=i))
        assert math.isfinite(loss)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_is_the_same_method(name: str) -> None:
    config = tiny(name)
    one, two = bare(config), bare(config)
    first, second = state(one), state(two)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    other = state(bare(config.replace(seed=1)))
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("name", METHODS)
def test_a_clip_with_neither_picture_nor_sound_changes_nothing(name: str) -> None:
    config = tiny(name)
    rows = [0, 1, 2, 3, 4, 5]
    alone, beside = build(config).train(), build(config).train()
    losses = []
    for method, b in ((alone, batch(config, rows)), (beside, batch(config, [*rows, 9], blank=(6,)))):
        method.start_epoch(0)
        torch.manual_seed(0)
        loss, _ = method(b)
        loss.backward()
        method.after_step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    grads = {k: p.grad for k, p in alone.named_parameters() if p.grad is not None}
    scale = max(float(g.abs().max()) for g in grads.values())
    for k, p in beside.named_parameters():
        if p.grad is not None or k in grads:
            assert p.grad is not None and torch.isfinite(p.grad).all(), k
            assert float((p.grad - grads[k]).abs().max()) <= 2e-3 * scale, k
    mine, theirs = alone.method_state(), beside.method_state()
    for k in mine:
        if mine[k].is_floating_point():
            torch.testing.assert_close(theirs[k], mine[k], rtol=1e-3, atol=1e-4, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_state_goes_round_to_the_bit(name: str) -> None:
    config = tiny(name)
    whole = build(config).train()
    whole.start_epoch(0)
    optimiser = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=1e-3)
    for i in range(2):
        torch.manual_seed(i)
        step(whole, optimiser, batch(config, [6 * i + k for k in range(6)], seed=i))
    saved = state(whole)
    for k, x in saved.items():
        assert isinstance(x, Tensor), k
    fresh = build(config).train()
    fresh.load_state_dict({k[4:]: x for k, x in saved.items() if k.startswith("net/")})
    fresh.load_method_state({k[4:]: x for k, x in saved.items() if k.startswith("own/")})
    fresh.start_epoch(0)
    again = state(fresh)
    assert again.keys() == saved.keys()
    assert not [k for k in saved if not torch.equal(saved[k], again[k])]
    losses = []
    for method in (whole, fresh):
        torch.manual_seed(9)
        loss, _ = step(method, torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-3),
                       batch(config, list(range(12, 18)), seed=7))  # fmt: skip
        losses.append(loss)
    assert losses[0] == losses[1]
    a, b = state(whole), state(fresh)
    assert a.keys() == b.keys() and not [k for k in a if not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_are_of_unit_length(name: str) -> None:
    config = tiny(name)
    method = build(config).eval()
    b = batch(config, [0, 1, 2])
    video, audio = (x if x is None or b.views == 1 else x[:, 0] for x in (b.video, b.audio))
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        if video is not None:
            found |= method.embed(video=video)
        if audio is not None:
            found |= method.embed(audio=audio)
        if video is not None and audio is not None:
            both = method.embed(video=video, audio=audio)
            for k in found:
                torch.testing.assert_close(both[k], found[k], rtol=1e-4, atol=1e-5)
            found |= both
    assert found, "no towers"
    for tower, x in found.items():
        assert x.shape[0] == 3 and x.dim() == 2 and x.dtype == torch.float32, tower
        assert torch.isfinite(x).all()
        if not tower.endswith("-trunk"):
            torch.testing.assert_close(x.norm(dim=1), torch.ones(3), rtol=1e-4, atol=1e-4)
    names = {"video", "audio", "video-trunk", "audio-trunk", "joint", "joint-trunk"}
    assert set(found) <= names, f"towers are called {sorted(names)}"
