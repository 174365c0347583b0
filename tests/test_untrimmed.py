"""Moments of long videos: selectors by hand, and a preview that finds the one moment that tells the class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import config, store_in
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.errors import CorruptError, UsageError
from benchmarks import look, moments, untrimmed
from benchmarks.probing import Part
from cli.main import invoke
from trainers import embed, preview
from trainers.config import resolve
from trainers.loop import train


def test_selectors_by_hand():
    assert untrimmed.uniform(10, 2).tolist() == [2, 7]
    assert untrimmed.uniform(3, 10).tolist() == [0, 1, 2]
    assert untrimmed.first(5, 3).tolist() == [0, 1, 2]
    one, more = untrimmed.drawn(20, 3, 7, 0), untrimmed.drawn(20, 5, 7, 0)
    assert len(set(more.tolist())) == 5 and more[:3].tolist() == one.tolist()
    assert untrimmed.drawn(20, 5, 8, 0).tolist() != more.tolist()


def planted(videos: int = 90, length: int = 12) -> tuple[list[np.ndarray], np.ndarray]:
    """One moment of each video tells its class, and is loud in a feature of its own; all others are noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(videos) % 3
    features = []
    for y in labels:
        x = rng.normal(size=(length, 8)).astype(np.float32) * 0.3
        at = rng.integers(length)
        x[at, y] += 3
        x[at, 7] += 4
        features.append(x)
    return features, labels


def test_a_preview_finds_what_chance_misses():
    features, labels = planted()
    part = Part("half", np.arange(0, 60), np.arange(60, 90))
    recipe = preview.PreviewConfig(
        steps=2, hidden=32, dim=16, learning_rate=0.3, classifier_rate=1.0, batch=20, epochs=80, milestones=(60,)
    )

    def select(x, y):
        return preview.fit(x, y, 3, (8,), config=recipe).choose

    rows = untrimmed.evaluate(features, labels, [part], select, classes=3, budgets=(1, 12), random_draws=5)
    found = {(r["selector"], r["moments"]): r for r in rows}
    learned, random = found["learned preview", 1], found["random", 1]
    assert learned["top-1"] > random["top-1"] + 0.2 and learned["mAP"] > random["mAP"]
    assert learned["cost"] == random["cost"] == 1
    whole = {r["top-1"] for r in rows if r["moments"] in (12, "all")}
    assert len(whole) == 1  # who sees everything sees the same
    with pytest.raises(UsageError, match="budgets"):
        untrimmed.evaluate(features, labels, [part], select, classes=3, budgets=(0,))


def test_on_the_command_line(tmp_path, capsys):
    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=2"), tmp_path / "runs" / "mine").run
    asked = ["bench", "untrimmed", str(store.path), "--folds", "2", "--budget", "1", "--epochs", "1",
             "--preset", "tiny", "--json"]  # fmt: skip
    assert invoke(asked) in (2, 4)  # nothing is embedded yet
    capsys.readouterr()
    embed.embed(run, store)
    assert invoke(asked) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["selector"] for r in rows} == {"learned preview", "random", "uniform", "first", "all"}
    other = train("avid", store, config("steps=2", "learning_rate=0.1"), tmp_path / "runs" / "other").run
    embed.embed(other, store)
    assert invoke([*asked, "--run", "mine", "--run", "other", "--seeds", "2"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {(r["run"], r["of"]) for r in table["rows"]} == {("mine", 4), ("other", 4)}
    assert any(n.startswith("1 moments, learned preview: mine - other") and "over 4 parts" in n for n in table["notes"])
    assert any(n.startswith("mine, 1 moments: learned preview - uniform") for n in table["notes"])
    one = [a for a in asked if a not in ("--folds", "2")]
    for words, told in ((["--split", "split9", "--run", "mine"], "no column"), (["--run", "nobody"], "no embeddings"),
                        (["--budget", "0", "--run", "mine"], "budgets"), (["--all-checkpoints"], "no run is named"),
                        (["--seeds", "0", "--run", "mine"], "0 seeds"), ([], "embeddings of 2 runs")):  # fmt: skip
        assert invoke([*one, *words]) in (2, 4), words
        assert told in capsys.readouterr().err


def test_a_bench_that_was_stopped_goes_on_from_its_folder(tmp_path, monkeypatch):
    """Stopped within each part; what is finished is not done again, the table is that of an unbroken one; what another
    question or other moments would give is not taken for it; damage is told."""
    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=2"), tmp_path / "runs" / "mine").run
    embed.embed(run, store)
    asked = {"budgets": (1, 2), "random_draws": 3, "preset": "tiny", "epochs": 1, "fold_count": 2, "seeds": 2}
    whole = untrimmed.bench(store, "mine", **asked)
    work, fitted, real = tmp_path / "work", [], untrimmed.fit

    def fit(*args, **options):
        fitted.append(1)
        if len(fitted) % 2 == 0:  # every second time: a part is finished, the next is not
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(untrimmed, "fit", fit)
    for finished in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            untrimmed.bench(store, "mine", work=work, **asked)
        assert len(list(work.glob("*.json"))) == finished
    assert untrimmed.bench(store, "mine", work=work, **asked).rows == whole.rows  # two seeds of two parts
    assert len(fitted) == 7 and len(list(work.glob("*.json"))) == 4
    kept = tmp_path / "kept.safetensors"
    monkeypatch.setattr(untrimmed, "fit", lambda *a, **k: pytest.fail("done again"))
    again = untrimmed.bench(store, "mine", work=work, **asked)
    assert again.rows == whole.rows and again.notes == whole.notes
    monkeypatch.setattr(untrimmed, "fit", real)
    plain = tmp_path / "plain.safetensors"  # the preview itself is no part of the folder: it is trained again, equal
    untrimmed.bench(store, "mine", work=work, keep=kept, **asked)
    untrimmed.bench(store, "mine", keep=plain, **asked)
    assert kept.read_bytes() == plain.read_bytes()
    for other in ({"epochs": 2}, {"budgets": (1, 3)}, {"random_draws": 4}, {"fold_seed": 1}):
        before = len(list(work.glob("*.json")))
        found = untrimmed.bench(store, "mine", work=work, **{**asked, "seeds": 1, **other})
        assert found.rows == untrimmed.bench(store, "mine", **{**asked, "seeds": 1, **other}).rows
        assert len(list(work.glob("*.json"))) == before + 2, other
    stale = moments.of_store(store, "mine", {"fold_count": 2})
    assert stale.digest() == moments.of_store(store, "mine", {"fold_count": 2}).digest()
    more = train("avid", store, config("steps=4"), tmp_path / "more").run
    embed.embed(more, store, name="other")
    assert moments.of_store(store, "other", {"fold_count": 2}).digest() != stale.digest()
    for file in work.glob("*.json"):
        file.write_bytes(b"{torn")
    with pytest.raises(CorruptError):
        untrimmed.bench(store, "mine", work=work, **asked)


def test_moments_of_checkpoints_are_kept(tmp_path, monkeypatch):
    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=2"), tmp_path / "runs" / "mine").run
    asked = {"budgets": (1,), "preset": "tiny", "epochs": 1, "fold_count": 2, "checkpoints": [2],
             "run_paths": {"mine": run.path}, "work": tmp_path / "work"}  # fmt: skip
    first = untrimmed.bench(store, "mine", **asked)
    monkeypatch.setattr(embed, "embed_videos", lambda *a, **k: pytest.fail("computed again"))
    monkeypatch.setattr(untrimmed, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert untrimmed.bench(store, "mine", **asked).rows == first.rows


@pytest.mark.slow
def test_a_killed_bench_goes_on_from_its_folder(tmp_path, capsys):
    """SIGKILL as soon as one part is kept; the command again prints what an unbroken one prints."""
    import os
    import signal
    import subprocess
    import sys
    import time

    store = store_in(tmp_path, codec="jpeg")
    embed.embed(train("avid", store, config("steps=2"), tmp_path / "runs" / "mine").run, store)
    work = tmp_path / "work"
    asked = ["bench", "untrimmed", str(store.path), "--folds", "3", "--seeds", "3", "--preset", "tiny", "--json"]
    assert invoke(asked) == 0
    whole = json.loads(capsys.readouterr().out)
    words = [sys.executable, "-c", "from cli.main import run; run()", *asked, "--work", str(work)]
    root = str(Path(__file__).resolve().parents[1])
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root})
    until = time.monotonic() + 120
    while not list(work.glob("*.json")) and child.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = {f.name: f.stat().st_mtime_ns for f in work.glob("*.json")}
    assert child.returncode == -signal.SIGKILL and 1 <= len(finished) < 9
    assert invoke([*asked, "--work", str(work)]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == whole["rows"]
    assert len(list(work.glob("*.json"))) == 9
    assert all((work / name).stat().st_mtime_ns == at for name, at in finished.items())


def test_tested_videos_that_are_lost_are_told(tmp_path):
    made = [Tiny(2.0, key=f"{i}.mp4", label="ab"[i % 2], split="test" if i > 7 else "train",
                 status="failed" if i == 9 else "ok") for i in range(12)]  # fmt: skip
    store = avstore.open(make_store(tmp_path / "lost.zarr", made, default_spec(sample_rate=24000, codec="jpeg")))
    run = train("avid", store, config("steps=1"), tmp_path / "runs" / "mine").run
    embed.embed(run, store)
    table = untrimmed.bench(store, "mine", budgets=(1,), preset="tiny", epochs=1)
    assert any(n.startswith("1 of the 4 videos that column split tests are not ok") for n in table.notes)
    assert any("over 3 test videos" in n and "nothing of other seeds" in n for n in table.notes)


def test_what_networks_give_now_is_what_is_stored(tmp_path):
    """Moments joined over towers: zeros where sound is missing; the same from a checkpoint as from the store."""
    x = (np.array([[1.0], [2.0], [3.0]]), np.array([5, 5, 4]), np.array([1, 0, 0]))
    y = (np.array([[7.0]]), np.array([5]), np.array([1]))
    four, five = moments.joined([x, y], np.array([4, 5]))
    assert four.features.tolist() == [[3, 0]] and five.features.tolist() == [[2, 0], [1, 7]]
    assert four.seconds.tolist() == [0] and five.seconds.tolist() == [0, 1]
    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=2"), tmp_path / "runs" / "mine").run
    embed.embed(run, store)
    towers = ["video-trunk", "audio-trunk"]
    stored, sizes = moments.stored(store, "mine", store.numbers, towers)
    now = moments.of_checkpoint(store, run, "latest", "cpu", {"fold_count": 2})
    assert sizes == now.widths and now.probed.numbers.tolist() == store.numbers.tolist()
    for a, b in zip(stored, now.moments, strict=True):
        np.testing.assert_allclose(a.features, b.features, rtol=2e-3, atol=2e-3)
        assert a.seconds.tolist() == b.seconds.tolist()
    assert now.fusion is None and now.classifier is None  # no student
    assert any("saw 10 of 12 tested videos" in n for n in now.told)


def test_one_part_and_one_seed_are_compared_over_test_videos():
    features, labels = planted(60)
    part = Part("half", np.arange(0, 40), np.arange(40, 60))

    def loudest(train, train_labels):
        return lambda x, k: x[:, 7].argsort()[::-1][:k]

    rows = untrimmed.evaluate(features, labels, [part], loudest, classes=3, budgets=(1,), random_draws=4)
    found = {r["selector"]: r for r in rows}
    for r in rows:
        assert len(r["right"]) == 20 and np.mean(r["right"]) == pytest.approx(r["top-1"])
    assert set(found["random"]["right"]) <= {0, 0.25, 0.5, 0.75, 1}
    told = untrimmed.differences(rows)
    line = next(n for n in told if n.startswith("1 moments: learned preview - random"))
    mean = found["learned preview"]["top-1"] - found["random"]["top-1"]
    assert f"random: {mean:+.3f}" in line and "over 20 test videos" in line
    assert mean > 0.2 and float(line.split("sign-flip p ")[1].split(",")[0]) < 0.01
    # two parts: over them, as everywhere
    both = [part, Part("b", part.test, part.train)]
    two = untrimmed.evaluate(features, labels, both, loudest, classes=3, budgets=(1,))
    assert any("over 2 parts and seeds" in n for n in untrimmed.differences(two))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A store, a run of AVID and a student of it, both embedded; cwd beside their runs."""
    folder = tmp_path_factory.mktemp("student")
    store = store_in(folder)
    avid = train("avid", store, config("steps=2"), folder / "runs" / "avid").run
    small = "width=4 hidden=16 dim=32 frames=4 size=32 seconds=0.5 batch=5 epochs=2 draws=1 statistics_clips=16"
    sets = [*small.split(), "in_process=true", "threads=1", "precision=fp32", f"teacher={avid.path}"]
    asked = resolve("listen-to-look", preset="tiny", sets=sets)
    run = train("listen-to-look", store, asked, folder / "runs" / "listen-to-look").run
    embed.embed(run, store)
    return store, run


def test_the_preview_of_a_student_uses_its_fusion_and_classifier(student, monkeypatch):
    store, run = student
    given = moments.of_store(store, "listen-to-look", {})
    method = run.load()
    assert given.towers == ("video-trunk", "audio-trunk") and given.fusion.inputs == sum(given.widths)
    for a, b in zip(given.fusion.parameters(), method.fusion.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(given.classifier.weight, method.classifier.weight)  # its classes are the store's, in order
    swapped, _, told = moments.student(method, given.towers, ("b", "a"), "x")[1], *moments.student(
        method, given.towers, ("b", "a", "c"), "x")[1:]  # fmt: skip
    assert torch.equal(swapped.weight, method.classifier.weight[[1, 0]]) and "other classes" in told[0]
    # the preview that is fitted, and the moments that all selectors are scored on, are Psi's
    fitted, scored = [], []
    real = untrimmed.fit

    def fit(*args, **options):
        fitted.append((options["fusion"], options["classifier"]))
        return real(*args, **options)

    def classifier(features, labels, classes):
        scored.append(features)
        return lambda x: np.full((len(x), classes), 1 / classes)

    monkeypatch.setattr(untrimmed, "fit", fit)
    monkeypatch.setattr(untrimmed, "_classifier", classifier)
    table = untrimmed.bench(store, "listen-to-look", budgets=(1,), random_draws=1, preset="tiny", epochs=1)
    ((psi, start),) = fitted
    assert torch.equal(psi[0].weight, method.fusion[0].weight) and torch.equal(start.bias, method.classifier.bias)
    assert {x.shape[1] for x in scored[0]} == {32}
    assert any("is a student: its Psi" in n for n in table.notes) and any("73.5 / 35.5" in n for n in table.notes)
    with pytest.raises(UsageError, match="no preset"):
        untrimmed.bench(store, "listen-to-look", preset="tny")


def test_a_preview_is_kept_and_says_where_it_looks(student, tmp_path, capsys):
    store, _ = student
    file, key = tmp_path / "look.safetensors", store.key(int(store.numbers[-1]))
    asked = ["bench", "untrimmed", str(store.path), "--preset", "tiny", "--epochs", "2", "--budget", "1"]
    assert invoke([*asked, "--look", key]) == 2  # by which preview?
    assert invoke([*asked, "--keep", str(file), "--look", key, "--json"]) == 0
    first = json.loads([x for x in capsys.readouterr().out.splitlines() if x][-1])["looks"]
    again = ["bench", "untrimmed", str(store.path), "--preview", str(file), "--look", key, "--budget", "2"]
    assert invoke([*again, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["looks"]
    given = moments.of_store(store, "listen-to-look", {})
    at = given.probed.numbers.tolist().index(int(store.numbers[-1]))
    looks = look.kept(file)
    assert (
        found["seconds"] == looks.choose(given.features[at], 2).tolist() and first[0]["seconds"] == found["seconds"][:1]
    )
    np.testing.assert_allclose(found["attention"], looks.attention(given.features[at]).mean(0), atol=1e-5)
    assert sum(found["attention"]) == pytest.approx(1, abs=1e-4) and found["moments"] == [0, 1]
    assert (found["key"], found["run"], found["label"], found["told"] in "ab") == (key, "listen-to-look", "b", True)
    assert looks.about["part"] == "test split, seed 0" and looks.fusion is not None
    assert invoke(again) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{key}: listen-to-look looks at ") and "<- 1" in text and "<- 2" in text
    refused = ((["--look", "none.mp4"], 4, "has no video"), (["--keep", str(file), "--look", key], 2, "keeps nothing"),
               ([], 2, "keeps nothing"))  # fmt: skip
    for words, code, told in refused:
        assert invoke(["bench", "untrimmed", str(store.path), "--preview", str(file), *words]) == code
        assert told in capsys.readouterr().err
    looks.save(tmp_path / "bare.safetensors", {})
    with pytest.raises(CorruptError, match="does not say"):
        look.kept(tmp_path / "bare.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preview_of_long_videos_beats_random_moments(tmp_path):
    """40 videos of 10 s, hiss but for 2 to 3 s that tell the class (8, chance .125). By features of a sound network
    that learned from 64 short clips, the moment that the preview chooses is right more often than a random one, by
    0.08; measured: 0.375, random 0.194, the first 0.150, the middle 0.300, which the event covers oftener than others.
    """
    from avstore.ingest import ingest
    from benchmarks import demo_set

    stores = []
    for name, count, seconds in (("short", 64, 2), ("long", 40, 10)):
        demo_set.generate(tmp_path / name, train=count, test=0, seconds=seconds, long=name == "long", workers=1)
        ingest(tmp_path / name, tmp_path / f"{name}.zarr", size=(32, 48), fps=1, workers=1, front_ends=())
        stores.append(avstore.open(tmp_path / f"{name}.zarr"))
    sets = ["steps=100", "modality=a", "batch=16", "seconds=1", "statistics_clips=64", "threads=1", "in_process=true"]
    asked = resolve("supervised", preset="tiny", sets=sets)
    run = train("supervised", stores[0], asked, tmp_path / "runs" / "heard").run
    embed.embed(run, stores[1])
    table = untrimmed.bench(stores[1], "heard", budgets=(1,), preset="tiny", seeds=2, fold_count=2)
    found = {r["selector"]: r["top-1"] for r in table.rows}
    assert found["learned preview"] > found["random"] + 0.08, found
