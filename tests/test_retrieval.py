"""Retrieval over a store: sides, planted embeddings, raw controls, folds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import avstore
from avstore.codecs import crc32c
from avstore.durable import canonical_json
from avstore.errors import NotFoundError, UsageError
from avstore.index import choose_run, read_rows, video_means
from avstore.spec import embedding_array
from avstore.store import Store
from benchmarks.raw import raw_features, shrunk
from benchmarks.retrieval import choose_sides, retrieval, trained_on, unseen
from benchmarks.table import Table
from cli.main import invoke
from tests.test_splits import MoreColumns, column
from tests.tiny_run import config, store_in
from tests.tiny_store import Tiny, default_spec, make_store
from trainers import embed
from trainers.loop import train
from trainers.run import Run

LABELS = ["cat", "dog", "owl"]


def write_embeddings(store: Store, run: str, tower: str, vectors: dict[int, np.ndarray], method: str = "avid") -> None:
    """One vector (D,) per video, on each of its seconds, with a little of its own on each second."""
    size = len(next(iter(vectors.values())))
    array = embedding_array(run, tower, size)
    folder = store.path / array.path
    folder.mkdir(parents=True)
    per = store.spec.shard_seconds
    meta = array.metadata(per, store.tape_seconds, {"avstore": {"run": run, "method": method}})
    (folder / "zarr.json").write_bytes(canonical_json(meta))
    rows = np.full((store.tape_seconds, size), np.nan, np.float16)
    for n, v in vectors.items():
        place = store.places[n]
        rows[place : place + int(np.ceil(float(store.seconds(n))))] = v
    for shard in range(store.tape_seconds // per):
        body = rows[shard * per : (shard + 1) * per].astype("<f2").tobytes()
        (store.path / array.key(shard)).write_bytes(body + crc32c(body).to_bytes(4, "little"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    videos = [
        Tiny(2 + i % 2, key=f"{'test' if i % 3 == 0 else 'train'}/{i:02d}.mp4", label=LABELS[i % 3 if i < 9 else i % 2],
             split="test" if i % 3 == 0 else "train")
        for i in range(18)
    ]  # fmt: skip
    return avstore.open(make_store(tmp_path / "s.zarr", videos, default_spec(sample_rate=24000)))


def planted(store: Store, run: str, noise: float = 0.05, method: str = "avid", seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    own = {int(n): rng.normal(size=8) for n in store.numbers}
    for tower in ("video", "audio"):
        vectors = {}
        for n, label in zip(store.numbers.tolist(), store.column("label"), strict=True):
            base = np.zeros(8)
            base[LABELS.index(label)] = 3
            vectors[n] = base + noise * own[n]
        write_embeddings(store, run, tower, vectors, method)


def cell(table: Table, level: str, pair: str, features: str, column: str) -> float:
    rows = [r for r in table.rows if (r["level"], r["pair"], r["features"]) == (level, pair, features)]
    assert len(rows) == 1, [r["features"] for r in table.rows]
    return rows[0][column]


def test_planted_embeddings_are_found_and_chance_is_exact(store: Store) -> None:
    planted(store, "r")
    table = retrieval(store, ["r"], seeds=0)
    for pair in ("v-v", "a-a", "v-a", "a-v"):
        assert cell(table, "class", pair, "avid", "R@1") == 1.0
    gallery = store.column("label", store.select(where=["split=train"]).numbers)
    queries = store.column("label", store.select(where=["split=test"]).numbers)
    expected = np.mean([gallery.count(q) / len(gallery) for q in queries])
    assert cell(table, "class", "v-v", "chance", "R@1") == pytest.approx(expected)
    # instance: the same vector in both towers, so each finds itself among the queries; chance is 1 / 6
    assert cell(table, "instance", "v-a", "avid", "R@1") == 1.0
    assert cell(table, "instance", "v-a", "chance", "R@1") == pytest.approx(1 / 6)
    assert not [r for r in table.rows if r["level"] == "instance" and r["pair"] in ("v-v", "a-a")]
    assert {"raw pixels 16x16", "motion energy", "spectrogram mean + sd"} <= {r["features"] for r in table.rows}
    assert "R@20" not in table.columns or all("R@20" not in r for r in table.rows)  # gallery of 12
    json.dumps(table.to_json(), allow_nan=False)
    assert table.to_markdown().count("\n|") == len(table.rows) + 2


def test_queries_that_are_not_ok_are_told(tmp_path: Path) -> None:
    videos = [Tiny(2, key=f"{i:02d}.mp4", label=LABELS[i % 3], split="test" if i < 6 else "train",
                   status="failed" if i == 0 else "ok") for i in range(18)]  # fmt: skip
    store = avstore.open(make_store(tmp_path / "s.zarr", videos, default_spec(sample_rate=24000)))
    planted(store, "r")
    told = "1 of the 6 videos that column split tests are not ok"
    assert any(told in n for n in retrieval(store, ["r"], seeds=0, raw=False).notes)
    assert not any(told in n for n in retrieval(store, ["r"], seeds=0, raw=False, fold_count=2).notes)


def test_runs_of_one_method_are_one_row_with_their_spread(store: Store) -> None:
    planted(store, "a", noise=0.05)
    planted(store, "b", noise=4.0, seed=1)
    merged = retrieval(store, ["a", "b"], seeds=0, raw=False, levels=["class"])
    each = retrieval(store, ["a", "b"], seeds=0, raw=False, levels=["class"], each=True)
    x, y = (cell(each, "class", "v-v", r, "R@1") for r in ("a", "b"))
    assert cell(merged, "class", "v-v", "avid", "R@1") == pytest.approx((x + y) / 2)
    assert cell(merged, "class", "v-v", "avid", "sd R@1") == pytest.approx(abs(x - y) / np.sqrt(2))


def test_folds_and_leaks(store: Store) -> None:
    planted(store, "r")
    table = retrieval(store, ["r"], seeds=0, raw=False, fold_count=3, levels=["class"])
    assert cell(table, "class", "v-v", "avid", "of") == 3
    sides = choose_sides(store, fold_count=3)
    assert sorted(np.concatenate([s.queries for s in sides]).tolist()) == store.numbers.tolist()
    for s in sides:
        assert not np.intersect1d(s.queries, s.gallery).size
    assert unseen(sides, sides[1].gallery) == ([sides[1]], 0)  # trained on all but fold 1: asked fold 1 only
    everything, leaked = unseen(sides, store.numbers)
    assert everything == sides and leaked == 18
    assert trained_on(Path("no/such/run"), store) is None


def test_sides_are_asked_for_where_there_are_no_splits(tmp_path: Path) -> None:
    store = avstore.open(make_store(tmp_path / "n.zarr", [Tiny(2, key=f"{i}.mp4", label="x") for i in range(4)]))
    with pytest.raises(UsageError, match="no train and test split") as e:
        choose_sides(store)
    assert "--gallery" in e.value.next and "--folds" in e.value.next
    with pytest.raises(UsageError, match="both query and gallery"):
        choose_sides(store, gallery=["label=x"], queries=["label=x"])
    with pytest.raises(UsageError):
        choose_sides(store, gallery=["label=x"])
    with pytest.raises(NotFoundError, match="labl"):
        choose_sides(store, gallery=["labl=x"], queries=["label=x"])


def test_refuses_embeddings_that_are_not_finite(store: Store) -> None:
    vectors = {int(n): np.ones(4) for n in store.numbers}
    vectors[3] = np.array([1, np.nan, 1, 1])
    write_embeddings(store, "r", "video", vectors)
    with pytest.raises(UsageError, match="not finite"):
        retrieval(store, ["r"], seeds=0, raw=False)


def test_a_video_without_a_label(store: Store) -> None:
    planted(store, "r")
    with pytest.raises(NotFoundError, match="lable"):
        retrieval(store, ["r"], label="lable", seeds=0, raw=False)
    with pytest.raises(UsageError, match="have no reason"):
        retrieval(store, ["r"], label="reason", seeds=0, raw=False)


def test_means_are_of_normalised_seconds(store: Store) -> None:
    write_embeddings(store, "r", "video", {int(n): np.array([0.0, 5.0 + n]) for n in store.numbers})
    means, who = video_means(store, read_rows(store, "r", "video"))
    assert who.tolist() == store.numbers.tolist()
    assert means == pytest.approx(np.tile([0.0, 1.0], (18, 1)))
    some, who = video_means(store, read_rows(store, "r", "video"), np.array([5, 2]))
    assert sorted(who.tolist()) == [2, 5] and some.shape == (2, 2)


def test_the_run_to_ask(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no embeddings"):
        choose_run(store, None)
    planted(store, "first")
    assert choose_run(store, None) == "first" == choose_run(store, "runs/first")
    planted(store, "second")
    with pytest.raises(UsageError, match="2 runs"):
        choose_run(store, None)
    with pytest.raises(NotFoundError, match="did you mean first"):
        choose_run(store, "frist")


def test_raw_features_see_what_is_there(store: Store) -> None:
    raw = raw_features(store, store.numbers)
    assert raw.features["mean frame"].shape == (18, 16 * 16 * 3)
    assert raw.features["raw pixels 16x16"].shape == (18, 16 * 16 * 16)
    assert raw.features["spectrogram mean"].shape == (18, 257)
    assert all(np.isfinite(f).all() for f in raw.features.values())
    # video 17 shows other blocks than video 3: their mean frames differ by more than JPEG noise
    assert np.abs(raw.features["mean frame"][17] - raw.features["mean frame"][3]).max() > 0.1


def test_shrunk_averages_areas() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[0:2, 2:4, 0] = 255
    picture[4, 4, 1] = 255
    out = shrunk(picture)
    assert out[0, 1, 0] == 1.0 and out[2, 2, 1] == 0.25 and out.sum() == pytest.approx(1.25)
    assert shrunk(np.full((50, 50, 3), 51, np.uint8)) == pytest.approx(np.full((16, 16, 3), 0.2))


def test_a_store_of_sound_is_told_of_nothing_it_cannot_have(tmp_path: Path) -> None:
    videos = [Tiny(2, key=f"{i}.wav", label=LABELS[i % 2], split="test" if i % 3 == 0 else "train", picture=False)
              for i in range(9)]  # fmt: skip
    store = avstore.open(make_store(tmp_path / "a.zarr", videos, default_spec(sample_rate=24000)))
    rng = np.random.default_rng(0)
    vectors = {int(n): rng.normal(size=8) for n in store.numbers}
    write_embeddings(store, "r", "audio", vectors)
    write_embeddings(store, "r", "video", {0: np.full(8, np.nan), 1: np.full(8, np.nan)})
    table = retrieval(store, ["r"], seeds=0, raw=False)
    assert {r["pair"] for r in table.rows} == {"a-a"}
    assert not [n for n in table.notes if "pictures" in n or "embeddings of" in n]


def test_queries_that_lack_a_modality_or_its_embeddings_are_counted(tmp_path: Path) -> None:
    videos = [Tiny(2, key=f"{i}.mp4", label="cat", split="test" if i < 4 else "train", sound=None if i == 0 else -1.0)
              for i in range(8)]  # fmt: skip
    store = avstore.open(make_store(tmp_path / "m.zarr", videos, default_spec(sample_rate=24000)))
    rng = np.random.default_rng(0)
    write_embeddings(store, "r", "video", {int(n): rng.normal(size=8) for n in store.numbers if n != 1})
    write_embeddings(store, "r", "audio", {int(n): rng.normal(size=8) for n in store.numbers if n != 0})
    notes = retrieval(store, ["r"], seeds=0, raw=False, levels=["class"]).notes
    assert "1 queries have no sound: left out where they would need it" in notes
    assert "1 queries have no v embeddings of avid: left out" in notes
    assert not [n for n in notes if "no a embeddings" in n]


def test_equal_random_networks_count_once_and_other_stores_are_named(tmp_path: Path) -> None:
    store = store_in(tmp_path / "here", codec="jpeg")
    for name, sets in (("a", ()), ("b", ("learning_rate=0.001",)), ("c", ("width=8",))):
        train("avid", store, config("steps=1", *sets), tmp_path / "runs" / name)
        write_embeddings(store, name, "video", {int(n): np.eye(12)[n] for n in store.numbers})
    folders = {name: tmp_path / "runs" / name for name in "abc"}
    for names, count in ((["a"], 1), (["a", "b"], 1), (["a", "b", "c"], 2)):
        table = retrieval(store, names, seeds=1, raw=False, levels=["class"], run_paths=folders)
        assert cell(table, "class", "v-v", "random weights", "of") == count
        assert not [n for n in table.notes if "unknown" in n or "not known" in n]
    other = store_in(tmp_path / "there", codec="jpeg", fps=8)
    write_embeddings(other, "a", "video", {int(n): np.eye(12)[n] for n in other.numbers})
    notes = retrieval(other, ["a"], seeds=0, raw=False, levels=["class"], run_paths=folders).notes
    assert "a: trained on another store, tiny.zarr; whether these videos were in it is not known" in notes
    notes = retrieval(other, ["a"], seeds=0, raw=False, levels=["class"]).notes
    assert [n for n in notes if n.startswith("a: its folder is not at")]


class Splits(MoreColumns):
    """The store with three official splits in place of its own: every third video asks, from the i-th on."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, {f"split{i + 1}": column(test=set(range(i, 18, 3)), n=18) for i in range(3)})


def test_official_splits_are_averaged_and_each_is_shown(store: Store) -> None:
    planted(store, "r", noise=2.0)
    splits = Splits(store)
    every = retrieval(splits, ["r"], seeds=0, raw=False, levels=["class"])
    assert cell(every, "class", "v-v", "avid", "of") == 3
    alone = [cell(retrieval(splits, ["r"], seeds=0, raw=False, levels=["class"], split_columns=[f"split{i}"]),
                  "class", "v-v", "avid", "R@1") for i in (1, 2, 3)]  # fmt: skip
    assert cell(every, "class", "v-v", "avid", "R@1") == pytest.approx(np.mean(alone))
    assert cell(every, "class", "v-v", "avid", "sd R@1") == pytest.approx(np.std(alone, ddof=1))
    assert cell(every, "class", "v-v", "avid", "R@1 of parts") == tuple(round(v, 3) for v in alone)
    assert "R@1 of parts" in every.columns and "split2: queries test, gallery train" in every.notes[0]
    with pytest.raises(UsageError, match="--folds with --split"):
        retrieval(splits, ["r"], split_columns=["split1"], fold_count=2)


def test_two_runs_are_tested_over_splits_or_queries(store: Store) -> None:
    planted(store, "good", method="avid")
    planted(store, "bad", noise=30.0, seed=1, method="avcl")
    notes = retrieval(Splits(store), ["good", "bad"], seeds=0, raw=False, levels=["class"]).notes
    (line,) = [n for n in notes if n.startswith("class v-v, R@1: avid - avcl")]
    assert "over 3 splits; sign-flip p 0.25" in line  # 2 / 2^3: what three splits can give at best
    table = retrieval(store, ["good", "bad"], seeds=0, raw=False, levels=["class"])
    (line,) = [n for n in table.notes if n.startswith("class v-v, R@1: avid - avcl")]
    a, b = (cell(table, "class", "v-v", m, "R@1") for m in ("avid", "avcl"))
    assert f"{a - b:+.3f}" in line and "over 6 queries" in line and "says nothing of other seeds" in line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    folder = tmp_path_factory.mktemp("retrieval")
    store = store_in(folder, codec="jpeg")
    return store, train("avid", store, config("steps=1"), folder / "runs" / "mine").run.path


def test_blocks_and_protocols_are_kept(
    trained: tuple[Store, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run = trained
    base = ["bench", "retrieval", str(store.path), "--run", str(run), "--block", "conv3x", "--block", "conv5x",
            "--as", "VCOP", "--as", "SeLaVi", "--clips", "2", "--no-raw", "--published", "HMDB51", "--json",
            "--work", str(tmp_path / "work")]  # fmt: skip
    assert invoke(base) == 0, capsys.readouterr().err
    table = json.loads(capsys.readouterr().out)
    rows = {(r["pair"], r["features"]) for r in table["rows"] if r["level"] == "class"}
    for name in ("avid", "random weights"):
        assert {("v-v", f"{name} conv3x"), ("a-a", f"{name} conv5x"), ("v-v", f"{name} as VCOP")} <= rows
        assert ("a-a", f"{name} as SeLaVi") not in rows  # it is of sight
    assert ("v-v", "published: IIC, repeat") in rows and ("v-v", "avid") not in rows
    told = "\n".join(table["notes"])
    assert "2 evenly spaced clips" in told and "as SeLaVi: 32 frames at 16 fps" in told and "published: theirs" in told
    kept = len(list((tmp_path / "work").glob("*.npz")))
    assert kept == 12  # two networks, each: two blocks of two modalities, two protocols

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("benchmarks.blocks.picture_blocks", never)
    monkeypatch.setattr("benchmarks.blocks.sound_blocks", never)
    assert invoke(base) == 0
    assert json.loads(capsys.readouterr().out) == table
    assert invoke([*base, "--seeds", "2"]) != 0  # another network is not there yet


def test_a_checkpoint_s_heads_are_what_embed_writes(trained: tuple[Store, Path]) -> None:
    store, path = trained
    run = Run(path)
    embed.embed(run, store, name="written")
    written = retrieval(store, ["written"], seeds=0, raw=False, run_paths={"written": path})
    computed = retrieval(store, ["mine"], seeds=0, raw=False, run_paths={"mine": path}, checkpoints=["latest"])
    a = {(r["level"], r["pair"], r["features"]): r["mAP"] for r in written.rows}
    b = {(r["level"], r["pair"], r["features"].replace(" step 1", "")): r["mAP"] for r in computed.rows}
    assert a.keys() == b.keys() and a == pytest.approx(b, abs=2e-3)  # float16 in the store


@pytest.mark.parametrize(("words", "told"), [
    (["--block", "conv6x"], "no block"),
    (["--as", "IIC"], "no protocol"),
    (["--published", "ESC-50"], "no published figures"),
    (["--clips", "0"], "0 clips"),
    (["--split", "split7"], "no column 'split7'"),
    (["--checkpoint", "latest", "--all-checkpoints"], "one, or all"),
    (["--checkpoint", "77"], "no checkpoint 77"),
    (["--label", "lable", "--class"], "lable"),
    (["--gallery", "split=train", "--queries", "split=nothing"], "no videos are left"),
])  # fmt: skip
def test_what_cannot_be_asked_is_told(
    trained: tuple[Store, Path], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    store, run = trained
    block = [] if "--block" in words or "--checkpoint" in words else ["--block", "conv5x"]
    arguments = ["bench", "retrieval", str(store.path), "--run", str(run), "--no-raw", "--seeds", "0", *block, *words]
    assert invoke(arguments) in (2, 4)
    assert told in capsys.readouterr().err


def test_a_store_made_alike_is_another_store(tmp_path: Path) -> None:
    a, b = store_in(tmp_path / "a"), avstore.open(
        make_store(tmp_path / "b.zarr", [Tiny(2.0, key=f"other/{i}.mp4", label="a") for i in range(12)],
                   default_spec(sample_rate=24000))
    )  # fmt: skip
    assert a.fingerprint == b.fingerprint
    run = train("avid", a, config("epochs=1"), tmp_path / "run").run
    found = trained_on(run.path, a)
    assert found is not None and len(found) == 10
    assert trained_on(run.path, b) is None
