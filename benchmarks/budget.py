"""A budget: how long the slow parts of a page may take, and what was left out because of it.

    budget = Budget(120)
    if budget.allows(seconds_of_the_last_one):
        ...
    else:
        budget.leave("saliency of 3 clips", "the time was over", "avstore explain STORE --run RUN")
    budget.section()                            # HTML: what is not on the page, why, and the command that makes it

The bound is checked between parts: one that has begun is finished. Not here: the parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from avstore.errors import UsageError
from benchmarks import page
from benchmarks.table import Table


class Budget:
    """`seconds` of wall time from now on; UsageError for less than 0. clock: seconds, rising."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not seconds >= 0:
            raise UsageError(f"{seconds} seconds for the slow parts", "0 or more", "--within 120")
        self.seconds = seconds
        self.left_out: list[tuple[str, str, str]] = []
        self._clock = clock
        self._began = clock()

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    def allows(self, cost: float = 0.0) -> bool:
        """Whether something that takes about `cost` seconds still ends in time."""
        return self.spent + cost < self.seconds

    def leave(self, what: str, why: str, command: str = "") -> None:
        """Notes what is not on the page."""
        self.left_out.append((what, why, command))

    def section(self) -> str:
        """HTML of what was left out; "" where nothing was."""
        if not self.left_out:
            return ""
        rows = [{"what": a, "why": b, "command": c} for a, b, c in self.left_out]
        columns = ("what", "why", "command")
        return page.section("Left out", page.table(Table("Not on this page", columns, rows)))
