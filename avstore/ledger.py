"""The ledger of a store: what is planned, what is committed, and how each key stands. Read from the plans and records.

The status of a key is that of its latest number that has a record. (`avstore.catalogue` is the readers' view, with
columns in numpy; this one is small, and an ingest updates it as it goes.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from avstore.plan import known_seconds, slot_seconds
from avstore.records import Plan, Record, Task, read_plans, record_path

ROUNDS = 4  # times that a video may turn out longer than planned


@dataclass
class Known:
    """A key: its latest number (`plan`, index in it), and the outcome of its latest committed number."""

    plan: Plan
    index: int
    committed: bool = False  # the latest number has a record
    status: str = "pending"
    reason: str | None = None
    message: str | None = None
    longer: int = 0  # how many of its numbers ended as longer_than_planned

    @property
    def size(self) -> int:
        return self.plan.bytes[self.index]

    @property
    def path(self) -> str:
        return self.plan.path[self.index]

    def columns(self) -> dict[str, str | None]:
        return {name: values[self.index] for name, values in self.plan.columns.items()}

    def true_seconds(self) -> Fraction | None:
        """The length with which to plan it again, where it was longer than planned; None where that is no use."""
        if not self.committed or self.reason != "longer_than_planned" or self.longer > ROUNDS:
            return None
        seconds = known_seconds(self.message)
        if seconds is None or slot_seconds(seconds) <= self.plan.seconds[self.index]:
            return None
        return seconds


class Ledger:
    """Plans, the tasks that have a record, and every key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plans: list[Plan] = []
        self.committed: set[int] = set()
        self.known: dict[str, Known] = {}
        for plan in read_plans(root):
            self.add_plan(plan)
        here = {e.name for e in os.scandir(root / "commits")} if (root / "commits").is_dir() else set()
        for plan in self.plans:
            for task in plan.tasks:
                path = record_path(root, task.number)
                if path.name in here:
                    record = Record.read(path)
                    self.add_record(plan, task, record.fields)

    @property
    def shards(self) -> int:
        return sum(p.shards for p in self.plans)

    def add_plan(self, plan: Plan) -> None:
        self.plans.append(plan)
        for i, key in enumerate(plan.key):
            known = self.known.get(key)
            if known is None:
                self.known[key] = Known(plan, i)
            else:
                known.plan, known.index, known.committed = plan, i, False

    def add_record(self, plan: Plan, task: Task, fields: dict[str, list[Any]]) -> None:
        """Notes the outcome of a task; tasks must come in the order of their numbers, per key."""
        self.committed.add(task.number)
        for offset, number in enumerate(task.videos):
            i = number - plan.first_video
            known = self.known[plan.key[i]]
            known.status, known.reason = fields["status"][offset], fields["reason"][offset]
            known.message = fields["message"][offset]
            known.committed = known.plan is plan and known.index == i
            known.longer += known.reason == "longer_than_planned"

    def pending(self) -> list[tuple[Plan, Task]]:
        """Tasks without a record, in order."""
        return [(p, t) for p in self.plans for t in p.tasks if t.number not in self.committed]
