"""Hostile and unstable sources: names of every kind, links, lists that point outside, files that change or vanish; and
that nothing in what is read can be executed."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ingest_media import Here, digest, write_wav

from avstore.errors import MachineError, NotFoundError, UsageError
from avstore.events import Event, Planned, TaskDone
from avstore.ingest import ingest
from avstore.sources import encode_path
from avstore.store import open as open_store

ROOT = Path(__file__).resolve().parents[1]
SOUND: dict[str, Any] = {"sample_rate": 8000, "front_ends": ()}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding in this process: only the parent is tested here."""
    monkeypatch.setattr("avstore.crew.Pool", Here)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


# Names


def test_hostile_names_are_only_data(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        b"-rf.wav",
        b"a\nb.wav",
        b"[red]x[bold].wav",
        b"\xff\xfe.wav",
        b"%FF%FE.wav",
        b"a#1-2.wav#1-2",
        b"c:d|e .wav",
    ]
    for i, name in enumerate(names):
        write_wav(folder / "x.wav", 1, seed=i)
        os.rename(folder / "x.wav", os.path.join(os.fsencode(folder), name))
    deep = folder / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    write_wav(deep / ("f" * 200 + ".wav"), 1)
    summary = ingest(folder, tmp_path / "s.zarr", sample_rate=8000, front_ends=())
    assert summary.failures == [] and summary.ok == 8
    assert {p.name for p in tmp_path.iterdir()} == {"in", "s.zarr"}
    assert ingest(folder, tmp_path / "s.zarr").new == 0
    with open_store(tmp_path / "s.zarr") as store:
        assert {v.key for v in store if "%" in v.key} == {"%FF%FE.wav", "%25FF%25FE.wav", "a#1-2.wav%231-2"}


# Files that do not stay as they are


def test_a_source_that_vanishes_stops_with_nothing_blamed(tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    folder.mkdir()
    for i in range(4):
        write_wav(folder / f"{i}.wav", 6, seed=i)  # slots of 7: a shard, and a task, each

    def vanish(event: Event) -> None:
        if isinstance(event, TaskDone) and event.task == 0:
            shutil.move(folder, tmp_path / "away")

    options: dict[str, Any] = {"sample_rate": 8000, "front_ends": (), "shard_seconds": 8, "workers": 1}
    big = {**options, "on_event": vanish}
    try:
        summary = ingest(folder, store, **big)
        assert summary.failed == 0  # the child was ahead of us: then nothing was missing
    except MachineError as e:
        assert "vanished" in e.what
    shutil.move(tmp_path / "away", folder)
    summary = ingest(folder, store, **options)
    assert (summary.ok, summary.failed) == (4, 0)


def test_a_file_that_vanishes_is_that_files_failure(tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    folder.mkdir()
    for name in "abc":
        write_wav(folder / f"{name}.wav", 1)

    def at_plan(event: Event) -> None:
        if isinstance(event, Planned):
            (folder / "b.wav").unlink()

    summary = ingest(folder, store, sample_rate=8000, front_ends=(), on_event=at_plan)
    assert summary.failures == [("b.wav", "unreadable", "No such file or directory")] and summary.ok == 2
    assert summary.removed == []  # it was there when the folder was read
    assert ingest(folder, store).removed == ["b.wav"]


def test_a_file_that_becomes_another_between_plan_and_decoding(folder: Path, tmp_path: Path) -> None:
    """It is what it is when it is decoded; its size no longer fits the plan, which the next command tells."""
    for name in "abc":
        write_wav(folder / f"{name}.wav", 2)

    def at_plan(event: Event) -> None:
        if isinstance(event, Planned) and event.plan == 1:
            write_wav(folder / "a.wav", 1)
            write_wav(folder / "b.wav", 9)
            (folder / "c.wav").write_bytes(b"no longer sound")

    store = tmp_path / "s.zarr"
    summary = ingest(folder, store, on_event=at_plan, **SOUND)
    assert [(k, r) for k, r, _ in summary.failures] == [("c.wav", "unreadable")] and summary.ok == 2
    with open_store(store) as opened:
        assert {v.key: v.samples for v in opened} == {"a.wav": 8000, "b.wav": 72000}  # b was planned anew
    assert ingest(folder, store).changed == ["a.wav", "b.wav", "c.wav"]
    summary = ingest(folder, store, changed=True)
    assert summary.new == 3 and summary.changed == [] and summary.ok == 2


def test_the_same_content_twice_is_two_videos(folder: Path, tmp_path: Path) -> None:
    write_wav(folder / "a.wav", 1)
    shutil.copyfile(folder / "a.wav", folder / "b.wav")
    os.link(folder / "a.wav", folder / "c.wav")
    (folder / "d.wav").symlink_to("a.wav")
    ingest(folder, tmp_path / "s.zarr", **SOUND)
    with open_store(tmp_path / "s.zarr") as store:
        sounds = {v.key: store.waveform(v.number)[0].tobytes() for v in store}
    assert sorted(sounds) == ["a.wav", "b.wav", "c.wav", "d.wav"] and len(set(sounds.values())) == 1


# Links


def test_links(folder: Path, tmp_path: Path) -> None:
    """Loops end, a broken link is accounted for, links out of the folder are followed (the user put them there) under
    their own names, and a folder that two ways lead to is read once."""
    write_wav(folder / "a.wav", 1)
    (folder / "sub").mkdir()
    write_wav(folder / "sub" / "b.wav", 1, seed=1)
    (folder / "sub" / "up").symlink_to("..")
    (folder / "self.wav").symlink_to("self.wav")
    (folder / "broken.wav").symlink_to("nowhere.wav")
    (folder / "twice").symlink_to("sub")
    outside = tmp_path / "outside"
    outside.mkdir()
    write_wav(outside / "c.wav", 1, seed=2)
    (folder / "out").symlink_to(outside)
    (folder / "c.wav").symlink_to(outside / "c.wav")
    summary = ingest(folder, tmp_path / "s.zarr", **SOUND)
    assert sorted(k for k, _, _ in summary.failures) == ["broken.wav", "self.wav"]
    assert {r for _, r, _ in summary.failures} == {"unreadable"}
    read_already = "a link to a folder that is read already"
    assert summary.skipped == [("sub/up", read_already), ("twice", read_already)]
    with open_store(tmp_path / "s.zarr") as store:
        assert sorted(v.key for v in store) == ["a.wav", "c.wav", "out/c.wav", "sub/b.wav"]


def test_the_longest_names_and_paths(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """255 bytes of name, a path as long as the kernel takes, and a tree that is too deep to be named at all."""
    write_wav(tmp_path / "x.wav", 1)
    long = "n" * 251 + ".wav"
    shutil.copyfile(tmp_path / "x.wav", folder / long)
    room = 4095 - len(os.fsencode(folder)) - 1
    path, at = [], folder
    while room - sum(len(p) + 1 for p in path) > 260:
        path.append("d" * 200)
        at = at / path[-1]
        at.mkdir()
    deep = "/".join([*path, "e.wav"])
    shutil.copyfile(tmp_path / "x.wav", folder / deep)
    assert len(deep) > 3600
    monkeypatch.chdir(at)
    for _ in range(3):  # beyond what a path can say: only steps lead there
        os.mkdir("f" * 200)
        os.chdir("f" * 200)
    shutil.copyfile(tmp_path / "x.wav", "lost.wav")
    os.chdir(tmp_path)
    summary = ingest(folder, tmp_path / "s.zarr", **SOUND)
    assert summary.ok == 2 and summary.failed == 0
    assert [why for _, why in summary.skipped] == ["File name too long"]
    with open_store(tmp_path / "s.zarr") as store:
        assert sorted(v.key for v in store) == sorted([long, deep])
    assert ingest(folder, tmp_path / "s.zarr").new == 0
    shutil.rmtree(folder)


# Lists


@pytest.mark.parametrize("name", ["../secret.wav", "in/../../secret.wav", "/etc/passwd", "//etc/passwd", "a/../../x"])
def test_a_list_cannot_point_out_of_its_root(folder: Path, tmp_path: Path, name: str) -> None:
    write_wav(tmp_path / "secret.wav", 1)
    write_wav(folder / "a.wav", 1)
    before = sorted(tmp_path.iterdir())
    (folder / "list.csv").write_text(f"path\na.wav\n{name}\n")
    with pytest.raises(UsageError, match="outside"):
        ingest(folder / "list.csv", tmp_path / "s.zarr", **SOUND)
    assert sorted(tmp_path.iterdir()) == before


def test_names_in_lists_are_only_data(folder: Path, tmp_path: Path) -> None:
    names = ["a\nb.wav", "[red]x[bold].wav", "=cmd|' '!A0.wav", "%41.wav", "a b;c,d.wav", "é\u202e.wav"]
    for i, name in enumerate(names):
        write_wav(folder / name, 1, seed=i)
    cells = "".join('"{}","{}"\n'.format(n.replace('"', '""'), f"[bold]{i}\x1b[31m") for i, n in enumerate(names))
    (tmp_path / "list.csv").write_text("path,label\n" + cells + '"gone\x1b]0;.wav",x\n')
    summary = ingest(tmp_path / "list.csv", tmp_path / "s.zarr", root=folder, **SOUND)
    assert summary.ok == len(names) and summary.failed == 0 and len(summary.skipped) == 1
    with open_store(tmp_path / "s.zarr") as store:
        assert {v.path: v.columns["label"] for v in store} == {
            encode_path(os.fsencode(n)): f"[bold]{i}\x1b[31m" for i, n in enumerate(names)
        }


def test_a_list_of_nothing_that_is_there(folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text("path\n" + "x" * 5000 + "\n\x00.wav\n")
    with pytest.raises((NotFoundError, UsageError)):
        ingest(folder / "list.csv", tmp_path / "s.zarr", **SOUND)
    assert not (tmp_path / "s.zarr").exists()


def test_a_list_adds_to_the_store_of_its_folder(folder: Path, tmp_path: Path) -> None:
    """Segments of a list beside whole files: keys of their own, appended; the list's columns for the new ones."""
    write_wav(folder / "a.wav", 4)
    store = tmp_path / "s.zarr"
    ingest(folder, store, **SOUND)
    before = digest(store)
    (tmp_path / "cuts.tsv").write_text("path\tstart\tend\tlabel\na.wav\t0.5\t2\tdog\na.wav\t2\t3.25\tcat\n")
    summary = ingest(tmp_path / "cuts.tsv", store, root=folder)
    assert summary.new == 2 and summary.ok == 3
    after = digest(store)
    assert all(after[n] == before[n] for n in before if not n.endswith("zarr.json"))
    with open_store(store) as opened:
        found = {v.key: (v.samples, v.columns.get("label")) for v in opened}
    assert found == {"a.wav": (32000, None), "a.wav#1/2-2": (12000, "dog"), "a.wav#2-13/4": (10000, "cat")}


# Nothing executed


# A trainer and the reader process that it has started itself hand each other jobs and errors, over anonymous memory and
# a socket pair of their own; neither reads a pickle from a file.
BETWEEN_OWN_PROCESSES = {"avstore/reader.py"}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name; `?.c` where it hangs on something else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_nothing_that_is_read_can_be_executed() -> None:
    """No pickle and no marshal, no `eval` or `exec`, NumPy and torch without pickles, in any file of the project."""
    seen = 0
    for package in ("avstore", "trainers", "cli", "benchmarks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            seen += 1
            forbidden = FORBIDDEN - ({"pickle"} if str(file.relative_to(ROOT)) in BETWEEN_OWN_PROCESSES else set())
            for node in ast.walk(ast.parse(file.read_text())):
                where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Import):
                    assert not {a.name.split(".")[0] for a in node.names} & forbidden, where
                elif isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] not in forbidden, where
                elif isinstance(node, ast.Call):
                    called = dotted(node.func)
                    given = {k.arg: str(getattr(k.value, "value", "?")) for k in node.keywords}
                    assert called not in ("eval", "exec", "__import__", "pickle.load", "pickle.Unpickler"), where
                    assert given.get("allow_pickle", "False") == "False", where
                    if called.endswith("torch.load") or called == "torch.load":
                        assert given.get("weights_only") == "True", where
                    if called in ("yaml.load", "yaml.unsafe_load", "torch.hub.load", "torch.jit.load"):
                        raise AssertionError(where)
    assert seen > 50
