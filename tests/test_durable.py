"""Durable files: whole or not at all, in the right order, with the disk named when it fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avstore.durable import canonical_json, read_json, read_sealed, replacing, sealed_json, write_atomic, write_new
from avstore.errors import CorruptError, MachineError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values))
def test_canonical_json_does_not_depend_on_order(value: dict[str, object]) -> None:
    other = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(other)
    assert canonical_json(value).endswith(b"\n")


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_replace_is_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_atomic(file, b"one")
    with pytest.raises(KeyError), replacing(file) as f:
        f.write(b"two")
        raise KeyError
    assert file.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_first_writer_wins(tmp_path: Path) -> None:
    assert write_new(tmp_path / "a", b"one")
    assert not write_new(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_order_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "link", "rename", "unlink"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    write_atomic(tmp_path / "a", b"x")
    assert calls == ["fsync", "rename", "fsync"]
    calls.clear()
    write_new(tmp_path / "b", b"x")
    assert calls == ["fsync", "link", "unlink", "fsync"]


@pytest.mark.parametrize("function", [write_atomic, write_new])
@pytest.mark.parametrize("call", ["fsync", "link", "rename"])
@pytest.mark.parametrize("code", [28, 5])
def test_every_failing_call_leaves_old_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function, call: str, code: int
) -> None:  # type: ignore[no-untyped-def]
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    used = {"write_atomic": ("fsync", "rename"), "write_new": ("fsync", "link")}[function.__name__]
    monkeypatch.setattr(os, call, fail)
    if call not in used:
        function(tmp_path / "a", b"x")
        return
    with pytest.raises(MachineError) as e:
        function(tmp_path / "a", b"x")
    assert str(tmp_path) in str(e.value)
    assert ("full" in e.value.what) == (code == 28)
    assert list(tmp_path.iterdir()) == []


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"x": ')
    with pytest.raises(CorruptError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


@given(st.dictionaries(st.sampled_from("abcd"), json_values, min_size=1), st.data())
def test_a_sealed_file_tells_of_every_changed_bit(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, object], data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("sealed") / "a.json"
    sealed = sealed_json(value)
    file.write_bytes(sealed)
    assert read_sealed(file) == value
    changed = bytearray(sealed)
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)
    with pytest.raises(CorruptError, match="digest"):
        read_sealed(file)
