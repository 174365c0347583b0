"""`bench loader` on a small set: rows hold measurements, who cannot run is left out with a reason, files are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from avstore.batch import Batch
from avstore.errors import UsageError
from avstore.windows import Extents
from benchmarks import contenders, loader, loader_cases
from benchmarks.contenders import measure
from benchmarks.contenders_clips import FRAMES, ClipSet, Grid, clip_list, pack, payloads, shuffled, unpack
from benchmarks.loader_stores import write_raw
from tests.tiny_store import Tiny, default_spec, make_store


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> ClipSet:
    folder = tmp_path_factory.mktemp("bench")
    make_store(
        folder / "jpeg.zarr", [Tiny(3.0), Tiny(0.5), Tiny(20.5)], default_spec(codec="jpeg", height=128, width=176)
    )
    for path, inner in ((folder / "raw.zarr", 1), (folder / "raw-seconds.zarr", 0)):
        write_raw(folder / "jpeg.zarr", path, inner)
    return ClipSet(str(folder), str(folder))


def test_clips_do_not_overlap_and_every_epoch_has_all_of_them(work: ClipSet) -> None:
    store, found = clip_list(work.jpeg)
    assert len(found) == 3 + 0 + 20  # whole clips of 16 frames
    assert (np.diff(np.sort(found[:, 1])) >= 16).all()
    order = shuffled(work, 23)
    first, second = ([next(order) for _ in range(23)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(23)) and first != second
    record = pack(payloads(store, int(found[4, 1])))
    clip = store.clip(int(found[4, 0]), int(found[4, 1] - store.places[found[4, 0]] * 16) / 16, 16, 16)
    assert np.array_equal(unpack(record), clip.frames)


def test_the_raw_stores_hold_the_same_pixels(work: ClipSet) -> None:
    jpeg, raw = clip_list(work.jpeg), clip_list(work.raw)
    assert np.array_equal(jpeg[1], raw[1]) and raw[0].spec.codec == "raw"
    wide = zarr.open_array(work.seconds / "frames", mode="r")
    assert wide.chunks == (16, 128, 176, 3)
    for number, row in jpeg[1][[0, 5, 22]].tolist():
        at = (row - int(jpeg[0].places[number]) * 16) / 16
        frames = jpeg[0].clip(number, at, 16, 16).frames
        assert np.array_equal(raw[0].clip(number, at, 16, 16).frames, frames)
        assert np.array_equal(wide[row : row + 16], frames)


@pytest.mark.parametrize(
    "name",
    ["libjpeg-turbo", "avstore jpeg in-process", "avstore raw", "memcpy", "zarr-python", "zarr-python 1 s chunks"],
)
def test_contenders_deliver(work: ClipSet, name: str) -> None:
    contender = contenders.CONTENDERS[name]
    batches = contender.batches(ClipSet(work.work, work.media, 1, 4))
    got = measure(batches, contender.ahead, 0.05)
    assert got["clips"] >= 4 and got["clips"] % 4 == 0 and got["seconds"] >= 0.05
    assert contenders.all_files(contender.files(work))


def test_avstore_reads_the_clips_of_the_grid(work: ClipSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's clips begin on the grid, so that everybody reads the same ones."""
    from avstore.loader import Loader

    seen: list[tuple[int, int]] = []
    real = Loader.steps

    def steps(self: Loader, *args: object, **named: object) -> Iterator[Batch]:
        for batch in real(self, *args, **named):  # type: ignore[arg-type]
            rate = self.store.spec.sample_rate
            seen.extend(
                (n, int(self.store.places[n]) * 16 + o * 16 // rate)
                for n, o in zip(batch.video.tolist(), batch.offset.tolist(), strict=True)
            )
            yield batch

    monkeypatch.setattr(Loader, "steps", steps)
    _, found = clip_list(work.jpeg)
    batches = contenders.CONTENDERS["avstore jpeg in-process"].batches(ClipSet(work.work, work.media, 1, 4))
    while len(seen) < 400:
        assert next(batches) == 4
    grid = {(int(n), int(row)) for n, row in found}
    assert set(seen) <= grid and len(set(seen)) == len(grid)
    share = sum(n == found[0, 0] for n, _ in seen) / len(seen)  # 3 of the 23 clips are the first video's
    assert share == pytest.approx(3 / 23, abs=0.02)
    odd = Grid(sample_rate=8000, fps=30)  # 16 frames are 4266.67 samples: the start rounds up, the row down to its own
    starts = odd.starts(Extents(np.full(50, 80_000), np.zeros(50), np.zeros(50)), np.linspace(0, 0.999, 50)[:, None],
                        None, 0, 0).picture  # fmt: skip
    assert ((starts * 30 // 8000) % FRAMES == 0).all() and len(set(starts.tolist())) == 18


def test_one_that_cannot_run_is_left_out_with_its_reason(work: ClipSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.CONTENDERS, "no such contender", contenders.CONTENDERS["memcpy"])  # here only
    with loader._Field(work, ["memcpy", "no such contender"], lambda *_: None) as field:
        field.rounds(1, 0.05)
    assert "memcpy" in field.children and "ended with" in field.left_out["no such contender"]
    raw, *bars = field.tables(1, 0.05)
    rows = {r["contender"]: r for r in raw.rows}
    assert "left out: its process ended" in rows["no such contender"]["note"]
    assert rows["memcpy"]["ratio"] == 1.0 and rows["memcpy"]["clips/s"] > 0 and rows["memcpy"]["first batch s"] > 0
    assert not bars  # none of ours ran


def test_a_bar_is_against_the_fastest_and_by_rounds(work: ClipSet) -> None:
    field = loader._Field(work, [*contenders.CONTENDERS], lambda *_: None)
    for name, rates in (("avstore jpeg", [200, 90, 100]), ("webdataset", [80, 80, 80]), ("litdata", [100, 60, 50])):
        field.runs[name] = [{"clips": r, "seconds": 1.0, "cpu": 1 / r} for r in rates]
    bar = field._bar("avstore jpeg", loader.JPEG_RIVALS, 1.3)
    assert bar is not None and bar["theirs"] == "webdataset"  # median 80 against 60
    assert bar["ratio"] == 100 / 80 and bar["CPU ratio"] == 100 / 80 and bar["reached"] is False
    assert field._bar("avstore raw", ("memcpy",), 0.7) is None


def test_wrong_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no contender"):
        loader.run(tmp_path, tmp_path / "work", only=["avstore jpg"])
    with pytest.raises(UsageError, match="nothing to measure"):
        loader.run(tmp_path, tmp_path / "work", rounds=0)


def test_a_case_answers_one_line_of_json(work: ClipSet) -> None:
    given = {"store": str(work.jpeg), "seconds": 0.1, "rounds": 1}
    asked = [sys.executable, "-m", "benchmarks.loader_cases", "along", json.dumps(given)]
    root = Path(loader.__file__).parents[1]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=root)
    answer = json.loads(done.stdout)
    assert answer["clips/s"] > 0 and answer["CPU ms/clip"] >= 0


@pytest.mark.slow
def test_the_whole_from_media_to_tables(tiny_media: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    tables = loader.run(
        tiny_media, tmp_path / "work", threads=[1], rounds=1, seconds=0.2, only=["avstore jpeg", "zarr-python"],
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert [r["contender"] for t in tables[:2] for r in t.rows] == [
        "libjpeg-turbo",
        "avstore jpeg",
        "memcpy",
        "zarr-python",
    ]
    bars = tables.pop()
    assert [(r["ours"], r["theirs"]) for r in bars.rows] == [("avstore jpeg", "libjpeg-turbo")]
    assert all(r["clips/s"] > 0 for t in tables for r in t.rows) and "cold" in stages
    json.dumps([t.to_json() for t in tables])


def test_memory_and_beside_answer(work: ClipSet) -> None:
    given = {"store": str(work.jpeg), "seconds": 0.05, "rounds": 1, "in_process": True}
    memory = loader_cases.memory(given)
    assert memory["slots MB"] > 1 and memory["clips"] >= 40 * 16 and memory["allocated at once KB"] < 500
    assert memory["at first MB"] <= memory["most MB"] and memory["beyond slots MB"] < 200
    beside = loader_cases.beside({**given, "work": "python"})
    assert beside["steps/s beside"] > 0 and beside["rate beside/alone"] >= 0 and 0 < beside["cores, main"] < 1.2


def test_along_compares_with_frames_only_by_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"frames only": iter([1.0, 2.0, 4.0]), "8 fps of a 16-fps tape": iter([2.0, 2.0, 12.0])}

    def ask(name: str, given: dict[str, object]) -> dict[str, object]:
        case = "8 fps of a 16-fps tape" if given.get("fps") == 8 else "frames only"
        if given["store"] == "y" or set(given) - {"store", "seconds", "rounds", "fps"}:
            return {"note": "failed: no"}
        return {"clips/s": 10.0, "CPU ms/clip": next(costs[case])}

    monkeypatch.setattr(loader_cases, "_ask", ask)
    table = loader_cases._along({"store": "x", "seconds": 1, "rounds": 3}, Path("y"), lambda *_: None)
    row = {r["clips"]: r for r in table.rows}
    assert row["8 fps of a 16-fps tape"]["CPU ms/clip beside frames only"] == 2.0  # of 2, 1, 3
    assert row["8 fps of a 16-fps tape"]["CPU ms/clip"] == 2.0 and row["224 store at half size"]["note"] == "failed: no"
