"""Recipes of front-ends: plain data that says how a waveform becomes a spectrogram, each with a hash over all of it.

How it is computed: `frontends.py`. Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from fractions import Fraction

from avstore.errors import UsageError, did_you_mean

_EPS32 = 1.1920928955078125e-07  # float32's, which BYOL-A's and CrissCross' code add to the power before the logarithm


@dataclass(frozen=True)
class FrontEnd:
    """A recipe. Frequencies in Hz, lengths in samples at `sample_rate`; the waveform is in [-1, 1) (int16 / 32768).

    power = |STFT|^2, without window normalisation; row r is centred at sample r * hop (pad 'reflect' or 'constant') or
    starts there (pad 'none', zeros after the end). Bins by `scale`: 'linear' bin 0 kept and the others averaged in
    groups of `average`; 'mel' a filter bank; 'mel-warp' the power read off, by linear interpolation, at `bins`
    frequencies equally spaced in mel. log 'ln': ln(power + eps); 'db': 10 log10(power + eps). Scale 'raw' (log 'none')
    transforms nothing: row r is the `bins` = n_fft samples from r * hop on, in [-1, 1), at read time only.
    """

    name: str
    sample_rate: int
    n_fft: int
    window_length: int
    hop: int
    bins: int
    scale: str = "mel"
    average: int = 1
    mel: str = "slaney"  # formula of the mel scale: 'slaney' or 'htk'
    mel_norm: str = "slaney"  # of unit 'slaney' area; 'none': unit peak; 'bins': that, edges rounded down to FFT bins
    fmin: float = 0.0
    fmax: float = 0.0
    window: str = "hann"  # periodic Hann, or 'boxcar'
    pad: str = "reflect"
    preemphasis: float = 0.0
    log: str = "ln"
    eps: float = _EPS32
    clip_floor_db: float | None = None  # values further below the clip's maximum are raised to it
    resample: str = "sinc-kaiser-64"  # avstore.resample.FILTER; a test holds them together
    version: int = 1  # of the code that carries the recipe out

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 of all parameters in canonical JSON."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def rate(self) -> Fraction:
        """Rows per second, exactly."""
        return Fraction(self.sample_rate, self.hop)

    @property
    def storable(self) -> bool:
        """Whether a store can keep the rows: whole numbers of them in a second, as every array on the tape needs, and
        not raw ones, which are the waveform over again. Else read time only."""
        return self.rate.denominator == 1 and self.scale != "raw"

    @property
    def rows_per_second(self) -> int:
        """Rows per second of the stored array. UsageError for a recipe that can only be computed at read time."""
        if not self.storable:
            raise UsageError(
                f"front-end {self.name} cannot be stored",
                "its rows are the waveform, which is stored"
                if self.scale == "raw"
                else f"it has {float(self.rate):.3f} rows per second, and arrays of a store have a whole number",
                "leave it out: it is computed from the waveform at read time",
            )
        return int(self.rate)

    @property
    def edge_rows(self) -> int:
        """Rows at each end in which a slice of a longer spectrogram differs from the clip's own."""
        return math.ceil(self.n_fft / 2 / self.hop) if self.pad != "none" else math.ceil(self.n_fft / self.hop)

    def rows(self, samples: int, sample_rate: int) -> int:
        """Rows of a window: exactly rate * duration rounded down (a centred STFT's last frame is dropped); recipes with
        another rate round up, as their published shapes do (199 rows for the 198.3 of one second)."""
        exact = samples * self.rate / sample_rate
        return math.floor(exact) if self.rate.denominator == 1 else math.ceil(exact)

    @property
    def floor(self) -> float:
        """Value of digital silence: the logarithm of eps, the least there is; of raw rows 0."""
        if self.scale == "raw":
            return 0.0
        return 10 * math.log10(self.eps) if self.log == "db" else math.log(self.eps)


FRONT_ENDS: dict[str, FrontEnd] = {
    recipe.name: recipe
    for recipe in (
        # AVID, AVID-CMA, the temporal model: 1024-point STFT, 513 bins halved to 257; 100 dB below the clip's maximum.
        # eps is ours: -100 dB, the floor that librosa's power_to_db has, added here so that gain stays exact.
        FrontEnd(
            "avid-linear257",
            24000,
            1024,
            1024,
            240,
            257,
            scale="linear",
            average=2,
            log="db",
            eps=1e-10,
            clip_floor_db=100.0,
        ),
        # AVID's small ablation: "256" -> 512 points, 50 rows/s, 100x129 for 2 s.
        FrontEnd(
            "avid-linear129",
            24000,
            512,
            512,
            480,
            129,
            scale="linear",
            average=2,
            log="db",
            eps=1e-10,
            clip_floor_db=100.0,
        ),
        # CrissCross: 80 mels over 0-8 kHz, Slaney's scale and area norm (its code's librosa.filters.mel). Centred: 2 s
        # are 201 frames there; the 201st is the row after the clip and is dropped, as AVID drops its own (`rows`).
        FrontEnd("crisscross-mel80", 16000, 1024, 1024, 160, 80, fmax=8000.0),
        # SeLaVi and GDT: log filter bank of 20-ms windows, not centred, pre-emphasis 0.97, rectangular window, HTK
        # triangles of unit peak between the bins floor((n_fft + 1) f / rate): what python_speech_features, their
        # package, does by default, but for its 1/n_fft of the power and its rows. It has 99 in a second, whole windows
        # only; here the 100th is the last half window and zeros, as every clip has rate * duration rows.
        FrontEnd(
            "gdt-fbank40",
            24000,
            1024,
            480,
            240,
            40,
            mel="htk",
            mel_norm="bins",
            fmax=12000.0,
            window="boxcar",
            pad="none",
            preemphasis=0.97,
            eps=1e-10,
        ),
        # AVCL: 256 linear bins of EPIC-Fusion's code, "mel-scaled". 256 triangles over 256 bins would leave most low
        # bands empty, so the bins are read off at mel-spaced frequencies (ours). Resized to 256 columns by the trainer.
        FrontEnd(
            "avcl-mel256",
            24000,
            511,
            240,
            240,
            256,
            scale="mel-warp",
            mel="htk",
            mel_norm="none",
            fmax=12000.0,
            eps=1e-6,
        ),
        # AVCL Table 1, "1.2s Mel-spectrogram": the same at EPIC-Fusion's hop of 5 ms, 256 rows in 1.28 s.
        FrontEnd(
            "avcl-mel256-5ms",
            24000,
            511,
            240,
            120,
            256,
            scale="mel-warp",
            mel="htk",
            mel_norm="none",
            fmax=12000.0,
            eps=1e-6,
        ),
        # AVCL Table 1, "Raw audio": how a waveform becomes its network's image is not said. Rows of 10 ms (ours), the
        # window and hop of its spectrograms.
        FrontEnd(
            "avcl-raw",
            24000,
            240,
            240,
            240,
            240,
            scale="raw",
            window="boxcar",
            pad="none",
            log="none",
            eps=0.0,
        ),
        # Listen-to-Look: about 101 rows of 40 mels a second; the rest is ours (25-ms windows, else as CrissCross).
        FrontEnd("l2l-mel40", 16000, 512, 400, 160, 40, fmax=8000.0),
        # L3 of the marl group: 512 points, hop 242 at 48 kHz: 199 rows in 1 s, no whole number, so read time only.
        # Zero padding; kapre's decibels, 80 dB of range below the clip's maximum (ours: power, maximum not subtracted).
        FrontEnd(
            "l3-linear257",
            48000,
            512,
            512,
            242,
            257,
            scale="linear",
            pad="constant",
            log="db",
            eps=1e-10,
            clip_floor_db=80.0,
        ),
    )
}


def named(name: str | FrontEnd) -> FrontEnd:
    """A recipe by its name; a FrontEnd is returned as it is. UsageError for an unknown name."""
    if isinstance(name, FrontEnd):
        return name
    if name not in FRONT_ENDS:
        raise UsageError(
            f"no front-end is called {name!r}", did_you_mean(name, FRONT_ENDS), f"there are {', '.join(FRONT_ENDS)}"
        )
    return FRONT_ENDS[name]
