"""How a network is fine-tuned: the published recipes, and what a user puts in their place.

    make_recipe("ucf", "v", frames=32, epochs=8)

Presets: `ucf`, `hmdb` (AVID, its configurations read: methods.md 6.1), `avcl` (S1; clips-and-protocols.md 3),
`crisscross-ucf`, `crisscross-hmdb` (the authors' files full_ft_*.yaml for Kinetics-400 read: SGD, 224 pixels, the
features' maximum, no dropout, no blur, best test epoch beside the last; `warmup_epochs: 2` stands in those files and
nothing reads it, so there is none. Rates differ by fold there; one for all folds is ours, `--fold-rate` sets them
apart). Not here: the training (`tuning.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from avstore.errors import UsageError, did_you_mean

SELECT = ("last", "best", "validation")


@dataclass(frozen=True)
class Recipe:
    """Defaults: AVID on UCF101 with 8 frames. milestones: epochs after which the rate is times decay."""

    preset: str = "ucf"
    modality: Literal["a", "v", "av"] = "v"
    frames: int = 8
    size: int = 0  # side of the crop in pixels; 0: that of the run's pre-training
    fps: int | Literal["native"] = 16
    optimiser: Literal["adam", "sgd"] = "adam"
    rate: float = 1e-4
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0
    warm_up: int = 5  # epochs of the classifier alone, before `epochs`
    epochs: int = 16
    milestones: tuple[int, ...] = (6, 10, 14)
    decay: float = 0.3
    batch: int = 64
    draws: int = 10  # training clips of each video in an epoch
    hidden: int = 0  # width of a hidden layer with ReLU before the dropout; 0: none
    dropout: float = 0.5
    pool: Literal["run", "max", "avg"] = "run"  # of the last map; run: as in pre-training
    blur: float | None = None  # chance of it in training; None: as in pre-training
    clips: int = 10  # of each test video
    alone: int = 0  # clips of each test video that are scored one by one (clip top-1); 0: the same ones
    select: Literal["last", "best", "validation"] = "last"
    precision: Literal["auto", "bf16", "fp32"] = "fp32"

    def __post_init__(self) -> None:
        wrong = []
        for name in ("frames", "epochs", "batch", "draws", "clips"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("warm_up", "hidden", "weight_decay", "momentum", "size", "alone"):
            if getattr(self, name) < 0:
                wrong.append(f"{name} {getattr(self, name)} must not be negative")
        if not self.rate > 0 or not 0 < self.decay <= 1 or not 0 <= self.dropout < 1:
            wrong.append(f"rate {self.rate} above 0, decay {self.decay} in (0, 1], dropout {self.dropout} in [0, 1)")
        if self.blur is not None and not 0 <= self.blur <= 1:
            wrong.append(f"blur {self.blur} must lie in [0, 1]")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            wrong.append(f"milestones {self.milestones} must rise, from 1")
        if self.fps != "native" and (not isinstance(self.fps, int) or self.fps < 1):
            wrong.append(f"fps {self.fps!r} must be a whole number or native")
        for name, allowed in (("modality", ("a", "v", "av")), ("optimiser", ("adam", "sgd")), ("select", SELECT),
                              ("pool", ("run", "max", "avg")), ("precision", ("auto", "bf16", "fp32"))):  # fmt: skip
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} {getattr(self, name)!r}: {did_you_mean(str(getattr(self, name)), allowed)}")
        if wrong:
            raise UsageError("this fine-tuning does not hold", "; ".join(wrong), "avstore bench finetune --help")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}


# [C] AVID: UCF101 and HMDB51 at 8 frames; at 32 half the batch and fewer clips; its line of single clips has 25.
# [S1] avcl: 16 consecutive frames; a validation part is ours where the store has none
PRESETS = {
    "ucf": Recipe(alone=25),
    "hmdb": Recipe("hmdb", epochs=10, milestones=(3, 6, 8), draws=25, alone=25),
    "avcl": Recipe("avcl", frames=16, fps="native", optimiser="sgd", rate=1e-3, weight_decay=5e-3, warm_up=0,
                   epochs=150, milestones=(), batch=16, draws=1, hidden=512, dropout=0.7, select="validation"),
    "crisscross-ucf": Recipe("crisscross-ucf", size=224, optimiser="sgd", rate=5e-4, warm_up=0, epochs=20, dropout=0.0,
                             pool="max", blur=0.0, select="best"),
    "crisscross-hmdb": Recipe("crisscross-hmdb", size=224, optimiser="sgd", rate=5e-4, warm_up=0, epochs=20,
                              decay=0.1, dropout=0.0, pool="max", blur=0.0, select="best"),
}  # fmt: skip
# UCF101: rate of fold 2; HMDB51: of fold 1
LONG: dict[str, dict[str, Any]] = {
    "ucf": {"batch": 32, "draws": 5},
    "hmdb": {"batch": 32, "draws": 10},
    "crisscross-ucf": {"batch": 32, "rate": 7e-5, "milestones": (8, 12, 16)},
    "crisscross-hmdb": {"batch": 32, "rate": 1e-4, "milestones": (8, 12, 16), "decay": 0.3},
}


def make_recipe(preset: str = "ucf", modality: str = "v", frames: int | None = None, **given: Any) -> Recipe:
    """A preset, with what is given (not None) in its place; `clips` counts for single clips too, unless `alone` does.

    From 32 frames on AVID's batch and clips of 32, or CrissCross' batch, rate and schedule of 32. Other `epochs`
    without `milestones`: the preset's in proportion.
    Modality av: the head of S1 (hidden 512, dropout 0.7) with any preset. UsageError for what makes no recipe.
    """
    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}", did_you_mean(preset, PRESETS), f"one of {', '.join(PRESETS)}")
    of_pictures = {"--frames": frames, "--size": given.get("size"), "--fps": given.get("fps")}
    wrong = [option for option, value in of_pictures.items() if value is not None]
    if wrong and modality == "a":
        raise UsageError(f"{wrong[0]} of sound", "it is of a clip of pictures", "leave it away, or --modality v or av")
    base = PRESETS[preset]
    frames = base.frames if frames is None else frames
    changes: dict[str, Any] = {"modality": modality, "frames": frames}
    if frames >= 32:
        changes |= LONG.get(preset, {})
    if modality == "av":
        changes |= {"hidden": 512, "dropout": 0.7}
    given = {k: v for k, v in given.items() if v is not None}
    if "clips" in given:
        given.setdefault("alone", 0)
    if "epochs" in given and "milestones" not in given:
        published = changes.get("milestones", base.milestones)
        scaled = {round(m * given["epochs"] / base.epochs) for m in published}
        changes["milestones"] = tuple(sorted(m for m in scaled if 0 < m < given["epochs"]))
    return dataclasses.replace(base, **(changes | given))
