"""What a bench printed goes into the store's logs too, for `avstore report`; one line says where it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avstore.errors import AvstoreError
from cli import console

if TYPE_CHECKING:
    from avstore.store import Store
    from benchmarks.table import Table

SHOWN_ONLY = frozenset({"store", "run", "json", "markdown", "html", "device", "work", "keep", "curve",
                        "batch_size", "workers"})  # fmt: skip


def keep(store: Store, table: Table, bench: str, runs: Sequence[str], asked: Mapping[str, Any]) -> None:
    """Keeps `table`; asked: the command's arguments by name. Where the store cannot be written, a line says so."""
    from benchmarks.archive import archive

    options = {k: v for k, v in asked.items() if k not in SHOWN_ONLY and v is not None}
    try:
        archive(store, table, bench, runs, options)
    except AvstoreError as e:
        console.warn(f"the table is not kept for the report: {e.what}")
