"""The part `compiled` of `bench step`: whole training steps as they are, compiled, and (on CUDA) in CUDA graphs.

The same batch from the same weights; how far the losses lie apart is in the table, of the first step (one forward pass
through the same weights) and of all (rounding grows with training), and what the first step cost, which compiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from avstore.errors import ExtraMissingError
from benchmarks.table import Table
from trainers.data import Fed

if TYPE_CHECKING:
    from benchmarks.step import _Asked

COLUMNS = ("compile", "clips/s", "times", "first step s", "losses apart", "note")


def compiled(asked: _Asked) -> Table:
    """Clips a second of whole steps, by `compile=`; `times` those of off; `losses apart`: the largest relative
    difference to off over all steps; `first loss apart`, shown in the note: that of the first."""
    from benchmarks.step import _in_turn, _machine, _trainer, _wait, synthetic

    config, sizes, device = asked.config, asked.sizes, asked.device
    rows = max(sizes.rows, config.loop.batch)
    fed = Fed(synthetic(config, config.loop.batch, rows, device), 0.0, 0.0, config.loop.batch)
    kinds: dict[str, Callable[[], Any]] = {}
    losses: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    table: list[dict[str, Any]] = []

    def endless() -> Iterator[Fed]:
        while True:
            yield fed

    for how in ("off", "compile", "graphs"):
        if how == "graphs" and device.type != "cuda":
            table.append({"compile": how, "note": "not on a CPU"})
            continue
        try:
            trainer = _trainer(config.replace(compile=how, accumulate=1, steps=10**6), rows, device)
        except ExtraMissingError as e:
            table.append({"compile": how, "note": f"not measured: {e.why}"})
            continue

        def step(how: str = how, trainer: Any = trainer, feed: Iterator[Fed] = endless()) -> None:  # noqa: B008
            losses.setdefault(how, []).append(float(trainer.step(feed)["loss"]))

        asked.told("compiling" if how != "off" else "first step", len(kinds), 3)
        began = time.perf_counter()
        step()
        _wait(device)
        first[how] = time.perf_counter() - began
        step()  # graphs record at the second pass
        kinds[how] = step
    times = _in_turn(kinds, sizes.rounds, sizes.steps, device, asked.told, "compiled")
    rated = []
    for how, seconds in times.items():
        apart = [abs(a / b - 1) for a, b in zip(losses[how], losses["off"], strict=True)]
        ratio = statistics.median(b / s for s, b in zip(seconds, times["off"], strict=True))
        note = "" if how == "off" else f"apart: {apart[0]:.2g} the first loss, {max(apart):.2g} the worst"
        rated.append({"compile": how, "clips/s": config.loop.batch / statistics.median(seconds), "times": ratio,
                      "first step s": first[how], "first loss apart": apart[0], "losses apart": max(apart),
                      "note": note})  # fmt: skip
    return Table(
        f"{config.name} {config.preset}: steps of {config.loop.batch} clips, compiled", COLUMNS, [*rated, *table],
        (f"{_machine(device)}, {config.loop.precision}",
         f"{sizes.rounds} rounds of {sizes.steps} steps in turn; medians; losses of {len(losses['off'])} steps, "
         f"the last {losses['off'][-1]:.4g}"),
    )  # fmt: skip
