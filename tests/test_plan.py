"""Listing and planning: keys that survive any name, slots worked by hand, tasks that cover every video once."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avstore.errors import MachineError, NotFoundError
from avstore.plan import Probed, failure, known_seconds, make_plan, slot_seconds, split_failure, tape_order, too_long
from avstore.records import Plan
from avstore.sources import Entry, decode_path, encode_path, folder_columns, read_source, require_root
from avstore.spec import Spec

# A machine that is busy with something else is no reason to fail.
CALM = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SPEC = Spec(front_ends=(), shard_seconds=8)


def entry(key: str) -> Entry:
    return Entry(key, key, 1, columns=folder_columns(key))


# Names


@CALM
@given(st.binary(min_size=1, max_size=60).filter(lambda b: b"\0" not in b))
def test_any_path_survives_as_text(raw: bytes) -> None:
    text = encode_path(raw)
    text.encode("utf-8")
    assert os.fsencode(decode_path(text)) == raw


@CALM
@given(st.sets(st.binary(min_size=1, max_size=8).filter(lambda b: b"\0" not in b), max_size=20))
def test_different_paths_have_different_keys(raw: set[bytes]) -> None:
    assert len({encode_path(r) for r in raw}) == len(raw)


def test_keys_worked_by_hand() -> None:
    assert encode_path(b"a/b c.mp4") == "a/b c.mp4"
    assert encode_path("höhe.mp4".encode()) == "höhe.mp4"
    assert encode_path(b"\xff.mp4") == "%FF.mp4"
    assert encode_path(b"100%.mp4") == "100%.mp4"
    assert encode_path(b"%FF.mp4") == "%25FF.mp4"
    assert encode_path(b"a.mp4#1-2") == "a.mp4%231-2"  # else it would read as the segment 1-2 of a.mp4
    assert encode_path(b"a#b.mp4") == "a#b.mp4"


def test_columns_from_folders() -> None:
    assert folder_columns("x.mp4") == {}
    assert folder_columns("dog/x.mp4") == {"label": "dog"}
    assert folder_columns("Train/dog/x.mp4") == {"label": "dog", "split": "train"}
    assert folder_columns("dog/val/x.mp4") == {"label": "dog", "split": "val"}
    assert folder_columns("animals/dog/test/x.mp4") == {"label": "dog", "split": "test"}


# Listing


def test_listing_takes_what_may_be_media_and_reports_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "a" / "b").mkdir(parents=True)
    (root / "old.zarr").mkdir()
    (root / "group").mkdir()
    (root / ".git").mkdir()
    (root / "group" / "zarr.json").write_text("{}")
    (root / "group" / "x.mp4").write_bytes(b"x")
    for name in ("a/b/2.mkv", "a/1.mp4", "noise", "clip.ts", ".hidden.mp4", "a/notes.TXT", "README"):
        (root / name).write_bytes(b"abc")
    os.mkfifo(root / "pipe.mp4")
    (root / "broken.mp4").symlink_to("nowhere")
    (root / "loop.mp4").symlink_to("loop.mp4")
    listing = read_source(root)
    assert [e.key for e in listing.entries] == ["a/1.mp4", "a/b/2.mkv", "broken.mp4", "clip.ts", "loop.mp4", "noise"]
    assert [e.size for e in listing.entries] == [3, 3, 0, 3, 0, 3]
    assert dict(listing.skipped) == {
        ".git": "hidden",
        ".hidden.mp4": "hidden",
        "README": "not media",
        "a/notes.TXT": "not media",
        "group": "a store",
        "old.zarr": "a store",
        "pipe.mp4": "not a regular file",
    }


def test_links_out_of_the_folder_are_read_and_loops_end(tmp_path: Path) -> None:
    root, outside = tmp_path / "in", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (outside / "far.mp4").write_bytes(b"12345")
    (root / "real" / "near.mp4").write_bytes(b"1")
    (root / "alias.mp4").symlink_to(outside / "far.mp4")
    (root / "away").symlink_to(outside)
    (root / "again").symlink_to("real")
    (root / "real" / "up").symlink_to("..")
    listing = read_source(root)
    assert [(e.key, e.size) for e in listing.entries] == [("alias.mp4", 5), ("away/far.mp4", 5), ("real/near.mp4", 1)]
    assert {p for p, _ in listing.skipped} == {"again", "real/up"}


def test_listing_one_file_has_the_key_it_has_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"1")
    (tmp_path / "y.mp4").write_bytes(b"1")
    one = read_source(tmp_path / "x.mp4")
    assert [e.key for e in one.entries] == ["x.mp4"] and one.root == tmp_path.resolve() and not one.whole


def test_a_missing_source_suggests_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "kinetics").mkdir()
    with pytest.raises(NotFoundError, match="kinetics"):
        read_source(tmp_path / "kinetic")


def test_a_vanished_source_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "gone", tmp_path / "empty"):
        with pytest.raises(MachineError, match="vanished"):
            require_root(root)
    require_root(tmp_path)


# Slots


def test_slots_worked_by_hand() -> None:
    assert [slot_seconds(Fraction(n)) for n in ("0", "3/4", "19/25", "1", "1049/100")] == [1, 1, 2, 2, 11]


def test_next_fit_worked_by_hand() -> None:
    lengths = {"a": 3, "b": 4, "c": 2, "d": 20, "e": 1, "f": 7}
    probed = [Probed(entry(k), Fraction(n) - Fraction(1, 4)) for k, n in lengths.items()]
    order = [p.entry.key for p in tape_order(probed)]
    plan = make_plan(SPEC, probed, [])
    assert plan.key == order and plan.seconds == [lengths[k] for k in order]
    shard, used, place = 0, 0, []  # the rule again, in other words
    for k in order:
        n = lengths[k]
        if used and used + n > 8:
            shard, used = shard + 1, 0
        place.append(8 * shard + used)
        used += n
        if used > 8:
            shard, used = shard + 3, 0
    assert plan.place == place
    long = order.index("d")
    assert [(t.shards, t.count) for t in plan.tasks if t.first <= long < t.first + t.count] == [(3, 1)]


videos = st.lists(st.tuples(st.fractions(0, 40), st.booleans()), min_size=1, max_size=40)


@CALM
@given(videos, videos, st.randoms())
def test_every_plan_is_sound(first: list[tuple[Fraction, bool]], second: list[tuple[Fraction, bool]], rng) -> None:  # type: ignore[no-untyped-def]
    plans: list[Plan] = []
    task = shard = video = 0
    for n, drawn in enumerate((first, second)):
        probed = [Probed(entry(f"{n}/{i}"), s, "unreadable: x" if bad else None) for i, (s, bad) in enumerate(drawn)]
        plan = make_plan(SPEC, probed, plans)
        rng.shuffle(probed)
        assert make_plan(SPEC, probed, plans).to_bytes() == plan.to_bytes()
        assert sorted(plan.key) == sorted(p.entry.key for p in probed)
        end = plan.first_shard * 8
        for place, seconds in zip(plan.place, plan.seconds, strict=True):
            assert place >= end
            end = place + seconds
        for t in plan.tasks:
            assert (t.number, t.shard, t.first) == (task, shard, video) and t.count > 0 and t.shards > 0
            assert t.shards == 1 or t.count == 1
            for v in t.videos:
                i = v - plan.first_video
                assert t.shard * 8 <= plan.place[i] and plan.place[i] + plan.seconds[i] <= (t.shard + t.shards) * 8
            task, shard, video = task + 1, shard + t.shards, video + t.count
        assert shard == plan.first_shard + plan.shards and video == plan.first_video + len(plan)
        assert all(s == 0 for s, p in zip(plan.seconds, plan.probe, strict=True) if p)
        plans.append(plan)


def test_order_depends_on_keys_alone_and_is_no_sorting() -> None:
    probed = [Probed(entry(f"{i:03d}"), Fraction(1)) for i in range(100)]
    keys = [p.entry.key for p in tape_order(probed)]
    assert keys != sorted(keys) and set(keys) == {p.entry.key for p in probed}
    assert [p.entry.key for p in tape_order(probed, seed=1)] != keys
    some = [k for k in keys if int(k) % 2]  # a subset keeps its order: a hash per key, not a shuffle of positions
    assert [p.entry.key for p in tape_order(p for p in probed if int(p.entry.key) % 2)] == some


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    probed = [
        Probed(entry("train/dog/ä\n.mp4"), Fraction(5, 3)),
        Probed(entry("x"), failed=failure("crashed", "SIGSEGV")),
    ]
    plan = make_plan(SPEC, probed, [])
    (tmp_path / "0001.json").write_bytes(plan.to_bytes())
    again = Plan.read(tmp_path / "0001.json")
    assert again == plan
    assert split_failure(again.probe[again.key.index("x")] or "") == ("crashed", "SIGSEGV")
    assert split_failure("unreadable") == ("unreadable", None)


@CALM
@given(st.fractions(0, 10**5))
def test_a_true_length_survives_its_message(seconds: Fraction) -> None:
    assert known_seconds(too_long(seconds, 3)) == seconds


def test_other_messages_hold_no_length() -> None:
    assert known_seconds(None) is None and known_seconds("lasts long") is None
