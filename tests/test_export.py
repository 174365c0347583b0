"""HDF5 from a store: what lies in it, that the readers of the shared layout take it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.durable import canonical_json, write_atomic
from avstore.errors import ConflictError, NotFoundError, UsageError
from avstore.spec import embedding_array
from avstore.store import Store
from benchmarks.annotations import Annotated, Annotations, read
from benchmarks.export import export_eccv16, export_embeddings, rows_of_picks, source_frames
from benchmarks.joint import joint_rows
from benchmarks.summary import summary_of
from cli.main import invoke

VIDEOS = [
    Tiny(10.5, key="cats/one.mp4", label="cat", split="train", repeat=1),
    Tiny(8, key="dogs/two.mp4", label="dog", repeat=2),  # 8 source frames a second on a tape of 16
    Tiny(6, key="dogs/three.mp4", label="dog", split="test", sound=None),
    Tiny(3, key="heard.wav", picture=False, label="cat"),
]
SCENES = {0: [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], 1: [0, 0, 1, 1, 1, 1, 2, 2], 2: [0, 0, 0, 1, 1, 1]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Embeddings of a run `mine`: `video` is a unit vector for each scene, `audio` the number and second."""
    made = avstore.open(make_store(tmp_path / "s.zarr", VIDEOS, default_spec()))
    rows = {"video": np.full((made.tape_seconds, 3), np.nan, "<f2"), "audio": np.full((made.tape_seconds, 2), np.nan)}
    for video, scenes in SCENES.items():
        place = made.places[video]
        rows["video"][place : place + len(scenes)] = np.eye(3)[scenes]
    for video in (0, 1, 3):
        seconds = np.arange(int(np.ceil(made.seconds(video))))
        rows["audio"][made.places[video] + seconds] = np.stack([np.full(len(seconds), video + 1), seconds], 1)
    for tower, x in rows.items():
        array = embedding_array("mine", tower, x.shape[1])
        folder = made.path / array.path
        folder.mkdir(parents=True)
        lineage = {"avstore": {"run": "mine", "step": 7, "every": 1}}
        meta = array.metadata(made.spec.shard_seconds, made.tape_seconds, lineage)
        write_atomic(folder / "zarr.json", canonical_json(meta))
        import zarr

        zarr.open_array(folder, mode="r+")[:] = x.astype("<f2")
    return made


def test_embeddings_with_their_columns(store: Store, tmp_path: Path) -> None:
    done = export_embeddings(store, tmp_path / "out.h5")
    assert done.groups == ["embeddings/mine/audio", "embeddings/mine/video"] and done.videos == 4
    with h5py.File(tmp_path / "out.h5") as f:
        keys = f["videos/key"].asstr()[:].tolist()
        assert keys == [v.key for v in VIDEOS]
        assert f["videos/label"].asstr()[:].tolist() == ["cat", "dog", "dog", "cat"]
        assert f["videos/split"].asstr()[:].tolist() == ["train", "", "test", ""]
        assert f["videos/seconds"][:].tolist() == [10.5, 8, 6, 3]
        sound = f["embeddings/mine/audio"]
        assert sound["vectors"].dtype == np.float16 and len(sound["vectors"]) == 11 + 8 + 3
        np.testing.assert_array_equal(sound["vectors"][:, 0], sound["video"][:] + 1)  # each row beside its own video
        np.testing.assert_array_equal(sound["vectors"][:, 1], sound["second"][:])
        assert json.loads(sound.attrs["avstore"])["step"] == 7
    some = export_embeddings(store, tmp_path / "some.h5", ["mine"], np.array([1]))
    assert (some.videos, some.rows) == (1, 16)


def test_the_shared_layout_is_what_readers_of_it_take(store: Store, tmp_path: Path) -> None:
    done = export_eccv16(store, tmp_path / "eccv16_mine.h5")
    assert done.left_out == [("heard.wav", "it has no pictures")]
    got = read(tmp_path / "eccv16_mine.h5").videos
    assert [v.name for v in got.values()] == ["cats/one", "dogs/three", "dogs/two"]
    one, two = got["video_1"], got["video_3"]
    assert one.n_frames == 168 and one.picks.tolist() == list(range(0, 168, 15))
    # frame 15 k is in second 15 k // 16
    np.testing.assert_array_equal(one.features.argmax(1), [SCENES[0][15 * k // 16] for k in range(12)])
    assert one.segments.tolist() == [[0, 47], [48, 111], [112, 167]]
    # every source frame is shown twice: 64 of them, frame 15 k in second 15 k // 8
    assert two.n_frames == 64
    np.testing.assert_array_equal(two.features.argmax(1), [SCENES[1][15 * k // 8] for k in range(5)])
    assert two.segments.tolist() == [[0, 15], [16, 47], [48, 63]]
    with h5py.File(tmp_path / "eccv16_mine.h5") as f:
        for g in f.values():
            assert int(g["n_steps"][()]) == len(g["picks"]) == len(g["features"])
            assert g["n_frame_per_seg"][:].sum() == g["n_frames"][()]
            assert g["features"].dtype == np.float32


def test_a_pick_that_no_row_shows_takes_the_nearest_frame() -> None:
    shown = np.array([0, 0, 2, 4, 4, 8])
    assert rows_of_picks(shown, np.array([0, 1, 2, 3, 4, 5, 7, 8, 12])).tolist() == [0, 0, 2, 2, 3, 3, 5, 5, 5]


def test_the_tape_s_source_frames(store: Store) -> None:
    shown, n = source_frames(store, 1)
    assert n == 64 and shown.tolist() == [i // 2 for i in range(128)]
    with pytest.raises(UsageError, match="no pictures"):
        source_frames(store, 3)


class Summing(torch.nn.Module):
    """A model over snippets that can be worked by hand: (sum of what is here of sight, how many are here)."""

    def joint(self, v_BTC, a_BTC, here_BT):
        assert (a_BTC[~here_BT] == 0).all() and torch.isfinite(v_BTC).all()
        total = (v_BTC[..., 0] * here_BT).sum(1, keepdim=True).expand(-1, here_BT.shape[1])
        return torch.stack([total, here_BT.sum(1, keepdim=True).expand_as(total).float()], -1)


def planted_run(**method) -> SimpleNamespace:
    config = SimpleNamespace(name="temporal", method=SimpleNamespace(**method))
    return SimpleNamespace(config=config, path=Path("runs/mine"), load=lambda step: Summing(),
                           checkpoints=lambda: [SimpleNamespace(step=7, digest="d7")])  # fmt: skip


def add_rows(store: Store, tower: str, x: np.ndarray) -> None:
    array = embedding_array("mine", tower, x.shape[1])
    (store.path / array.path).mkdir(parents=True)
    lineage = {"avstore": {"run": "mine", "step": 7, "every": 1, "checkpoint": "d7"}}
    meta = array.metadata(store.spec.shard_seconds, store.tape_seconds, lineage)
    write_atomic(store.path / array.path / "zarr.json", canonical_json(meta))
    import zarr

    zarr.open_array(store.path / array.path, mode="r+")[:] = x.astype("<f2")


def test_joint_features_are_the_middle_of_the_models_windows(store: Store, tmp_path: Path) -> None:
    """Three snippets two seconds apart around each second; video 2 is silent and has none."""
    sight = np.full((store.tape_seconds, 1), np.nan)
    for video, n in ((0, 11), (1, 8), (2, 6)):
        sight[store.places[video] + np.arange(n), 0] = 1 + np.arange(n)
    sound = sight.copy()
    sound[store.places[2] :][:6] = np.nan
    add_rows(store, "video-trunk", sight)
    add_rows(store, "audio-trunk", sound)
    run = planted_run(snippets=3, hop=2.0, target="trunk")
    rows = joint_rows(store, "mine", run, np.array([0, 1, 2]))
    place = int(store.places[1])
    np.testing.assert_array_equal(rows[place : place + 8, 0], [4, 6, 9, 12, 15, 18, 12, 14])  # s - 2, s, s + 2
    np.testing.assert_array_equal(rows[place : place + 8, 1], [2, 2, 3, 3, 3, 3, 2, 2])
    assert np.isnan(rows[store.places[2] :][:6]).all()
    file = tmp_path / "joint.h5"
    done = export_eccv16(store, file, "mine", "joint", trained=run)
    silent = ("dogs/three.mp4", "it has no joint embeddings of mine")
    assert done.left_out == [silent, ("heard.wav", "it has no pictures")]
    with h5py.File(file) as f:  # as DR-DSN and its followers read it
        for key in f:
            x, picks, n = f[key]["features"][...], f[key]["picks"][...], f[key]["n_frames"][()]
            cps, nfps = f[key]["change_points"][...], f[key]["n_frame_per_seg"][...]
            assert x.shape == (f[key]["n_steps"][()], 2) and len(picks) == len(x) and picks[-1] < n
            assert nfps.sum() == n and (cps[:, 1] - cps[:, 0] + 1 == nfps).all()
        assert json.loads(f.attrs["avstore"])["towers"] == ["joint"]
    back = read(file).videos["video_2"]
    np.testing.assert_array_equal(back.features[:, 0], rows[place + np.array([15 * k // 8 for k in range(5)]), 0])
    with pytest.raises(ConflictError, match="no model over several snippets"):
        joint_rows(store, "mine", planted_run(), np.array([0]))
    other = planted_run(snippets=3, hop=2.0)
    other.checkpoints = lambda: [SimpleNamespace(step=8, digest="d8")]
    with pytest.raises(ConflictError, match="does not hold the checkpoint"):
        joint_rows(store, "mine", other, np.array([0]))


def test_towers_side_by_side_and_summaries_of_them(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "both.h5"
    done = export_eccv16(store, file, "mine", ["video", "audio"], np.array([0, 1]))
    assert done.videos == 2
    x = read(file).videos["video_1"].features
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose((x[:, :3] ** 2).sum(1), 0.5, atol=1e-3)  # half of it sight
    with pytest.raises(UsageError, match="each once"):
        export_eccv16(store, tmp_path / "x.h5", "mine", ["video", "video"])
    command = ["export", str(store.path), str(tmp_path / "y.h5"), "--layout", "eccv16", "--tower", "joint"]
    assert invoke(command) == 4 and "beside the store" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    known = {}
    for name, n in (("one", 168), ("two", 64)):
        scores, segments = rng.random((3, n)).astype(np.float32), np.array([[i, i + 3] for i in range(0, n, 4)])
        summaries = np.stack([summary_of(s, segments) for s in scores])
        known[name] = Annotated(name, n, summaries, scores, segments, np.arange(0, n, 15))
    people = Annotations("toy", "best", known)
    with_people = tmp_path / "people.h5"
    export_eccv16(store, with_people, "mine", ["video", "audio"], np.array([0, 1]), annotations=people)
    assert invoke(["bench", "summarize", str(with_people), "--splits", "2", "--epochs", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any("people" in str(r["scores"]) and 0 <= r["F"] <= 1 for r in rows)  # `features` of the file itself
    bench = ["bench", "summarize", str(with_people), "--splits", "2", "--epochs", "1", "--json"]
    named = []
    for folder in ("a", "b"):  # two files of one name are two rows
        (tmp_path / folder).mkdir()
        named += ["--features", str(shutil.copy(with_people, tmp_path / folder / "f.h5"))]
    assert invoke([*bench, *named, "--features", str(with_people)]) == 0
    rows = [r["scores"] for r in json.loads(capsys.readouterr().out)["rows"]]
    assert rows[:3] == [f"DR-DSN on {n}" for n in (*named[1::2], "people")]
    assert invoke([*bench, *named[:2], *named[:2]]) == 2 and "given twice" in capsys.readouterr().err


def test_silent_videos_are_summarised_too(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S0 Table 2: where a tower is made of sound, a silent video's rows are zeros, and one file fits the other."""
    rng, known = np.random.default_rng(0), {}
    for name, number in (("one", 0), ("two", 1), ("three", 2)):
        n = source_frames(store, number)[1]
        scores = rng.random((3, n)).astype(np.float32)
        segments = np.array([[i, min(i + 3, n - 1)] for i in range(0, n, 4)])
        summaries = np.stack([summary_of(s, segments) for s in scores])
        known[name] = Annotated(name, n, summaries, scores, segments, np.arange(0, n, 15))
    people = Annotations("toy", "best", known)
    files = {t: tmp_path / f"{'-'.join(t)}.h5" for t in (("video",), ("audio",), ("video", "audio"))}
    for towers, file in files.items():
        done = export_eccv16(store, file, "mine", list(towers), annotations=people)
        assert done.videos == 3 and not done.left_out
        silent = [("dogs/three.mp4", "it is silent: zeros for its sound")]
        assert done.filled == (silent if "audio" in towers else [])
    found = {t: {v.name: v.features for v in read(f).videos.values()} for t, f in files.items()}
    assert not found["audio",]["three"].any() and found["audio",]["two"].any()
    together = found["video", "audio"]["three"]
    np.testing.assert_allclose(together[:, :3], found["video",]["three"] / np.sqrt(2), atol=1e-3)
    assert not together[:, 3:].any()
    command = ["export", str(store.path), str(tmp_path / "c.h5"), "--layout", "eccv16", "--tower", "audio", "--json"]
    assert invoke([*command, "--annotations", str(files["video",])]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["filled"][0]["key"] == "dogs/three.mp4" and "it is silent" in said.err
    bench = ["bench", "summarize", str(files["video",]), "--splits", "2", "--epochs", "1", "--json"]
    assert invoke([*bench, *(x for f in files.values() for x in ("--features", str(f)))]) == 0
    rows = [r["scores"] for r in json.loads(capsys.readouterr().out)["rows"]]
    assert rows[:3] == ["DR-DSN on video", "DR-DSN on audio", "DR-DSN on video-audio"]


def said(n_frames: int, name: str = "two") -> Annotations:
    scores = np.zeros((2, n_frames), np.float32)
    scores[:, 5:14] = 1
    segments = np.array([[0, 19], [20, n_frames - 1]])
    return Annotations(
        "toy", "best", {name: Annotated(name, n_frames, scores > 0, scores, segments, np.arange(0, n_frames, 15))}
    )


def test_what_people_said_goes_with_their_frames(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "with.h5"
    assert export_eccv16(store, file, annotations=said(64)).videos == 1
    whole = read(file)
    assert (whole.name, whole.measure) == ("toy", "best")  # said in the file, whatever it is called
    back = whole.videos["video_1"]
    assert back.graded and "user_scores" in h5py.File(file)["video_1"]
    bare = {n: dataclasses.replace(v, graded=False) for n, v in said(64).videos.items()}
    export_eccv16(store, tmp_path / "tvsum.h5", annotations=Annotations("toy", None, bare))
    silent = read(tmp_path / "tvsum.h5")
    assert silent.measure is None and not silent.videos["video_1"].graded
    assert back.name == "two" and back.segments.tolist() == [[0, 19], [20, 63]]
    assert back.people.sum() == 18 and (back.people == said(64).videos["two"].people).all()
    with h5py.File(file) as f:
        assert f["video_1/gtscore"][:].tolist() == [0, 0, 0, 0, 0]  # no pick lies in 5 .. 13
    with pytest.raises(ConflictError, match="64 frames, the annotations of two 66"):
        export_eccv16(store, tmp_path / "wrong.h5", annotations=said(66))
    with pytest.raises(NotFoundError, match="not found once"):
        export_eccv16(store, tmp_path / "wrong.h5", annotations=said(64, "four"))
    assert not list(tmp_path.glob("wrong*"))  # nothing half written


def test_nothing_is_replaced_unasked_and_errors_say_what(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "out.h5"
    export_embeddings(store, file)
    before = file.read_bytes()
    with pytest.raises(ConflictError, match="already"):
        export_eccv16(store, file)
    with pytest.raises(NotFoundError):
        export_eccv16(store, file, "mine", "joint", force=True)
    with pytest.raises(UsageError, match="no video"):
        export_embeddings(store, file, numbers=np.array([], int), force=True)
    assert file.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["out.h5", "s.zarr"]
    export_eccv16(store, file, force=True)
    assert file.read_bytes() != before


def test_on_the_command_line(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What export writes, `bench summarize --features` trains on."""
    features, people = tmp_path / "mine.h5", tmp_path / "people.h5"
    command = ["export", str(store.path), str(features), "--layout", "eccv16"]
    assert invoke([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == [{"key": "heard.wav", "why": "it has no pictures"}]
    assert invoke(command) == 5
    with h5py.File(features) as a, h5py.File(people, "w") as b:
        for name, group in a.items():
            n = int(group["n_frames"][()])
            g = b.create_group(name)
            for part in ("picks", "n_frames", "change_points", "video_name"):
                a.copy(group[part], g, part)
            g["user_summary"] = (np.random.default_rng(n).random((3, n)) < 0.15).astype(np.float32)
    capsys.readouterr()
    bench = ["bench", "summarize", str(people), "--features", str(features), "--splits", "1", "--epochs", "1",
             "--measure", "best", "--json"]  # fmt: skip
    assert invoke(bench) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["scores"] == "DR-DSN on mine" and 0 <= rows[0]["F"] <= 1
    assert invoke([*command, "--force", "--run", "none"]) == 4
    assert invoke(["export", str(store.path), str(tmp_path / "x.h5"), "--layout", "zarr"]) == 2
    assert invoke(["export", str(store.path), str(tmp_path / "x.h5"), "--annotations", str(people)]) == 2
    assert invoke(["export", str(store.path), str(tmp_path / "x.h5"), "--tower", "audio"]) == 2
    assert invoke(["export", str(store.path), str(tmp_path / "x.h5"), "--where", "label=owl"]) != 0
    assert not (tmp_path / "x.h5").exists()
