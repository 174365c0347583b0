"""Which moments of a long video to look at: Listen to Look's recurrent preview, after its authors' code ("skimming").

An untrimmed video is mostly beside the point, and a heavy network need not see all of it. From cheap features of every
moment (`listen_to_look.py`: one picture and a second of sound) an LSTM asks, step by step, where to look next; what it
found so far decides the next question. Trained with nothing but the video's class.

    moments = preview.moments(store, "listen-to-look", numbers)          # of `avstore embed`, one a second
    features = [moments[n].features for n in numbers]
    looks = preview.fit(features, labels, classes=8, widths=(512, 512), fusion=student.fusion)   # PRESETS["paper"]
    where = looks.choose(features[0], budget=5)                          # indices into its moments, in order of choice
    looks.scores(features[0], where)                                     # class probabilities from these alone

Each modality has keys of its own over the moments and asks with a query of its own; its attention weighs the moments of
both modalities. A third attention, over the modalities, mixes the two: what comes out is one weight per moment, which
averages picture and sound features, and Psi fuses them: that is the next step's input (soft selection). The first input
is Psi of the mean features. The class is told from the mean of the S inputs, so the start and S - 1 looks. Each
modality's moment of the largest weight is masked in all later steps of that modality, in training as in use, which the
code's flag `--with_replacement` does in spite of its name; its README trains and tests so (`masks=False`: without).
`choose` takes the moments that are masked: of each step the two of the modalities, the one of the larger mixed weight
first, each moment once.

What the code leaves to us: the width of the modality attention's layer (one linear layer of the state), and that batch
statistics of the keys are of moments that exist, not of padding. What differs: with its mask the code also hides one
random moment from the start, where a run without `--mean_feature_as_start` would begin: here none. A video with fewer
moments than steps begins anew once all are masked; there the softmax over nothing is uniform, over padding too. Weights
start as torch draws them, the code's from N(0, 0.02). Of its recipe the classifier's rate, a tenth, is here.
Weights are float32 and a function of the seed; on a CPU the same features give the same preview to the bit.
"""

# legend: B videos, N moments of the longest of them, S steps, M modalities (1 or 2), D = sum of their widths
# E width of what is fused, H state, C classes

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from avstore.errors import CorruptError, NotFoundError, UsageError
from trainers.projectors import Projector

if TYPE_CHECKING:
    from avstore.store import Store

MASKED = -1e35  # [C] score of a moment that is not there, or was chosen


@dataclass(frozen=True)
class PreviewConfig:
    """Defaults: the authors' code [C]."""

    steps: int = 10  # [C] of the LSTM; the class is told from the start and 9 looks
    masks: bool = True  # [C] --with_replacement: no moment is looked at twice by one modality
    hidden: int = 1024  # [C] state of the LSTM
    dim: int = 512  # [C] of queries and keys
    learning_rate: float = 0.01  # [C] SGD, Nesterov
    classifier_rate: float = 0.1  # [C] times learning_rate
    momentum: float = 0.9  # [C]
    weight_decay: float = 1e-4  # [C]
    batch: int = 256  # [C]
    epochs: int = 25  # [C]
    milestones: tuple[int, ...] = (15, 20)  # [C] a tenth of the rate after each
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)} must be at least {least}"
            for name, least in (("steps", 2), ("hidden", 1), ("dim", 1), ("batch", 2), ("epochs", 1))
            if getattr(self, name) < least
        ]
        if not self.learning_rate > 0:
            wrong.append(f"learning_rate {self.learning_rate} must be above 0")
        wrong += [
            f"{name} {getattr(self, name)} must not be negative"
            for name in ("classifier_rate", "momentum", "weight_decay")
            if getattr(self, name) < 0
        ]
        if wrong:
            raise UsageError("the configuration of the preview does not hold", "; ".join(wrong))


# a few dozen videos on a CPU: every epoch has several steps, and the classifier learns as fast as the rest [ours]
TINY = PreviewConfig(steps=4, hidden=128, dim=64, learning_rate=0.05, classifier_rate=1.0, batch=16, epochs=60,
                     milestones=(40, 52))  # fmt: skip
PRESETS = {"paper": PreviewConfig(), "tiny": TINY}


@dataclass(frozen=True)
class Moments:
    """A video's: features float32 (n, D), modality by modality; seconds int64 (n,), where each begins."""

    features: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True)
class Looked:
    """logits (B, C); attention (B, S, N): each step's weight of each moment, 1 in all, 0 where there is none."""

    logits: Tensor
    attention: Tensor


class Preview(nn.Module):
    """See the top of this file. widths: features of each modality, sound last; fusion: Psi, frozen here (None: features
    side by side); classifier: one to start from. UsageError for widths that do not fit them."""

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        config: PreviewConfig | None = None,
        fusion: Projector | None = None,
        classifier: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config or PreviewConfig()
        self.widths, self.classes = tuple(int(w) for w in widths), classes
        if len(self.widths) not in (1, 2) or min(self.widths) < 1:
            raise UsageError(f"moments of widths {self.widths}", "of pictures, or of pictures and sound")
        if classes < 2:
            raise UsageError(f"{classes} classes to tell apart", "at least 2")
        if fusion is not None and fusion.inputs != sum(self.widths):
            raise UsageError(f"a fusion of {fusion.inputs} numbers for moments of {sum(self.widths)}", "widths differ")
        fused = sum(self.widths) if fusion is None else fusion.dim
        if classifier is not None and (classifier.in_features, classifier.out_features) != (fused, classes):
            raise UsageError("a classifier of another width or of other classes", f"expected {fused} -> {classes}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(c.seed)  # torch.manual_seed would also seed every GPU, for good
            self.cell = nn.LSTMCell(fused, c.hidden)
            for name in ("weight_ih", "weight_hh"):
                weight_norm(self.cell, name)
            self.keys = nn.ModuleList(_normed(width, c.dim) for width in self.widths)
            self.queries = nn.ModuleList(
                nn.Sequential(_normed(c.hidden, c.hidden), nn.Linear(c.hidden, c.dim)) for _ in self.widths
            )
            self.modality = nn.Linear(c.hidden, len(self.widths))
            self.classifier = nn.Linear(fused, classes) if classifier is None else copy.deepcopy(classifier)
        self.fusion = None if fusion is None else copy.deepcopy(fusion).eval().requires_grad_(False)
        self.losses: list[float] = []  # of the epochs of `fit`
        self.about: dict[str, Any] = {}  # what `save` was told of it

    def train(self, mode: bool = True) -> Preview:
        """As of any module, but for Psi: frozen, so always as in evaluation."""
        super().train(mode)
        if self.fusion is not None:
            self.fusion.eval()
        return self

    def fuse(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E), Psi."""
        return x if self.fusion is None else self.fusion(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def forward(self, moments_BND: Tensor, mask_BN: Tensor) -> Looked:
        """`config.steps` steps over videos whose moments are those of the mask (at least one each). The last step's
        attention is what it would have looked at next; no class is told from it."""
        self._require(moments_BND)
        keys, state, x_BE = self._begin(moments_BND, mask_BN)
        left = [mask_BN] * len(self.widths)
        seen, weights = [], []
        for _ in range(self.config.steps):
            seen.append(x_BE)
            weight_BN, at_MB, state = self._look(keys, left, state, x_BE)
            x_BE = self.fuse(torch.einsum("bn,bnd->bd", weight_BN, moments_BND))
            weights.append(weight_BN)
            if self.config.masks:
                left = [_without(one, at_B, mask_BN) for one, at_B in zip(left, at_MB, strict=True)]
        return Looked(self.classifier(torch.stack(seen).mean(0)), torch.stack(weights, 1))

    @torch.no_grad()
    def choose(self, features: np.ndarray | Tensor, budget: int) -> np.ndarray:
        """int64 (min(budget, n),): distinct moments of one video (n, D) worth a look, the most telling first.

        UsageError for a budget below 1, for features of another width, and for ones that are not finite.
        """
        x = self._moments(features)
        if budget < 1:
            raise UsageError(f"a budget of {budget} moments", "at least 1")
        every = torch.ones(1, x.shape[1], dtype=torch.bool)
        keys, state, x_BE = self._begin(x, every)
        left = [every] * len(self.widths)
        chosen: list[int] = []
        while len(chosen) < min(budget, x.shape[1]):
            weight_BN, at_MB, state = self._look(keys, left, state, x_BE)
            x_BE = self.fuse(torch.einsum("bn,bnd->bd", weight_BN, x))
            now = sorted({int(at) for at in at_MB}, key=lambda n: -float(weight_BN[0, n]))
            chosen += [n for n in now if n not in chosen]
            # without masks in training, here all the same: or it would choose the same moments again and again
            left = [_without(one, at_B, every) for one, at_B in zip(left, at_MB, strict=True)]
        return np.array(chosen[:budget], np.int64)

    @torch.no_grad()
    def attention(self, features: np.ndarray | Tensor) -> np.ndarray:
        """float32 (S, n): the weight of each moment of one video (n, D) in each step, as it was trained."""
        x = self._moments(features)
        return self(x, torch.ones(1, x.shape[1], dtype=torch.bool)).attention[0].numpy()

    @torch.no_grad()
    def scores(self, features: np.ndarray | Tensor, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """float32 (C,): class probabilities from the mean of these moments of one video (None: of all)."""
        x = self._moments(features)[0]
        picked = torch.arange(len(x)) if indices is None else torch.as_tensor(np.asarray(indices, np.int64))
        if not len(picked) or int(picked.min()) < 0 or int(picked.max()) >= len(x):
            raise UsageError(f"moments {picked.tolist()} of a video that has {len(x)}", "name at least one that it has")
        return torch.softmax(self.classifier(self.fuse(x[picked]).mean(0)), 0).numpy()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _begin(self, moments_BND: Tensor, mask_BN: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
        """Keys of each modality (B, N, dim), an empty state, and Psi of the mean features, the first input."""
        there = moments_BND[mask_BN]
        keys = []
        for net, part in zip(self.keys, there.split(self.widths, 1), strict=True):
            made = net(part)
            keys.append(made.new_zeros(*mask_BN.shape, made.shape[1]).index_put(mask_BN.nonzero(as_tuple=True), made))
        mean_BD = torch.where(mask_BN[:, :, None], moments_BND, 0).sum(1) / mask_BN.sum(1, keepdim=True)
        state = moments_BND.new_zeros(len(mask_BN), self.config.hidden)
        return keys, (state, state), self.fuse(mean_BD)

    def _look(
        self, keys: list[Tensor], left: list[Tensor], state: tuple[Tensor, Tensor], x_BE: Tensor
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]:
        """(weights (B, N), each modality's moment of the largest (B,), new state): what a step attends to after having
        seen x. left: bool (B, N) of each modality, the moments that it may look at."""
        h, c = self.cell(x_BE, state)
        weights, at = [], []
        for key_BND, query, left_BN in zip(keys, self.queries, left, strict=True):
            score_BN = torch.einsum("bd,bnd->bn", query(h), key_BND) / self.config.dim**0.5
            score_BN = score_BN.masked_fill(~left_BN, MASKED)
            weights.append(torch.softmax(score_BN, 1))
            at.append(score_BN.detach().argmax(1))
        share_BM = torch.softmax(self.modality(h), 1)
        return torch.einsum("bm,mbn->bn", share_BM, torch.stack(weights)), at, (h, c)

    def _require(self, x: Tensor) -> None:
        if x.shape[-1] != sum(self.widths):
            raise UsageError(f"moments of {x.shape[-1]} numbers", f"this preview knows moments of {self.widths}")

    def _moments(self, features: np.ndarray | Tensor) -> Tensor:
        """One video as a batch of it, (1, n, D); the module in eval mode."""
        self.eval()
        x = torch.as_tensor(np.asarray(features, np.float32))
        if x.dim() != 2 or not len(x):
            raise UsageError(f"moments of shape {tuple(x.shape)}", "expected (n, D) of one video, n at least 1")
        self._require(x)
        if not bool(torch.isfinite(x).all()):
            raise UsageError("moments that are not finite", "they would be looked at always, or never")
        return x[None]

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Weights and settings as one .safetensors file, and what else is to be known of it (plain values): `load`
        gives it back as `about`. The file appears whole or not at all."""
        from safetensors.torch import save

        from avstore.durable import write_atomic

        layers = [] if self.fusion is None else [m for m in self.fusion if isinstance(m, nn.Linear)]
        made = {"widths": self.widths, "classes": self.classes, "config": asdict(self.config),
                "fusion": [layers[0].in_features, *(m.out_features for m in layers)] if layers else None,
                "about": self.about if about is None else about}  # fmt: skip
        tensors = {k: x.contiguous() for k, x in self.state_dict().items()}
        write_atomic(Path(path), save(tensors, {"preview": json.dumps(made)}))


def load(path: str | Path) -> Preview:
    """What `Preview.save` wrote. NotFoundError; CorruptError for another file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise NotFoundError(f"there is no preview {path}", "`Preview.save` writes one")
    try:
        with safe_open(str(path), framework="pt") as file:
            made: dict[str, Any] = json.loads((file.metadata() or {})["preview"])
            weights = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
        if "masks" not in made["config"]:
            raise CorruptError(
                f"{path} is a preview of an older avstore",
                "it was trained without masks, and told classes from other moments",
                "train it anew: avstore bench untrimmed --keep FILE",
            )
        config = PreviewConfig(**{**made["config"], "milestones": tuple(made["config"]["milestones"])})
        preview = Preview(
            made["widths"], made["classes"], config, Projector(made["fusion"]) if made["fusion"] else None
        )
        preview.load_state_dict(weights)
        preview.about = dict(made.get("about") or {})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise CorruptError(f"{path} is no preview", str(e).splitlines()[0], "use another file") from e
    return preview.eval()


def fit(
    features: Sequence[np.ndarray],
    labels: Sequence[int] | np.ndarray,
    classes: int,
    widths: Sequence[int],
    *,
    fusion: Projector | None = None,
    classifier: nn.Linear | None = None,
    config: PreviewConfig | None = None,
) -> Preview:
    """A preview trained on videos of (n_i, D) moments and a class each, 0 ... classes - 1. In eval mode.

    Every epoch takes all videos in an order of its own, drawn from the seed; its mean cross-entropy is kept in
    `losses`. UsageError where the two lists do not fit, for labels outside, and where the loss is no longer finite.
    """
    preview = Preview(widths, classes, config, fusion, classifier)
    c, label_B = preview.config, torch.as_tensor(np.asarray(labels, np.int64))
    if len(features) != len(label_B) or len(features) < 2:
        raise UsageError(f"{len(features)} videos with {len(label_B)} labels", "one of each, of two videos at least")
    if int(label_B.min()) < 0 or int(label_B.max()) >= classes:
        raise UsageError(
            f"labels from {int(label_B.min())} to {int(label_B.max())}", f"classes are 0 ... {classes - 1}"
        )
    videos = [preview._moments(x)[0] for x in features]
    own = {id(p) for p in preview.classifier.parameters()}
    rest = [p for p in preview.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": rest, "factor": 1.0},
        {"params": list(preview.classifier.parameters()), "factor": c.classifier_rate},
    ]
    nesterov = c.momentum > 0
    optimiser = torch.optim.SGD(groups, c.learning_rate, c.momentum, weight_decay=c.weight_decay, nesterov=nesterov)
    for epoch in range(c.epochs):
        rate = c.learning_rate * 0.1 ** sum(epoch >= m for m in c.milestones)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(c.seed * 1_000_003 + epoch))
        total = 0.0
        for part in _parts(order, c.batch):
            preview.train()
            looked = preview(*padded([videos[i] for i in part.tolist()]))
            loss = F.cross_entropy(looked.logits, label_B[part])
            if not bool(torch.isfinite(loss)):
                raise UsageError(f"the preview's loss is {float(loss)} in epoch {epoch}", "it diverged",
                                 "lower its learning_rate")  # fmt: skip
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(part)
        preview.losses.append(total / len(videos))
    return preview.eval()


def padded(videos: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(moments (B, N, D), mask (B, N)) of videos of (n_i, D): zeros behind a shorter one's end."""
    longest = max(len(x) for x in videos)
    mask = torch.stack([torch.arange(longest) < len(x) for x in videos])
    return torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x in videos]), mask


def moments(
    store: Store, run: str, numbers: Sequence[int] | np.ndarray, towers: Sequence[str] = ("video-trunk", "audio-trunk")
) -> dict[int, Moments]:
    """The moments of videos of a store: each second that the first tower has a row of, with that of the others beside
    it, zeros where they have none (silence). `run`: the name of embeddings. A video without any moment is left out.

    NotFoundError where the run has no such tower; `avstore embed` writes them, one row a second by default.
    """
    from avstore import index

    if not towers:
        raise UsageError("moments of no tower", "name one of pictures, or one of pictures and one of sound")
    numbers = np.unique(np.asarray(numbers, np.int64))
    rows = [index.read_rows(store, run, tower) for tower in towers]
    found = [_by_video(*index.seconds_of(store, x, numbers)) for x in rows]
    out: dict[int, Moments] = {}
    for n, (_, seconds) in found[0].items():
        columns = []
        for x, of in zip(rows, found, strict=True):
            features = np.zeros((len(seconds), x.shape[1]), np.float32)
            if n in of:
                _, own, theirs = np.intersect1d(seconds, of[n][1], return_indices=True)
                features[own] = of[n][0][theirs]
            columns.append(features)
        out[n] = Moments(np.concatenate(columns, 1), seconds)
    return out


def _by_video(vectors: np.ndarray, video: np.ndarray, second: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{video: (its vectors, their seconds)} of rows that lie video by video."""
    if not len(video):
        return {}
    ends = np.flatnonzero(np.diff(video, append=-1)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return {int(video[a]): (vectors[a:b], second[a:b]) for a, b in zip(starts, ends, strict=True)}


def _normed(inputs: int, outputs: int) -> nn.Sequential:
    """A linear layer, batch normalised (so without bias), ReLU; of moments it is a 1 x 1 convolution."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


def _without(left_BN: Tensor, at_B: Tensor, mask_BN: Tensor) -> Tensor:
    """`left` without the moment `at` of each video; where none is left, all that there are."""
    left_BN = left_BN.scatter(1, at_B[:, None], False)
    return torch.where(left_BN.any(1, keepdim=True), left_BN, mask_BN)


def _parts(order: Tensor, size: int) -> list[Tensor]:
    """Batches; one video alone at the end joins the batch before it, for it has no batch statistics."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
