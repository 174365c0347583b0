"""The embedder: a method's networks over the seconds of a store's videos, one batch of clips after another.

Vectors go out as they come, to be held (`embed.py`) or written into the store (`embedding_arrays.py`): nothing is kept
here. Which clip stands for a second is `seconds.py`'s. Vectors that are not finite are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from avstore.errors import AvstoreError, UsageError
from trainers.data import Normaliser, open_loader
from trainers.fit import needs_of
from trainers.process import choose_device
from trainers.run import Run
from trainers.seconds import ListedOrder, SecondView

if TYPE_CHECKING:
    from avstore.store import Store

BATCH = 32
Vectors = dict[str, np.ndarray]


class Embedder:
    """A method in eval mode on its device, with what normalises its input.

    A method has the towers that its `embed` gives: of pictures, of sound, or of both together (a key that only a call
    with both brings, such as 'joint'). One whose `embed` takes `sound_share` is told what of a window is no padding.
    """

    def __init__(self, method: nn.Module, run: Run, sample_rate: int, device: str = "auto") -> None:
        self.device = choose_device(device)
        self.method: Any = method.float().eval().to(self.device)
        self.needs = needs_of(run.config)
        self.normaliser = Normaliser(self.needs, run.snapshot.statistics, sample_rate, self.device, torch.float32)
        self.sample_rate = sample_rate
        self.wants_share = "sound_share" in inspect.signature(method.embed).parameters  # type: ignore[arg-type]
        self._joint: frozenset[str] | None = None

    @torch.no_grad()
    def sizes(self) -> dict[str, int]:
        """Towers with the length of their vectors. UsageError where the method has none."""
        frames = torch.zeros((1, self.needs.frames, 64, 64, 3), dtype=torch.uint8, device=self.device)
        here, on = np.ones(1, bool), torch.ones(1, dtype=torch.bool, device=self.device)
        video = audio = None
        found: dict[str, torch.Tensor] = {}
        if self.needs.picture:
            video = self.normaliser.video(frames, np.array([[0, 0, 64, 64]]), here, on)
            found |= self._embed(video, None, None)
        if self.normaliser.mean is not None:
            wave = torch.zeros((1, int(self.needs.seconds * self.sample_rate)), dtype=torch.int16, device=self.device)
            audio = self.normaliser.audio(wave, here, on)
            found |= self._embed(None, audio, torch.ones(1, device=self.device))
        alone = frozenset(found)
        if video is not None and audio is not None:
            found |= self._embed(video, audio, torch.ones(1, device=self.device))
        if not found:
            raise UsageError("this method has no towers", "its `embed` gives nothing, for pictures or for sound")
        self._joint = frozenset(found) - alone
        return {tower: int(x.shape[1]) for tower, x in found.items()}

    @property
    def joint(self) -> frozenset[str]:
        """Towers that take picture and sound together."""
        if self._joint is None:
            self.sizes()
        assert self._joint is not None
        return self._joint

    def _embed(
        self, video: torch.Tensor | None, audio: torch.Tensor | None, share: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        extra = {"sound_share": share} if self.wants_share else {}
        found: dict[str, torch.Tensor] = self.method.embed(video=video, audio=audio, **extra)
        return found

    @torch.no_grad()
    def run(
        self, store: Store, numbers: np.ndarray, rows: np.ndarray, seconds: np.ndarray, batch: int = BATCH
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Vectors]]:
        """(video numbers (B,), seconds (B,), {tower: float32 (B, D), NaN without the modality}) of the pairs in order.

        AvstoreError, naming video and second, for a vector that is not finite.
        """
        if not len(rows):
            return
        needs = self.needs
        if needs.picture and not store.spec.picture:  # a store of sound alone: its pictures are none
            needs = needs.__class__(**{**needs.__dict__, "picture": False})
        joint = self.joint
        order = ListedOrder(len(numbers), rows, seconds, batch)
        loader = open_loader(store, numbers, needs, order, SecondView(store.spec.sample_rate), device=self.device)
        with loader:
            for raw in loader.steps(0, order.batches):
                on = raw.tensors(self.device)
                out: dict[str, torch.Tensor] = {}
                seen = raw.has_picture if needs.picture else np.zeros(len(raw), bool)
                heard = raw.has_sound if self.normaliser.mean is not None else np.zeros(len(raw), bool)
                for here, video, audio in ((seen, True, False), (heard, False, True), (seen & heard, True, True)):
                    if not here.any() or (video and audio and not joint):
                        continue  # blanks never enter a network
                    kept = torch.from_numpy(np.flatnonzero(here)).to(self.device)
                    found = self._embed(
                        self._picture(raw, on, here, kept) if video else None,
                        self._sound(on, here, kept) if audio else None,
                        on["valid_samples"][kept] / on["waveform"].shape[1] if audio and self.wants_share else None,
                    )
                    for tower, x in found.items():
                        if (video and audio) != (tower in joint):
                            continue
                        self._require_finite(store, tower, x, raw.video[here], raw.draw[here])
                        out[tower] = x.new_full((len(raw), x.shape[1]), torch.nan).index_copy_(0, kept, x)
                yield raw.video.copy(), raw.draw.copy(), {t: x.float().cpu().numpy() for t, x in out.items()}

    def _picture(self, raw: Any, on: dict[str, torch.Tensor], here: np.ndarray, kept: torch.Tensor) -> torch.Tensor:
        return self.normaliser.video(on["frames"][kept], raw.box[here], here[here], on["has_picture"][kept])

    def _sound(self, on: dict[str, torch.Tensor], here: np.ndarray, kept: torch.Tensor) -> torch.Tensor:
        return self.normaliser.audio(on["waveform"][kept], here[here], on["has_sound"][kept])

    def _require_finite(self, store: Store, tower: str, x: torch.Tensor, video: np.ndarray, second: np.ndarray) -> None:
        bad = ~torch.isfinite(x.to(torch.float16)).all(1)  # float16 is what the store keeps
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise AvstoreError(
                f"{tower} embedding of video {int(video[i])} ({store.key(int(video[i]))}), second {int(second[i])}: "
                "it is not finite",
                "the run diverged, or its features exceed float16: as scores they would rank perfectly",
                "embed an earlier --checkpoint, or train again with a lower learning rate",
            )
