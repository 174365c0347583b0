"""docs/format.md: a stranger's reader agrees with avstore, and the fixture of the first format stays readable.

The stranger (`tests/stranger.py`) has json, numpy, a JPEG decoder and zstd, and nothing of ours.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import avstore
from avstore.durable import canonical_json
from avstore.records import FIELDS, Plan
from avstore.spec import Spec
from tests.small_stores import small_store
from tests.stranger import Stranger
from tests.tiny_store import Tiny, default_spec, make_store

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "data" / "store-v1"


def stranger(path: Path) -> Stranger:
    from numcodecs.zstd import Zstd
    from simplejpeg import decode_jpeg

    return Stranger(
        path,
        lambda data: decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False),
        lambda data: bytes(Zstd().decode(data)),
    )


def content(path: Path) -> dict[str, Any]:
    """What the fixture's JSON keeps of a store, as the stranger reads it."""
    store = stranger(path)
    pixels = {}
    for number, video in enumerate(store.videos):
        if video["status"] == "ok" and video["frames"]:
            blocks = store.frames(number).reshape(video["frames"], 2, 16, 3, 16, 3).mean(axis=(2, 4))
            pixels[str(number)] = np.round(blocks, 1).tolist()
    return {"digest": store.digest(), "keys": [v["key"] for v in store.videos], "blocks": pixels}


def test_the_stranger_knows_nothing_of_us() -> None:
    tree = ast.parse((ROOT / "tests" / "stranger.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"__future__", "collections.abc", "fractions", "hashlib", "json", "numpy", "pathlib", "typing"}


def agree(path: Path) -> None:
    """Everything that the stranger reads is what avstore reads."""
    ours, theirs = avstore.open(path), stranger(path)
    assert [v["key"] for v in theirs.videos] == ours.keys and ours.total > 0
    assert sorted(theirs.current().values()) == ours.current.tolist()
    for number, video in enumerate(theirs.videos):
        mine = ours[number]
        assert (video["status"], video["columns"], video["place"]) == (mine.status, mine.columns, mine.place)
        if video["status"] != "ok":
            continue
        for name in FIELDS:
            assert video[name] == mine.facts[name]
        waveform, _ = ours.waveform(number)
        np.testing.assert_array_equal(theirs.waveform(number), waveform)
        for name in ours.spec.front_ends:
            np.testing.assert_array_equal(theirs.spectrogram(number, name), ours.stored_spectrogram(number, name))
        if video["frames"]:
            clip = ours.clip(number, 0, n=video["frames"], fps=ours.spec.fps)
            assert clip.frames is not None and clip.source is not None
            np.testing.assert_array_equal(theirs.frames(number), clip.frames)
            np.testing.assert_array_equal(theirs.source(number), clip.source)
            some = ours.clip(number, Fraction(1, 7), n=2, fps=Fraction(7, 2))
            if some.valid_frames == 2:
                assert theirs.clip_rows(number, Fraction(1, 7), 2, Fraction(7, 2)) == some.rows.tolist()


def test_a_real_store(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> None:
    agree(small_store(tmp_path_factory, tiny_media, front_ends=("avid-linear257", "crisscross-mel80")))


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_tiny_stores(tmp_path: Path, codec: str) -> None:
    videos = [Tiny(3.3), Tiny(40, sound=2), Tiny(2, sound=None), Tiny(2, status="failed"), Tiny(1.5, picture=False)]
    spec = default_spec(codec=codec, sample_rate=16000, front_ends=("crisscross-mel80",), height=32, width=48)
    agree(make_store(tmp_path / "s.zarr", videos, spec))


def test_the_stranger_notices_damage(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", [Tiny(2)])
    file = path / "waveform" / "c.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError, match="waveform chunk 0"):
        stranger(path).waveform(0)


# The fixture


def test_the_first_format_stays_readable(tmp_path: Path) -> None:
    expected = json.loads((ROOT / "tests" / "data" / "store-v1.json").read_text())
    found = content(FIXTURE)
    assert found["digest"] == expected["digest"] and found["keys"] == expected["keys"]
    assert found["blocks"].keys() == expected["blocks"].keys()
    for number, blocks in expected["blocks"].items():
        np.testing.assert_allclose(found["blocks"][number], blocks, atol=1.5)
    agree(Path(shutil.copytree(FIXTURE, tmp_path / "store-v1.zarr")))


def test_what_the_fixture_holds() -> None:
    store = avstore.open(FIXTURE)
    assert {store.key(n) for n in store.numbers.tolist()} == {
        "b.wav", "b.wav#1/4-3/4", "later.mkv", "slow.mkv", "train/bar/a.mkv"}  # fmt: skip
    assert len(store.plans) == 2 and store.total == 7 and store.pending_tasks == 0
    cut, whole = store.find(["b.wav#1/4-3/4", "b.wav"]).tolist()
    np.testing.assert_array_equal(store.waveform(cut)[0], store.waveform(whole, Fraction(1, 4), Fraction(1, 2))[0])
    later = [n for n in range(store.total) if store.key(n) == "later.mkv"]
    assert [store[n].status for n in later] == ["failed", "ok"] and store.column("label", later)[1] == "again"
    slow = store.clip(store.find(["slow"])[0], 0, n=12, fps=8)
    assert slow.source is not None and slow.source.tolist() == [k // 2 for k in range(12)]
    size = sum(p.stat().st_size for p in FIXTURE.rglob("*") if p.is_file())
    assert size < 150_000 and not (FIXTURE / "logs").exists()


# The document


def test_the_document_names_every_field() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    quoted = set(re.findall(r"[a-z_]+", text))
    assert set(FIELDS) <= quoted
    assert set(Plan.__dataclass_fields__) <= quoted
    inside = {"foreign"}  # of front-ends that this version does not know: in the file they stand among front_ends
    assert {name for name in Spec.__dataclass_fields__ if not name.startswith(("max_", "cpu_"))} - inside <= quoted


def test_every_json_of_a_store_is_canonical(tmp_path: Path) -> None:
    for path in (make_store(tmp_path / "s.zarr", [Tiny(2)]), FIXTURE):
        files = [*path.rglob("*.json")]
        assert len(files) >= 7
        for file in files:
            assert canonical_json(json.loads(file.read_bytes())) == file.read_bytes(), file
