"""What a training tells while it works: one kind of event, for a progress display or a log. No printing here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """What a run tells while it works. kind: 'stage' (another run begins), 'note' (one line to read), 'start', 'step'
    (values: the line of metrics.jsonl), 'checkpoint', 'finished', 'nothing-to-do'."""

    kind: str
    method: str
    step: int = 0
    total: int = 0
    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


def silent(event: Event) -> None:
    """Tells nobody."""
