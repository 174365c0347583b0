"""Figures of frozen features as the papers print them: rows beside ours for `bench svm` and `bench linear`.

    rows("svm", "ESC-50")                                  # labelled "published: ...", under `setting` what differs
    rows("linear", "UCF101", classifier="svm", frames=8)

Only what was measured in a comparable way stands beside a table: a figure names the classifier, frames or modality that
it belongs to, and `setting` says what its authors did otherwise. Trained on other and far more media than any run here.
Sources: the AVID workshop paper (Tables 1 and 2b), the CrissCross poster (Tables 1, 2 and 4), the report on
audio-focused learning (Tables 7.3 and 7.4), AVID's repository (its linear probes of Kinetics).

Not here: figures of fine-tuning (`finetune.py`), retrieval (`protocols.py`), summaries (`summarize.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from avstore.errors import UsageError, did_you_mean

Bench = Literal["svm", "linear"]
WORKSHOP = "as AVID's workshop paper prints it"
POSTER = "as CrissCross' poster prints it"
ORACLE = "C best on each test part; after CrissCross' code"  # methods.md 6.4
DENSE = "an FC layer, best epoch on the test part; after CrissCross' code"
UNTOLD = "its authors' protocol is not public"
REPORT = "as the report prints it: neither split nor metric is given"
TRAIN_MODE = "best block; the backbone's statistics move with the probe's videos (--train-mode)"
SUBSET = "100,000 videos of AudioSet, networks of 10 layers, best block"
ILLEGIBLE = "the cell is not legible in the copy at hand"


@dataclass(frozen=True)
class Figure:
    """top-1 in percent, None where it cannot be read; block of the best layer, or a, v, a + v. `classifier`, `frames`,
    `modality`: what a table must have for the figure to stand beside it; empty: any."""

    name: str
    value: float | None
    setting: str
    block: str = ""
    classifier: str = ""
    frames: int | None = None
    modality: str = ""


def _crisscross(values: tuple[float, float, float], setting: str, **asks: Any) -> tuple[Figure, ...]:
    sets = ("Kinetics-Sound", "Kinetics-400", "AudioSet")
    return tuple(Figure(f"CrissCross, {s}", v, setting, **asks) for s, v in zip(sets, values, strict=True))


def _video(values: tuple[float, float, float]) -> tuple[Figure, ...]:
    return _crisscross(values, UNTOLD, classifier="svm", frames=8, modality="v")


def _async(without: float, with_it: float, setting: str, **asks: Any) -> tuple[Figure, ...]:
    return (
        Figure("CrissCross without the asynchronous loss, Kinetics-400", without, setting, **asks),
        Figure("CrissCross with the asynchronous loss, Kinetics-400", with_it, setting, **asks),
    )


def _ccl(audio: float, image: float, both: float) -> tuple[Figure, ...]:
    setting = f"the student's own classifier; {REPORT}"
    return tuple(Figure(f"CCL, {t}", v, setting, modality="v")
                 for t, v in (("audio teacher", audio), ("image teacher", image), ("both teachers", both)))  # fmt: skip


FIGURES: Mapping[Bench, Mapping[str, tuple[Figure, ...]]] = {
    "svm": {
        "ESC-50": (
            Figure("random forest (Piczak)", 44.3, WORKSHOP),
            Figure("ConvNet (Piczak), no pre-training", 64.5, WORKSHOP),
            Figure("ConvRBM, no pre-training", 86.5, WORKSHOP),
            Figure("SoundNet, Flickr-SoundNet", 74.2, WORKSHOP),
            Figure("L3, Flickr-SoundNet", 79.3, WORKSHOP),
            Figure("AVTS, Kinetics-400", 76.7, WORKSHOP),
            Figure("XDC, Kinetics-400", 78.5, WORKSHOP),
            Figure("XDC, Kinetics-400", 78.0, POSTER),
            Figure("Cross-AVID, Kinetics-400", 77.6, "as its authors print it"),
            Figure("AVID, Kinetics-400", 79.1, POSTER),
            Figure("AVTS, AudioSet", 80.6, WORKSHOP),
            Figure("XDC, AudioSet", 85.8, WORKSHOP),
            Figure("XDC, AudioSet", 84.8, POSTER),
            Figure("Cross-AVID, AudioSet", 88.5, f"{ILLEGIBLE}: the text's +2.7 over XDC's 85.8"),
            Figure("Cross-AVID, AudioSet", 89.2, f"{ILLEGIBLE}: the text's +2.7 over ConvRBM's 86.5"),
            Figure("AVID, AudioSet", 89.1, POSTER),
            Figure("Cross-AVID", 75.05, SUBSET, "conv5x"),
            Figure("Self-AVID", 72.64, SUBSET, "conv3x"),
            Figure("Joint-AVID", 71.77, SUBSET, "conv4x"),
            Figure("SSCL, stage I", 85.8, "as the report prints it; its pre-training set is not named"),
            Figure("SSCL, stage II", 88.3, "as the report prints it; its pre-training set is not named"),
            *_crisscross((82.8, 86.8, 90.5), ORACLE),
            *_async(78.5, 82.0, f"another set-up than CrissCross' 86.8, not told; {ORACLE}"),
        ),
        "DCASE": (
            Figure("SoundNet, Flickr-SoundNet", 88, WORKSHOP),
            Figure("L3, Flickr-SoundNet", 93, WORKSHOP),
            Figure("AVTS, Kinetics-400", 91, WORKSHOP),
            Figure("XDC, Kinetics-400", 91, POSTER),
            Figure("Cross-AVID, Kinetics-400", None, ILLEGIBLE),
            Figure("AVID, Kinetics-400", 93, POSTER),
            Figure("AVTS, AudioSet", 93, WORKSHOP),
            Figure("XDC, AudioSet", 95, POSTER),
            Figure("Cross-AVID, AudioSet", 96, f"{ILLEGIBLE}: the text's +3 over AVTS' 93"),
            Figure("AVID, AudioSet", 96, POSTER),
            Figure("SSCL, stage I", 91.0, "as the report prints it; its pre-training set is not named"),
            Figure("SSCL, stage II", 93.0, "as the report prints it; its pre-training set is not named"),
            *_crisscross((93.0, 96.0, 97.0), DENSE),
        ),
    },
    "linear": {
        "UCF101": (
            *_video((78.1, 83.9, 87.7)),
            *_async(75.8, 79.9, f"another set-up than CrissCross' 83.9, not told; {UNTOLD}", classifier="svm", frames=8,
                    modality="v"),
        ),
        "HMDB51": _video((45.7, 50.0, 56.2)),
        "Kinetics-400": (
            Figure("AVID, Kinetics-400", 43.0, TRAIN_MODE, classifier="adam", modality="v"),
            Figure("AVID-CMA, Kinetics-400", 44.4, TRAIN_MODE, classifier="adam", modality="v"),
            Figure("AVID, AudioSet", 46.5, TRAIN_MODE, classifier="adam", modality="v"),
            Figure("AVID-CMA, AudioSet", 48.9, TRAIN_MODE, classifier="adam", modality="v"),
            Figure("Cross-AVID", 39.95, SUBSET, "conv5x", classifier="adam", modality="v"),
            Figure("Self-AVID", 32.08, SUBSET, "conv5x", classifier="adam", modality="v"),
            Figure("Joint-AVID", 33.04, SUBSET, "conv5x", classifier="adam", modality="v"),
            *_crisscross((39.0, 44.5, 50.1), UNTOLD, modality="v"),
        ),
        "Kinetics-Sounds": (
            *_async(43.2, 47.1, UNTOLD, block="a", modality="av"),
            *_async(53.3, 55.7, UNTOLD, block="v", modality="av"),
            *_async(65.0, 66.7, UNTOLD, block="a + v", modality="av"),
        ),
        "UCF51": _ccl(64.9, 69.1, 70.0),
        "ActivityNet": _ccl(36.5, 46.3, 47.3),
    },
}  # fmt: skip


def names(bench: Bench) -> tuple[str, ...]:
    """The sets of which there are figures."""
    return tuple(FIGURES[bench])


def rows(
    bench: Bench, name: str, *, classifier: str = "", frames: int | None = None, modality: str = ""
) -> list[dict[str, Any]]:
    """The figures on a set that belong beside a table of this classifier, modality and frames of a clip, as rows.

    UsageError for another set, with the closest one, and for a set whose figures all belong elsewhere, with where.
    """
    if name not in FIGURES[bench]:
        raise UsageError(
            f"no published figures of {name!r}", did_you_mean(name, FIGURES[bench]), f"--published {names(bench)[0]}"
        )
    out = []
    for f in FIGURES[bench][name]:
        asked = ((f.classifier, classifier), (f.modality, modality), (f.frames, frames))
        if all(not wanted or wanted == is_there for wanted, is_there in asked):
            value = None if f.value is None else round(f.value / 100, 4)
            row = {"features": f"published: {f.name}", "block": f.block, "top-1": value, "setting": f.setting}
            out.append(row)
    if not out:
        f = FIGURES[bench][name][0]
        told = [f"--{what} {value}" for what, value in
                (("modality", f.modality), ("classifier", f.classifier), ("frames", f.frames)) if value]  # fmt: skip
        raise UsageError(
            f"no figures of {name} were measured like this", "those there are would not compare", " ".join(told)
        )
    return out
