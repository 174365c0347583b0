"""Lists as text: exact for any values, names and strings; what does not look canonical is parsed by json instead."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import avstore
from avstore.columns import Texts, boxes, flags, has, integers, list_members, members, values
from avstore.durable import canonical_json, sealed_json
from avstore.errors import CorruptError
from avstore.records import FIELDS, Plan, Record, Task, plan_path, record_path
from avstore.selection import select
from avstore.verify import verify
from benchmarks.scale import simulate
from tests.tiny_store import Tiny, default_spec, make_store

# strings that look like the separators between lists
HOSTILE = st.sampled_from(
    ['],"a":[', "a],", ":[", ",", "null", "],", '"', '\\"', ',"digest":"', "[", "]", "", "\\", "é"]
)
STRINGS = st.one_of(HOSTILE, st.text(st.characters(exclude_categories=["Cs"]), max_size=6))


def dumps(value: Any) -> bytes:
    return canonical_json(value)[:-1]


@example({"a],": [None, "a],", "null"]})
@given(st.dictionaries(STRINGS, st.lists(st.none() | STRINGS, min_size=3, max_size=3), max_size=4))
def test_columns_of_any_name_and_text_are_cut_apart_exactly(columns: dict[str, list[str | None]]) -> None:
    found = list_members(dumps(columns), 3)
    assert found is not None and {k: json.loads(v) for k, v in found.items()} == columns
    longer = list_members(dumps(columns), 4)
    if longer is not None and columns:  # commas and nulls inside strings may pass for elements: parsing finds out
        with pytest.raises(ValueError, match="instead of 4"):
            values([next(iter(longer.values()))], 4)


@given(st.dictionaries(STRINGS, st.lists(st.none() | STRINGS, min_size=2, max_size=2), max_size=3), st.lists(STRINGS))
def test_members_are_cut_apart_exactly(inside: dict[str, Any], last: list[str]) -> None:
    value = {"columns": {**inside, "digest": ["x", None]}, "digest": "0" * 64, "key": last, "n": 1}
    found = members(dumps(value) + b"\n", ["columns", "digest", "key", "n"])
    assert found is not None and {k: json.loads(v) for k, v in found.items()} == value
    assert members(dumps(value) + b"\n", ["columns", "digest", "n"]) is None
    assert members(json.dumps(value).encode(), ["columns", "digest", "key", "n"]) is None


LISTS = st.one_of(st.lists(st.none() | STRINGS), st.lists(st.none() | st.integers()), st.lists(st.booleans()),
                  st.lists(st.none() | st.lists(st.integers(0, 9), min_size=4, max_size=4)))  # fmt: skip


@given(LISTS, st.integers(0, 8))
def test_elements_are_counted(value: list[Any], n: int) -> None:
    text = dumps(value)
    assert has(text, len(value))
    if n > len(value):
        joined = "".join(v for v in value if isinstance(v, str))
        short = "," in joined and "null" in joined
        assert short or not has(text, n)  # the forger's case: strings with as many commas as nulls


@given(st.lists(st.lists(st.integers(0, 2**60), max_size=5), max_size=5))
def test_numbers_and_values_are_those_of_json(lists: list[list[int]]) -> None:
    parts, flat = [dumps(x) for x in lists], [x for y in lists for x in y]
    assert integers(parts, len(flat)).tolist() == flat == values(parts, len(flat))
    assert integers(parts, len(flat)).dtype == np.int64


@pytest.mark.parametrize("bad", [[1.5], [None], ["1"], [-1], [2**63], [2**62], [1, 2], [True], [[1]], [10**30]])
def test_what_is_no_whole_number_is_refused(bad: list[Any]) -> None:
    with pytest.raises(ValueError):
        integers([dumps(bad)], 1)


def test_boxes_and_flags() -> None:
    text = dumps([[1, 2, 3, 4], None])
    assert boxes([text, dumps([None])], 3, (0, 0, 8, 16)).tolist() == [[1, 2, 3, 4], [0, 0, 8, 16], [0, 0, 8, 16]]
    assert flags([dumps(["ok", "failed"]), dumps(["ok"])], 3, {"ok": True, "failed": False}).tolist() == [1, 0, 1]
    with pytest.raises(ValueError):
        flags([dumps(["okay"])], 1, {"ok": True})
    with pytest.raises(ValueError):
        boxes([dumps([[1, 2, 3]])], 1, (0, 0, 8, 16))


@given(st.lists(st.lists(st.tuples(st.none() | STRINGS, st.integers(0, 9)), min_size=1, max_size=4), min_size=1))
def test_texts_give_columns_and_rows(tasks: list[list[tuple[str | None, int]]]) -> None:
    parts = {"a": [dumps([x for x, _ in t]) for t in tasks], "b": [dumps([x for _, x in t]) for t in tasks]}
    texts = Texts([len(t) for t in tasks], parts, lambda part, why: AssertionError(part))
    flat = [{"a": a, "b": b} for t in tasks for a, b in t]
    assert [texts.row(i) for i in range(len(flat))] == flat
    assert texts["a"] == [f["a"] for f in flat] and texts.integers("b").tolist() == [f["b"] for f in flat]
    assert texts["a"] is texts["a"] and [texts.row(i) for i in range(len(flat))] == flat


def test_the_wrong_part_is_named() -> None:
    texts = Texts([1, 1, 1], {"n": [b"[1]", b"[x]", b"[3]"]}, lambda part, why: CorruptError(f"part {part}", why))
    for ask in (lambda: texts["n"], lambda: texts.integers("n"), lambda: texts.row(1)):
        with pytest.raises(CorruptError, match="part 1"):
            ask()
    assert texts.row(2) == {"n": 3}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = ['a],".mp4', 'b":[.mp4', "c,null.mp4", "d\\.mp4"]
    return make_store(tmp_path_factory.mktemp("hostile") / "s.zarr",
                      [Tiny(1, key=k, label=f"],{k}", split=":[") for k in keys])  # fmt: skip


def test_a_plan_read_as_text_is_the_plan(hostile: Path) -> None:
    data = plan_path(hostile, 1).read_bytes()
    plan, value = Plan.read(plan_path(hostile, 1)), json.loads(data)
    assert plan.integers("place").tolist() == value["place"] and "place" not in plan.__dict__
    assert plan.column("label") == value["columns"]["label"] and sorted(plan.column_names) == ["label", "split"]
    assert plan.path is plan.key and plan.key == value["key"] and plan.columns == value["columns"]
    assert plan.to_bytes() == data == Plan.read(plan_path(hostile, 1)).to_bytes()
    with pytest.raises(AttributeError):
        plan.colour  # noqa: B018


def test_files_that_are_not_canonical_are_read_too(hostile: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(hostile, tmp_path / "s.zarr"))
    before = [v.to_json() for v in avstore.open(path)]
    for file in (plan_path(path, 1), record_path(path, 0)):
        value = json.loads(file.read_bytes())
        loose = json.dumps({**value, "digest": "0" * 64}, indent=1).replace('"digest": ', '"digest":')
        file.write_text(loose.replace("0" * 64, hashlib.sha256(loose.encode()).hexdigest()))
    assert [v.to_json() for v in avstore.open(path)] == before


def test_damage_inside_a_list_names_the_record(hostile: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(hostile, tmp_path / "s.zarr"))
    file = record_path(path, 0)
    value = json.loads(file.read_bytes())
    for name, wrong in (("frames", [1, 2, 3.5, 4]), ("status", ["ok", "ok", "fine", "ok"]), ("samples", [1, 2, -3, 4])):
        file.write_bytes(sealed_json({**value, name: wrong}))
        with pytest.raises(CorruptError, match=rf"commits/000000\.json is damaged\n{name}"):
            avstore.open(path)


def test_a_simulated_store_is_whole_and_shows_the_base(tmp_path: Path) -> None:
    base = make_store(tmp_path / "base.zarr", [Tiny(3.0), Tiny(5.5, sound=None), Tiny(40.0), Tiny(2.0, picture=False)],
                      default_spec(codec="jpeg"))  # fmt: skip
    with avstore.open(base) as real, avstore.open(simulate(real, tmp_path / "many.zarr", 50)) as many:
        assert len(many) == many.total == 50 and len(set(many.keys)) == 50 and not many.pending_tasks
        report = verify(many.path)
        assert report.ok and report.videos == 50, report.faults
        assert 10 < len({t.number for p in many.plans for t in p.tasks}) < 40
        lengths = {int(real.frames[n]): n for n in (0, 1)}
        for video in many:
            if video.frames:
                clip, twin = many.clip(video.number, 0.5, 4), real.clip(lengths[video.frames], 0.5, 4)
                assert np.array_equal(clip.frames, twin.frames) and np.array_equal(clip.waveform, twin.waveform)
        assert len(select(many, where=["split=train"])) == 50
        assert select(many).rows(select(many).numbers[::-1]).tolist() == list(range(49, -1, -1))


def test_a_video_parses_its_task_alone(tmp_path: Path) -> None:
    base = make_store(tmp_path / "base.zarr", [Tiny(3.0), Tiny(5.5)])
    with avstore.open(base) as real, avstore.open(simulate(real, tmp_path / "many.zarr", 30)) as many:
        video = many[17]
        assert set(video.facts) == set(FIELDS) and video.frames == video.facts["frames"] and not many.facts.parsed
        task = next(t for t in many.plans[0].tasks if 17 in t.videos)
        record = Record.read(record_path(many.path, task.number))
        assert video.facts == {k: v[17 - task.first] for k, v in record.fields.items()}
        assert isinstance(task, Task) and many.column("source_fps") == many.facts["source_fps"]
