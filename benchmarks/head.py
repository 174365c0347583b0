"""Heads: fine-tuned networks as `bench finetune --keep` leaves them, and what they look at to name a class.

    write_head(path, net, Head(...))                    # safetensors: the encoders, the fusion, the classifier
    net, about, run = read_head(path)
    maps = class_saliency(net, about, run, store, [(number, second)])       # class activation maps (AVCL Fig. 2)

Maps: Grad-CAM of the class' score, its logit before the softmax, with respect to the last convolution's maps (conv5x).
Where the features are averages over places and the classifier is linear, this is the class activation map of Zhou et
al. 2016, up to a factor that the scaling takes out; Grad-CAM is what remains of it behind a hidden layer, a fusion or a
maximum. Not here: maps of the match of sight and sound, and the drawing (`explain.py`).
"""

# legend: B clips, C classes

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from avstore.augment import IMAGENET_MEAN, IMAGENET_STD
from avstore.durable import machine_errors, write_atomic
from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError, did_you_mean
from benchmarks.blocks import with_weights
from benchmarks.explain import FORMS, Saliency, _watched, cam
from benchmarks.recipe import Recipe
from benchmarks.tuning import Classifier, needs_for
from trainers.batch import Batch
from trainers.data import Normaliser, open_loader
from trainers.encoders import BLOCKS
from trainers.process import choose_device
from trainers.run import Run
from trainers.seconds import ListedOrder, SecondView

if TYPE_CHECKING:
    from avstore.store import Store


@dataclass(frozen=True)
class Head:
    """What a fine-tuned network is of: the run's folder, its classes in the order of its outputs, how it was tuned."""

    run: str
    classes: list[str]
    recipe: Recipe
    seed: int
    part: str
    store: str  # fingerprint
    label: str  # the column of the classes


def write_head(path: Path, net: Classifier, about: Head) -> None:
    """A fine-tuned network as one safetensors file, whole or not at all. MachineError where it cannot be written."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in net.state_dict().items()}
    value = {**dataclasses.asdict(about), "recipe": about.recipe.to_json()}
    with machine_errors(path):
        write_atomic(path, save(tensors, {"avstore-head": json.dumps(value)}))


def read_head(path: Path, run: Run | None = None) -> tuple[Classifier, Head, Run]:
    """(network in eval mode, what it is of, its run). run: where the folder noted in the file has moved.
    NotFoundError without the file or the run, CorruptError for what is no head, ConflictError for another run's."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", "a fine-tuned network", "bench finetune --keep makes it")
    try:
        with safe_open(path, "pt") as file:
            value = json.loads((file.metadata() or {})["avstore-head"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recipe = {**value["recipe"], "milestones": tuple(value["recipe"]["milestones"])}
        about = Head(**{**value, "recipe": Recipe(**recipe)})
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise CorruptError(f"{path} is no fine-tuned network", str(e), "avstore bench finetune --keep makes it") from e
    run = run if run is not None else Run(about.run)
    net = Classifier(with_weights(run, "random"), len(about.classes), about.recipe, about.seed)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as e:
        raise ConflictError(f"{path} is not of {run.path}", str(e).splitlines()[0], "--run names its run") from e
    return net.eval(), about, run


def attend_class(
    net: Classifier, batch: Batch, targets: Tensor, block: str = "conv5x", form: str = "grad-cam"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(probabilities (B,) of the target classes, maps of sight (B, T, H, W) or None, of sound (B, F, M) or None).

    targets: int64 (B,), places in the classes. Maps are in [0, 1], each clip's divided by its maximum. UsageError for
    an unknown block or form, or a network in train mode.
    """
    if block not in BLOCKS or form not in FORMS:
        wrong, known = (block, BLOCKS) if block not in BLOCKS else (form, FORMS)
        raise UsageError(f"no block or form {wrong!r}", did_you_mean(wrong, known))
    if net.training:
        raise UsageError("a network in train mode", "its maps depend on the batch", "net.eval()")
    for p in net.parameters():
        p.requires_grad_(True)
    with torch.enable_grad(), _watched(net, block) as seen:
        logits = net(batch)
        score = logits.gather(1, targets[:, None]).sum()
        every = [(m, x) for m in ("v", "a") for x in seen[m]]
        slopes = torch.autograd.grad(score, [x for _, x in every])
    out: dict[str, Tensor] = {}
    for (m, x), g in zip(every, slopes, strict=True):
        like = batch.video if m == "v" else batch.audio
        assert like is not None
        out[m] = cam(x.detach(), g, tuple(like.shape[2:]), form)
    return logits.detach().softmax(1).gather(1, targets[:, None])[:, 0], out.get("v"), out.get("a")


def class_saliency(
    net: Classifier,
    about: Head,
    run: Run,
    store: Store,
    pairs: Sequence[tuple[int, int]],
    *,
    name: str | None = None,
    block: str = "conv5x",
    form: str = "grad-cam",
    device: str = "auto",
) -> list[Saliency]:
    """Maps of the clips centred on (video number, second), for the class `name`; None: each video's own where the
    network knows it, else the one that it says. UsageError for a class that it does not know, or a video that lacks
    what it needs."""
    if name is not None and name not in about.classes:
        raise UsageError(f"no class {name!r}", did_you_mean(name, about.classes), "see avstore ls for the labels")
    recipe, on = about.recipe, choose_device(device)
    needs, rate = needs_for(run, store, recipe), store.spec.sample_rate
    for number, second in pairs:
        number = store[number].number
        lacks = (needs.picture and not store.has_picture[number]) or (needs.sound and not store.has_sound[number])
        if lacks:
            raise UsageError(f"video {number} ({store.key(number)}) lacks picture or sound", "this network needs it")
        if not 0 <= second < float(store.seconds(number)):
            raise UsageError(f"second {second} of video {number}", f"it lasts {float(store.seconds(number)):.2f} s")
    if not pairs:
        return []
    net = net.to(on).eval()
    normaliser = Normaliser(needs, run.snapshot.statistics, rate, on, torch.float32)
    numbers, rows = np.unique(np.array([n for n, _ in pairs], np.int64), return_inverse=True)
    order = ListedOrder(len(numbers), rows, np.array([s for _, s in pairs], np.int64), 1)
    own: list[Any] = [None] * len(numbers)
    if about.label in store.columns:
        own = [None if x is None else str(x) for x in store.column(about.label, numbers)]
    mean, std = (torch.tensor(x).reshape(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    here, out = np.ones(1, bool), []
    with open_loader(store, numbers, needs, order, SecondView(rate), device=on) as loader:
        for raw in loader.steps(0, order.batches):
            t = raw.tensors(on)
            video = audio = share = None
            if needs.picture:
                video = normaliser.video(t["frames"], raw.box, here, t["has_picture"])
            if needs.sound:
                audio = normaliser.audio(t["waveform"], here, t["has_sound"])
                share = (t["valid_samples"] / t["waveform"].shape[1]).to(torch.float32)
            batch = Batch(
                row=t["row"], position=t["position"], draw=t["draw"], has_picture=t["has_picture"],
                has_sound=t["has_sound"], epoch=0, seed=0, video=video, audio=audio, sound_share=share,
            )  # fmt: skip
            with torch.no_grad():
                said = int(net(batch).argmax(1)[0])
            at = int(np.searchsorted(numbers, int(raw.video[0])))
            wanted = name if name is not None else own[at] if own[at] in about.classes else about.classes[said]
            target = torch.tensor([about.classes.index(wanted)], device=on)
            p, sight, sound = attend_class(net, batch, target, block, form)
            frames = np.zeros((0, 1, 1, 3), np.uint8)
            if video is not None:
                shown = ((video[0].float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
                frames = shown.permute(1, 2, 3, 0).contiguous().numpy()
            told = f"{run.name} gives {wanted} {float(p[0]):.2f}"
            told += "" if about.classes[said] == wanted else f" and says {about.classes[said]}"
            none = np.zeros((0, 0), np.float32)
            out.append(
                Saliency(
                    run.name,
                    int(raw.video[0]),
                    int(raw.draw[0]),
                    float(p[0]),
                    frames,
                    np.zeros((0, 1, 1), np.float32) if sight is None else sight[0].float().cpu().numpy(),
                    none if audio is None else audio[0, 0].float().cpu().numpy(),
                    none if sound is None else sound[0].float().cpu().numpy(),
                    told,
                )
            )
    return out
