"""Where a preview looks in one video: the seconds it chooses, in order, with the attention that each second got.

    keep(preview, given, part, file)                   # the preview with what it was trained on, as one file
    look(store, kept(file), "train/a/0001.mp4", 5)     # -> {"seconds": [7, 6, ...], "attention": [...], ...}

`attention` is the mean of the trained steps' weights, 1 over all seconds of the video; the
choice masks what was chosen, step by step, so that its order is not always that of the attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from avstore.errors import ConflictError, CorruptError, NotFoundError, did_you_mean
from trainers import preview
from trainers.preview import Preview

if TYPE_CHECKING:
    from avstore.store import Store
    from benchmarks.moments import Given


def keep(looks: Preview, given: Given, part: str, file: Path) -> Path:
    """Writes the preview with the run, towers, classes and part that it is of. MachineError where it cannot."""
    from avstore.durable import machine_errors

    about = {"run": given.run, "towers": list(given.towers), "classes": list(given.probed.classes), "part": part}
    with machine_errors(file):
        looks.save(file, about)
    return file


def kept(file: Path) -> Preview:
    """What `keep` wrote. NotFoundError; CorruptError for another file."""
    looks = preview.load(file)
    if not {"run", "towers", "classes", "part"} <= set(looks.about):
        raise CorruptError(f"{file} does not say of which run's moments it is", "", "bench untrimmed --keep writes one")
    return looks


def look(store: Store, looks: Preview, key: str, budget: int) -> dict[str, Any]:
    """One video of the store: seconds int, in order of choice; attention of each of `moments` seconds; `label` as the
    store has it, `told` and `probability`: the class that the chosen moments alone say.

    NotFoundError where there is no such video or it has no moment, ConflictError where the run was embedded anew with
    other widths, UsageError for a budget below 1.
    """
    about = looks.about
    by_key = {store.key(int(n)): int(n) for n in store.numbers}
    if key not in by_key:
        raise NotFoundError(f"{store.path} has no video {key}", did_you_mean(key, by_key), "avstore ls lists them")
    number = by_key[key]
    found = preview.moments(store, about["run"], [number], about["towers"]).get(number)
    if found is None:
        raise NotFoundError(
            f"{key} has no moment in the embeddings of {about['run']}", "", f"avstore embed RUN {store.path}"
        )
    if found.features.shape[1] != sum(looks.widths):
        raise ConflictError(
            f"the embeddings of {about['run']} are of {found.features.shape[1]} numbers, the preview knows "
            f"{sum(looks.widths)}",
            "they were made by another run",
            "train the preview anew: bench untrimmed --keep",
        )
    chosen = looks.choose(found.features, budget)
    weights = looks.attention(found.features).mean(0)
    says = looks.scores(found.features, chosen)
    label = store.column("label", [number])[0] if "label" in store.columns else None
    return {
        "key": key,
        "run": about["run"],
        "seconds": found.seconds[chosen].tolist(),
        "attention": [round(float(w), 6) for w in weights],
        "moments": found.seconds.tolist(),
        "label": None if label is None else str(label),
        "told": about["classes"][int(says.argmax())],
        "probability": round(float(says.max()), 6),
        "trained_on": about["part"],
    }


def lines(found: dict[str, Any], wide: int = 40) -> list[str]:
    """The look as text: a line for each second, its attention as a bar, and the order in which it was chosen."""
    most = max(found["attention"]) or 1.0
    order = {s: i + 1 for i, s in enumerate(found["seconds"])}
    head = f"{found['key']}: {found['run']} looks at {', '.join(f'{s} s' for s in found['seconds'])}"
    says = f"says {found['told']} ({found['probability']:.2f}), the store {found['label'] or 'nothing'}"
    out = [f"{head}; {says}"]
    for second, weight in zip(found["moments"], found["attention"], strict=True):
        bar = "#" * round(wide * weight / most)
        at = f"  <- {order[second]}" if second in order else ""
        out.append(f"{second:>5} s  {weight:.3f}  {bar}{at}")
    return out
