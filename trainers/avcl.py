"""AVCL: self-supervised contrastive learning for audio-visual action recognition (S1: "Audio-Visual Contrastive
Learning", Kinetics-Sounds32 and 100). No public code.

A video's clip and its whole sound, drawn as an image, go through two 3-D networks. AMFM squeezes both features into one
excitation that gates them both, CGRA asks that the same feature of sight and sound correlate over the batch and that
different ones do not, and SelfCL tells a video's own sound from the other videos' sounds and pictures.

    avstore train avcl                                       # the paper's: R3D, 16 frames, whole sound
    avstore train avcl --preset tiny                         # AVID's small nets, a CPU, a minute
    avstore train avcl --set video_net=vcop-r2plus1d --set audio_net=vcop-r2plus1d    # Table 4; vcop-c3d likewise
    avstore train avcl --set frames=1 --set audio=1.2s       # Table 1; audio=raw, shared=true
    avstore train avcl --set cgra_layers=conv5+pool          # Table 2; none, conv3, conv4, conv5
    avstore train avcl --set weight_cor=1 --set weight_self=0      # Table 3, without SelfCL; amfm=false

What the paper leaves open, and what differs:
* Eqs. 3-4 gate with a ReLU, not a sigmoid: unbounded, and shut for a channel whose excitation is negative. The same E
  gates both modalities. W_c and b_c, which the text names below eq. 4, stand in no equation and are not here.
* Eq. 6 centres nothing, as Barlow Twins does: `center=true` (then CGRA is Barlow Twins' loss: a test holds them equal).
  A feature whose norm over the batch is below 1e-4 counts as uncorrelated instead of dividing by zero.
* Eqs. 7 and 9 are sums over the batch; `reduction=mean` divides by it. The paper gives no temperature: 0.1.
* Fusion comes before both losses, as the equations have it; CGRA on conv3 ... conv5 takes the averages of the maps,
  which lie before fusion. Losses of several layers are summed.
* Pictures and sound meet in one batch over all GPUs: correlations and negatives are those of the global batch.
* The sound image: 256 mel-spaced bands of 10 ms rows, stretched to 256 columns, cropped at random to 112 x 112 and
  repeated over colour and time (`sound_image.py`). `audio=1.2s`: 1.28 s that begin with the clip, by default in rows
  of 5 ms (`avcl-mel256-5ms`: 256 x 256 without stretching), as in the code of the paper's source of this sentence.
  `audio=raw`: 1.28 s of waveform in rows of 10 ms (`avcl-raw`); the paper tells neither the length nor how its networks
  took it. Both set `seconds` and `front_end`, and other ones are refused. A sound network of `backbones.AUDIO` (tiny)
  hears the rows as they are.
* One modality alone cannot be gated: towers `video` and `audio` are the networks' own features, `joint` is [f_v, f_a],
  what the paper's classifier is given.
"""

# legend: B clips of this rank, n those with picture and sound, N those of all ranks, D features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from avstore.views import RandomView
from trainers.backbones import VIDEO
from trainers.batch import Batch
from trainers.distributed import gather_with_grad
from trainers.encoders import Encoder
from trainers.needs import Needs
from trainers.pair import TINY, Metrics, Pair, PairConfig, not_above, present, seeded, spread
from trainers.towers import at_least_float32, unit
from trainers.vcop import C3d

LAYERS: dict[str, str] = {"conv3": "conv3x", "conv4": "conv4x", "conv5": "conv5x", "pool": ""}
SHORT = 1.28  # seconds of `audio=1.2s` and `raw`: 256 rows at the source's hop of 5 ms
SHORT_FRONT_ENDS: dict[str, str] = {"avcl-mel256": "avcl-mel256-5ms"}  # of `audio=1.2s`; any other stays as it is


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's best with R3D; networks, clip and optimiser are `pair.PairConfig`'s, which is S1's section 3.2."""

    audio: Literal["whole", "1.2s", "raw"] = "whole"  # [S1] Table 1: whole mel-spectrogram 75.6, 1.2 s 72.1, raw 50.2
    shared: bool = False  # [S1] Table 1: True is its row of one model, 60.5
    amfm: bool = True  # [S1] section 2.2; False: Table 3, 73.5
    amfm_dropout: float = 0.0  # [ours] between its two layers; [S1] 0.7 is the classifier's
    gate_bias: float = 1.0  # [ours] b_e at the start: an open gate. At 0 a ReLU shuts half of the features at once
    cgra_layers: str = "pool"  # [S1] Table 2: none, conv3, conv4, conv5, pool (75.6), conv5+pool
    center: bool = False  # [S1] eq. 6 centres nothing; True: Barlow Twins'
    off_diagonal: float = 0.005  # [S1] lambda of eq. 5
    weight_cor: float = 0.9  # [S1] lambda_cor of eq. 11, Table 3
    weight_self: float = 0.1  # [S1] lambda_self of eq. 11; 0: without SelfCL
    temperature: float = 0.1  # [ours] tau of eq. 8; the paper gives none
    reduction: Literal["sum", "mean"] = "sum"  # [S1] eqs. 7 and 9; mean: divided by the batch [ours]

    def problems(self) -> list[str]:
        wrong = super().problems() + not_above(self, 0, "temperature")
        wrong += [
            f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}"
            for name, allowed in (("audio", ("whole", "1.2s", "raw")), ("reduction", ("sum", "mean")))
            if getattr(self, name) not in allowed
        ]
        unknown = [x for x in self.cgra_layers.split("+") if x not in LAYERS]
        if unknown and self.cgra_layers != "none":
            wrong.append(f"cgra_layers {self.cgra_layers!r}: none, or of {', '.join(LAYERS)}, joined by +")
        if len(set(self.layers)) < len(self.layers):
            wrong.append(f"cgra_layers {self.cgra_layers!r} names one twice")
        if min(self.weight_cor, self.weight_self, self.off_diagonal) < 0:
            wrong.append("weight_cor, weight_self and off_diagonal must not be negative")
        if not self.weight_self and not (self.weight_cor and self.layers):
            wrong.append("without weight_self, and without weight_cor or cgra_layers, there is no loss")
        if self.shared and (self.audio_net not in VIDEO or self.audio_net != self.video_net):
            wrong.append(f"shared networks of two names: {self.video_net} and {self.audio_net}")
        if not 0 <= self.amfm_dropout < 1:
            wrong.append(f"amfm_dropout {self.amfm_dropout} must lie in [0, 1)")
        return wrong

    @property
    def layers(self) -> tuple[str, ...]:
        """Of cgra_layers, in their order."""
        return () if self.cgra_layers == "none" else tuple(self.cgra_layers.split("+"))

    def settled(self) -> dict[str, Any]:
        """What `audio` decides (Table 1): of `1.2s` and `raw` the length of the sound and its front-end."""
        if self.audio == "whole":
            return {}
        front_end = "avcl-raw" if self.audio == "raw" else SHORT_FRONT_ENDS.get(self.front_end, self.front_end)
        return {"seconds": SHORT, "front_end": front_end}

    def needs(self) -> Needs:
        """Length and front-end of the sound follow `audio`."""
        heard: dict[str, Any] = {"seconds": self.seconds, "front_end": self.front_end} | self.settled()
        return Needs(self.frames, self.fps, self.size, **heard)


# the demo set's videos last 3 s; at the rivals' rate of 2e-3 gates shut for good and the loss doubles [ours]
PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "seconds": 3.0, "learning_rate": 5e-4})}


def clips(config: Config, sample_rate: int) -> RandomView:
    """Section 2.1: consecutive frames at a random place, and the whole sound; or the sound that begins with them."""
    return RandomView(whole_sound=config.audio == "whole")


# ---- losses ------------------------------------------------------------------------------------------------------


def cross_correlation(v_ND: Tensor, a_ND: Tensor, center: bool = False) -> Tensor:
    """Eq. 6: C_ij = sum_b v_i^b a_j^b / (sqrt(sum_b (v_i^b)^2) sqrt(sum_b (a_j^b)^2)): (D, D)."""
    if center:
        v_ND, a_ND = v_ND - v_ND.mean(0), a_ND - a_ND.mean(0)
    return F.normalize(v_ND, dim=0, eps=1e-4).T @ F.normalize(a_ND, dim=0, eps=1e-4)


def alignment(correlation_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5, its two sums: over i of (1 - C_ii)^2, and over i != j of C_ij^2 (to be weighed by lambda)."""
    diagonal = correlation_DD.diagonal()
    return (1 - diagonal).square().sum(), correlation_DD.square().sum() - diagonal.square().sum()


def self_contrast(x_ND: Tensor, y_ND: Tensor, temperature: float) -> Tensor:
    """Eq. 7 (x sight, y sound) or 9 (exchanged) before its sum over i, with h of eq. 8: (N,).

    - log h(x_i, y_i) / (sum_j h(x_i, y_j) + sum_{j != i} h(x_i, x_j)),  h(p, q) = exp(cos(p, q) / t).
    """
    x, y = unit(x_ND), unit(y_ND)
    own = (x @ x.T / temperature).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -torch.inf)
    score = torch.cat([x @ y.T / temperature, own], 1)
    return torch.logsumexp(score, 1) - score.diagonal()


# ---- the method --------------------------------------------------------------------------------------------------


class Amfm(nn.Module):
    """Attention based multi-modal fusion: (n, D) and (n, D) -> both, gated by what both say together."""

    def __init__(self, dim: int, dropout: float = 0.0, gate_bias: float = 1.0) -> None:
        super().__init__()
        self.squeeze = nn.Linear(2 * dim, dim)  # c_u is half the sum of the two widths
        self.dropout = nn.Dropout(dropout)
        self.excite = nn.Linear(dim, dim)
        nn.init.constant_(self.excite.bias, gate_bias)

    def gate(self, v_nD: Tensor, a_nD: Tensor) -> Tensor:
        """Eqs. 1, 2 and the ReLU of 3, 4: Z = W_s [v, a] + b_s, E = W_e Z + b_e, sigma(E): (n, D), at least 0."""
        return F.relu(self.excite(self.dropout(self.squeeze(torch.cat([v_nD, a_nD], 1)))))

    def forward(self, v_nD: Tensor, a_nD: Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. 3, 4: f_v = sigma(E) * v, f_a = sigma(E) * a."""
        gate = self.gate(v_nD, a_nD)
        return gate * v_nD, gate * a_nD


class _Tapped(nn.Module):
    """An encoder that also gives the averages of some of its maps, side by side, its own pooled features last."""

    def __init__(self, net: Encoder, maps: tuple[str, ...], dim: int) -> None:
        super().__init__()
        self.net, self.maps, self.dim = net, maps, dim

    def forward(self, x: Tensor) -> Tensor:
        found = self.net.forward_blocks(x)
        last = found["conv5x"].flatten(2)
        pooled = last.amax(2) if self.net.pool == "max" else last.mean(2)
        return torch.cat([*(found[name].flatten(2).mean(2) for name in self.maps), pooled], 1)


def _channels(net: Encoder, name: str) -> int:
    """Of a map: a quarter or half of the last's, where no class says otherwise (C3D)."""
    part = {"conv3x": 2, "conv4x": 1, "conv5x": 1} if isinstance(net, C3d) else {"conv3x": 4, "conv4x": 2, "conv5x": 1}
    return net.dim // part[name]


class Avcl(Pair):
    """Two networks (or one), AMFM. No state beside the weights. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config, config.needs())
        if config.shared:
            # one network under one name: registered twice, a checkpoint would hold it twice
            del self.audio
            self.__dict__["audio"] = self.video
        self.maps = tuple(LAYERS[layer] for layer in config.layers if layer != "pool")
        self.dims = tuple(_channels(self.video, name) for name in (*self.maps, "conv5x"))
        other = tuple(_channels(self.audio, name) for name in (*self.maps, "conv5x"))
        if self.dims != other:
            raise UsageError(
                f"{config.video_net} has {self.dims} features, {config.audio_net} {other}",
                "one excitation gates both, and CGRA pairs them one by one",
                "take networks of one family",
            )
        with seeded(config.seed, 1):
            self.amfm = Amfm(self.video.dim, config.amfm_dropout, config.gate_bias) if config.amfm else None
        self.video_head = self.audio_head = nn.Identity()

    def fuse(self, v_nD: Tensor, a_nD: Tensor) -> tuple[Tensor, Tensor]:
        """(f_v, f_a); without AMFM the features as they are."""
        return (v_nD, a_nD) if self.amfm is None else self.amfm(v_nD, a_nD)

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Eq. 11 of the whole global batch, on every rank (`gather_with_grad` says why that is right)."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        v_parts, a_parts = self._tapped(self.video, video, both_B), self._tapped(self.audio, audio, both_B)
        with torch.autocast(video.device.type, enabled=False):
            v_nD, a_nD = v_parts.pop(), a_parts.pop()
            f_v, f_a = (gather_with_grad(x) for x in self.fuse(v_nD, a_nD))
            pairs = {name: (gather_with_grad(v), gather_with_grad(a))
                     for name, v, a in zip(self.maps, v_parts, a_parts, strict=True)}  # fmt: skip
            if "pool" in self.config.layers:
                pairs["pool"] = (f_v, f_a)
            return self._loss(f_v, f_a, list(pairs.values()))

    def _tapped(self, net: Encoder, x: Tensor, here_B: Tensor) -> list[Tensor]:
        """(n, D) of each tapped map, and of the pool at the end."""
        return list(present([_Tapped(net, self.maps, sum(self.dims))], x, here_B).split(self.dims, 1))

    def _loss(self, f_v: Tensor, f_a: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Metrics]:
        c, nothing = self.config, (f_v.sum() + f_a.sum()) * 0  # what no loss reaches still gets the gradient DDP awaits
        on, off, contrast = nothing, nothing, nothing
        if len(f_v):
            for v, a in pairs:
                one, other = alignment(cross_correlation(v, a, c.center))
                on, off = on + one, off + other
            if c.weight_self:
                each = self_contrast(f_v, f_a, c.temperature) + self_contrast(f_a, f_v, c.temperature)  # eq. 10
                contrast = each.sum() if c.reduction == "sum" else each.mean()
        else:
            nothing = nothing + sum(x.sum() * 0 for pair in pairs for x in pair)
        loss = c.weight_cor * (on + c.off_diagonal * off) + c.weight_self * contrast + nothing
        metrics: Metrics = {
            "loss": loss.detach(),
            "on_diagonal": on.detach(),
            "off_diagonal": off.detach(),
            "self_contrast": contrast.detach(),
            "feature_std_video": spread(f_v),
            "feature_std_audio": spread(f_a),
        }
        if self.amfm is not None:  # where the gate is shut, the feature is zero
            metrics["gate_open"] = (f_v.detach() != 0).double().sum() / max(f_v.numel(), 1)
        return loss, metrics

    def embed(
        self, video: Tensor | None = None, audio: Tensor | None = None, sound_share: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `Pair.embed`, before fusion; with both also 'joint-trunk' = [f_v, f_a] and 'joint', its direction."""
        out = super().embed(video, audio, sound_share)
        if video is not None and audio is not None:
            both = torch.cat([at_least_float32(x) for x in self.fuse(out["video-trunk"], out["audio-trunk"])], 1)
            out |= {"joint-trunk": both, "joint": unit(both)}
        return out
