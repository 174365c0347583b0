"""Plans and records: what is written is what is read; what contradicts itself is told, with the file's name."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import avstore
from avstore.durable import canonical_json, sealed_json
from avstore.errors import CorruptError
from avstore.records import FIELDS, Plan, Record, Task, fraction, plan_path, read_plans, record_path, video_key
from avstore.sources import encode_path
from tests.tiny_store import Tiny, make_store

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60)
@given(keys=st.lists(text, min_size=1, max_size=6), column=st.lists(st.none() | text, min_size=6, max_size=6))
def test_a_plan_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], column: list[str | None]
) -> None:
    n = len(keys)
    plan = Plan(1, "f" * 16, 0, 0, 2, [Task(0, 0, 1, 0, n - 1), Task(1, 1, 1, n - 1, 1)], keys, keys, ["1/3"] * n,
                [None] * n, list(range(n)), [1] * n, [5] * n, [None] * n, {"label": column[:n]})  # fmt: skip
    file = tmp_path_factory.mktemp("plan") / "0001.json"
    file.write_bytes(plan.to_bytes())
    assert Plan.read(file) == plan and Plan.read(file).to_bytes() == plan.to_bytes()
    assert plan.to_bytes() == canonical_json(json.loads(plan.to_bytes())) and len(plan) == n


def test_a_record_fills_in_what_a_failed_video_lacks(tmp_path: Path) -> None:
    task = Task(3, 0, 1, 10, 2)
    record = Record.of(task, "f", {"av": "1"}, [{"status": "ok", "frames": 5}, {"reason": "unreadable"}])
    assert record.fields["status"] == ["ok", "failed"] and record.fields["frames"] == [5, 0]
    assert set(record.fields) == set(FIELDS) and list(task.videos) == [10, 11]
    file = tmp_path / "000003.json"
    file.write_bytes(record.to_bytes())
    assert Record.read(file) == record
    with pytest.raises(ValueError, match="has 2 videos, got facts of 1"):
        Record.of(task, "f", {}, [{}])
    with pytest.raises(ValueError, match="unknown record fields"):
        Record.of(task, "f", {}, [{"frame": 1}, {}])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "s.zarr", [Tiny(1), Tiny(2)])


def change(file: Path, **values: Any) -> None:
    value = {**json.loads(file.read_bytes()), **values}
    file.write_bytes(sealed_json({k: v for k, v in value.items() if v is not ...}))


@pytest.mark.parametrize(
    "values",
    [{"format": 2}, {"key": ["a"]}, {"tasks": [[0, 0, 1, 0, 1]]}, {"tasks": [[0]]}, {"place": ...}, {"more": 1},
     {"columns": {"label": []}}, {"key": None}, {"columns": []}],
)  # fmt: skip
def test_a_damaged_plan_is_named(store: Path, values: dict[str, Any]) -> None:
    change(plan_path(store, 1), **values)
    with pytest.raises(CorruptError, match=r"plans/0001\.json is damaged"):
        avstore.open(store)


@pytest.mark.parametrize(
    "values", [{"format": 2}, {"status": ["ok"]}, {"frames": ...}, {"more": [1, 2]}, {"samples": 3}]
)
def test_a_damaged_record_is_named(store: Path, values: dict[str, Any]) -> None:
    change(record_path(store, 0), **values)
    with pytest.raises(CorruptError, match=r"commits/000000\.json is damaged"):
        avstore.open(store)


@pytest.mark.parametrize("values", [{"task": 1}, {"fingerprint": "0" * 16}])
def test_a_record_of_another_store_is_named(store: Path, values: dict[str, Any]) -> None:
    change(record_path(store, 0), **values)
    with pytest.raises(CorruptError, match=r"does not belong to task 0 of this store"):
        avstore.open(store)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"'])
def test_bytes_that_are_no_plan_or_record(store: Path, data: bytes) -> None:
    for file in (plan_path(store, 1), record_path(store, 0)):
        before = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(CorruptError, match=file.name):
            avstore.open(store)
        file.write_bytes(before)
    assert len(avstore.open(store)) == 2


def test_a_plan_that_is_missing_between_others(store: Path) -> None:
    plan_path(store, 1).rename(plan_path(store, 2))
    with pytest.raises(CorruptError, match="does not follow the plan before it"):
        read_plans(store)


def test_without_a_record_nothing_is_committed(store: Path) -> None:
    record_path(store, 0).unlink()
    opened = avstore.open(store)
    assert len(opened) == 0 and opened.pending_tasks == 1 and opened[0].status == "pending"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
       st.none() | st.fractions(min_value=0, max_value=9, max_denominator=60),
       st.none() | st.fractions(min_value=10, max_value=99, max_denominator=60))  # fmt: skip
def test_keys_of_segments_never_meet_those_of_files(name: str, start: Fraction | None, end: Fraction | None) -> None:
    path = encode_path(name.encode())
    key = video_key(path, start, end)
    assert (key == path) == (start is None and end is None)
    if key != path:
        assert encode_path(key.encode()) != key  # a file that is really called so gets another key
        begin, _, finish = key.rsplit("#", 1)[1].partition("-")
        assert (fraction(begin or None), fraction(finish or None)) == (start, end)
