"""What the values of a split say: the one table of their words, for ingest, selections and benches alike.

    part_of("Validation")               # "validation"; None for a word that names no part

A folder named by one of these words is a split, not a label. Whoever is not of the training part is never pre-trained
on by default (`selection.py`). Which part a bench tests is said in `benchmarks/splits.py`.
"""

from __future__ import annotations

PARTS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "evaluation",  # the test part (AudioSet), but where there is one besides, a validation part
    "evaluation": "evaluation",
    "unused": "unused",  # HMDB51: in neither part of a split
}


def part_of(word: object) -> str | None:
    """'train', 'test', 'validation', 'evaluation' or 'unused', whatever the case; None for any other word and none."""
    return None if word is None else PARTS.get(str(word).strip().lower())


def held_out(word: object) -> bool:
    """Whether videos of this split are left out of pre-training."""
    return part_of(word) not in (None, "train")
