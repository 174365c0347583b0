"""Fine-tuning: recipes, parts, what is kept; that it learns, repeats and goes on; the bench with its controls."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import config, store_in

import avstore
from avstore.errors import AvstoreError, ConflictError, CorruptError, UsageError
from benchmarks import blocks, finetune, tuning
from benchmarks.recipe import PRESETS, Recipe, make_recipe
from benchmarks.tuning import Classifier, clips, needs_for, scores, tune
from cli.main import invoke
from trainers.loop import train

FAST = make_recipe("ucf", "v", 4, fps=8, epochs=2, warm_up=1, batch=8, draws=1, clips=2, rate=1e-3, milestones=())

PLAIN = ("crop_area=0.8,1.0", "flip=0", "brightness=0", "contrast=0", "saturation=0", "hue=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    store = store_in(folder, codec="jpeg")
    return store, train("avid", store, config("steps=1", *PLAIN), folder / "runs" / "mine").run


def parts_of(store):
    probed = finetune.choose(store)
    part = probed.parts[0]
    return tuple((probed.numbers[i], probed.labels[i]) for i in (part.train, part.test))


def test_recipes_are_the_published_ones():
    ucf, hmdb = PRESETS["ucf"], PRESETS["hmdb"]
    assert (ucf.epochs, ucf.milestones, ucf.decay, ucf.rate, ucf.optimiser) == (16, (6, 10, 14), 0.3, 1e-4, "adam")
    assert (hmdb.epochs, hmdb.milestones, hmdb.warm_up, hmdb.dropout) == (10, (3, 6, 8), 5, 0.5)
    assert [(make_recipe(p, "v", f).batch, make_recipe(p, "v", f).draws) for p in ("ucf", "hmdb") for f in (8, 32)] == [
        (64, 10), (32, 5), (64, 25), (32, 10),
    ]  # fmt: skip
    av = make_recipe("ucf", "av")
    assert (av.hidden, av.dropout, av.epochs) == (512, 0.7, 16)
    assert make_recipe("ucf", epochs=8).milestones == (3, 5, 7)  # 6, 10, 14 of 16
    assert make_recipe("ucf", epochs=8, milestones=(2,)).milestones == (2,)
    assert make_recipe("ucf", epochs=1).milestones == ()
    assert make_recipe("avcl", "av").select == "validation"
    for wrong in ({"preset": "ufc"}, {"epochs": 0}, {"rate": 0.0}, {"milestones": (3, 2)}, {"modality": "x"},
                  {"fps": 0}, {"dropout": 1.0}, {"select": "first"}):  # fmt: skip
        with pytest.raises(UsageError):
            make_recipe(**wrong)


def test_a_classifier_sits_on_the_pooled_features(trained):
    store, run = trained
    numbers = store.numbers[:2]
    for modality, width in (("v", 32), ("a", 32), ("av", 64)):
        recipe = dataclasses.replace(FAST, modality=modality, hidden=0)
        method = blocks.with_weights(run)
        net = Classifier(method, 3, recipe, seed=0).eval()
        assert net.head[1].in_features == width and isinstance(net.head[0], torch.nn.Dropout)
        order = tuning.SequentialOrder(2, 1, batch_size=2)
        (batch,) = clips(run, store, numbers, needs_for(run, store, recipe), order, torch.device("cpu"))
        with torch.no_grad():
            trunks = method.eval().embed(video=batch.video, audio=batch.audio)
            x = torch.cat([trunks[t] for t in ("video-trunk", "audio-trunk") if t in trunks], 1)
            torch.testing.assert_close(net.features(batch), x)
            torch.testing.assert_close(net(batch), net.head(x))
        assert (batch.video is None) == (modality == "a") and (batch.audio is None) == (modality == "v")
    deep = Classifier(blocks.with_weights(run), 3, make_recipe("ucf", "av"), seed=0).head
    assert [type(m).__name__ for m in deep] == ["Linear", "ReLU", "Dropout", "Linear"] and deep[2].p == 0.7


def test_warm_up_trains_the_classifier_alone(trained):
    store, run = trained
    train_part, test_part = parts_of(store)
    before = {k: v.clone() for k, v in blocks.with_weights(run).named_parameters()}
    for scratch in (False, True):
        method = blocks.with_weights(run)
        calls = []
        real = tuning._optimiser

        def spy(parameters, recipe, calls=calls, real=real):
            parameters = list(parameters)
            calls.append(len(parameters))
            return real(parameters, recipe)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "_optimiser", spy)
            tune(method, run, store, train_part, test_part, 2, dataclasses.replace(FAST, rate=1e-12), scratch=scratch)
        assert len(calls) == (1 if scratch else 2) and (scratch or calls[0] == 2) and calls[-1] > 2
    batch = next(iter(clips(run, store, train_part[0], needs_for(run, store, FAST),
                            tuning.SequentialOrder(10, 1, batch_size=4), torch.device("cpu"))))  # fmt: skip
    method = blocks.with_weights(run)
    net = Classifier(method, 2, FAST, 0).train()
    net(batch, frozen=True).sum().backward()
    assert all(p.grad is None for p in net.nets.parameters()) and all(p.grad is not None for p in net.head.parameters())
    net(batch).sum().backward()
    assert any(p.grad is not None for p in net.nets.parameters())
    assert all(torch.equal(before[k], v) for k, v in blocks.with_weights(run).named_parameters())


def test_equal_seeds_give_equal_bits_and_other_seeds_others(trained):
    store, run = trained
    train_part, test_part = parts_of(store)

    def once(seed):
        method = blocks.with_weights(run)
        out = tune(method, run, store, train_part, test_part, 2, FAST, seed=seed)
        return out, torch.cat([p.detach().flatten() for p in method.parameters()])

    torch.manual_seed(1)
    a, x = once(0)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    b, y = once(0)
    c, z = once(1)
    assert torch.equal(x, y) and not torch.equal(x, z)
    assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)
    assert a.epochs != c.epochs and len(a.epochs) == 3
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random state is left alone


def test_it_learns_what_can_be_learned_and_tests_by_averaging(trained):
    store, run = trained
    numbers = store.numbers[:8]
    train_part = numbers, (numbers >= 4).astype(np.int64)  # a square is dark in four of them, bright in the others
    recipe = dataclasses.replace(FAST, epochs=8, draws=2, batch=4, dropout=0.0, rate=1e-2, select="best")
    out = tune(blocks.with_weights(run), run, store, train_part, train_part, 2, recipe)
    losses = [e["loss"] for e in out.epochs]
    assert losses[-1] < 0.5 * losses[0] and out.best > 0.8
    each = [e["test"] for e in out.epochs[1:]]
    assert out.best == max(each) and out.best_epoch == 1 + each.index(max(each)) and out.video == each[-1]
    # two clips right by a little, one wrong by much: the video is wrong, a third of the clips too
    p = np.array([[[0.6, 0.4], [0.6, 0.4], [0.0, 1.0]]], np.float32)
    assert tuning._accuracy(p, np.array([0])) == (0.0, pytest.approx(2 / 3))
    with pytest.raises(AvstoreError, match="loss is"):
        tune(blocks.with_weights(run), run, store, train_part, train_part, 2,
             dataclasses.replace(recipe, optimiser="sgd", rate=1e30))  # fmt: skip


def test_the_validation_epoch_is_chosen_without_the_test_part(trained):
    store, run = trained
    train_part, test_part = parts_of(store)
    recipe = dataclasses.replace(FAST, epochs=3, select="validation")
    a = tune(blocks.with_weights(run), run, store, train_part, test_part, 2, recipe)
    b = tune(blocks.with_weights(run), run, store, train_part, (test_part[0], 1 - test_part[1]), 2, recipe)
    each = [e["validation"] for e in a.epochs[1:]]
    assert a.epoch == b.epoch == 1 + each.index(max(each)) and a.epochs == b.epochs
    assert a.video == pytest.approx(1 - b.video)
    rest, held = tuning._hold_out(store, train_part, 0)
    assert len(held[0]) == 2 and set(held[1]) == {0, 1} and not set(rest[0]) & set(held[0])
    with pytest.raises(UsageError, match="one training video"):
        tuning._hold_out(store, (train_part[0][:3], np.array([0, 0, 1])), 0)


def test_scores_do_not_depend_on_the_batch(trained):
    store, run = trained
    net = Classifier(blocks.with_weights(run), 2, FAST, 0)
    needs, on = needs_for(run, store, FAST), torch.device("cpu")
    a = scores(net, run, store, store.numbers[:3], needs, FAST, on)
    b = scores(net, run, store, store.numbers[:3], needs, dataclasses.replace(FAST, batch=1), on)
    assert a.shape == (3, 2, 2) and np.allclose(a.sum(2), 1, atol=1e-6)
    np.testing.assert_allclose(a, b, atol=1e-5)


class MoreColumns:
    """A store with columns that its plan does not have."""

    def __init__(self, store, extra):
        self.store, self.extra = store, extra
        self.columns = (*store.columns, *extra)

    def column(self, name, numbers=None):
        return [self.extra[name][int(n)] for n in numbers] if name in self.extra else self.store.column(name, numbers)

    def __getattr__(self, name):
        return getattr(self.store, name)


def test_official_splits_are_parts(trained):
    store, _ = trained
    extra = {
        "split1": ["test" if i < 2 else "train" for i in range(12)],
        "split2": ["test" if 2 <= i < 4 else "train" for i in range(12)],
        "split10": ["train" if i < 6 else "test" if i < 8 else None for i in range(12)],
    }
    probed = finetune.choose(MoreColumns(store, extra))
    assert [p.name for p in probed.parts] == ["split1", "split2", "split10"]
    assert [(len(p.train), len(p.test)) for p in probed.parts] == [(10, 2), (10, 2), (6, 2)]  # four are in neither
    assert store.key(int(probed.numbers[probed.parts[1].test[0]])) == "002.mp4"
    assert [p.name for p in finetune.choose(MoreColumns(store, extra), fold_count=2).parts] == ["fold 1", "fold 2"]
    with pytest.raises(UsageError, match="split1 has 12 training and 0 test"):
        finetune.choose(MoreColumns(store, {"split1": ["train"] * 12}))
    with pytest.raises(UsageError, match="tested but not trained"):
        finetune.choose(MoreColumns(store, {"split3": ["train" if i % 2 else "test" for i in range(12)]}))


ARGS = ["--frames", "4", "--fps", "8", "--epochs", "1", "--warm-up", "1", "--batch", "8", "--draws", "1",
        "--clips", "2"]  # fmt: skip


def test_the_bench_keeps_what_is_done(trained, tmp_path, capsys, monkeypatch):
    store, run = trained
    work = tmp_path / "work"
    base = ["bench", "finetune", "--run", str(run.path), "--work", str(work), *ARGS, "--json", str(store.path)]
    assert invoke([*base, "--seeds", "2", "--published", "UCF101"]) == 0
    table = json.loads(capsys.readouterr().out)
    names = [r["features"] for r in table["rows"]]
    assert names[:3] == ["avid", "from scratch", "commonest class"] and len(names) == 3  # nobody printed 4 frames
    first, second = table["rows"][:2]
    assert first["of"] == second["of"] == 2 and len(first["values"]) == 2 and 0 <= first["clip top-1"] <= 1
    assert len(list(work.glob("*.json"))) == 1 + 4
    assert not any("saw" in n for n in table["notes"])  # the last two were held out
    difference = np.mean(np.array(first["values"]) - second["values"])
    assert any(n.startswith(f"avid - from scratch: {difference:+.3f} ") and "over 2 parts and seeds" in n
               for n in table["notes"])  # fmt: skip

    def never(*_, **__):
        raise AssertionError("done twice")

    monkeypatch.setattr(finetune, "tune", never)
    assert invoke([*base, "--seeds", "2"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [r["top-1"] for r in again["rows"]] == [r["top-1"] for r in table["rows"]]
    monkeypatch.undo()
    assert invoke([*base, "--rate", "0.01"]) == 5
    assert "rate is 0.0001 there, 0.01 was asked" in capsys.readouterr().err
    damaged = sorted(work.glob("mine-*.json"))[0]
    damaged.write_text("{}")
    assert invoke(base) != 0
    assert "damaged" in capsys.readouterr().err
    damaged.unlink()
    assert invoke([*base, "--no-scratch"]) == 0  # the missing one is done again, to the same bits
    assert json.loads(capsys.readouterr().out)["rows"][0]["top-1"] == first["values"][0]


def test_the_best_epoch_is_labelled_and_published_figures_are_theirs(trained, tmp_path, capsys):
    store, run = trained
    assert invoke(["bench", "finetune", "--run", str(run.path), "--work", str(tmp_path / "w"), *ARGS, "--modality",
                   "av", "--best-epoch", "--no-scratch", "--markdown", str(store.path)]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "avid, best test epoch" in out and "optimistic by construction" in out and "| av |" in out
    rows = finetune.published_rows("HMDB51", 32)
    assert {r["features"]: r["top-1"] for r in rows}["published: AVID-CMA, AudioSet"] == 0.647
    assert all(r["features"].startswith("published: ") and r["frames"] == 32 for r in rows)
    assert not any("temporally" in r["features"] for r in finetune.published_rows("UCF101", 32))


def test_what_cannot_be_fine_tuned_is_told(trained, tmp_path, capsys, monkeypatch):
    store, run = trained
    monkeypatch.chdir(tmp_path)
    path, mine = str(store.path), ["--run", str(run.path)]
    for arguments, code, word in (
        ([path], 2, "no run is named"),
        ([*mine, "--fps", "x", path], 2, "whole number"),
        ([*mine, "--fps", "60", path], 5, "60 frames a second are asked"),
        ([*mine, "--preset", "ufc", path], 2, "no preset"),
        ([*mine, "--modality", "x", path], 2, "does not hold"),
        ([*mine, "--label", "lable", path], 2, "no column"),
        ([*mine, "--fps", "8", "--seeds", "0", path], 2, "0 seeds"),
        ([*mine, "--fps", "8", "--published", "UCF", path], 2, "no published figures"),
    ):
        assert invoke(["bench", "finetune", *arguments]) == code, arguments
        assert word in capsys.readouterr().err, arguments
    assert not Path("bench-finetune").exists()
    with pytest.raises(CorruptError):
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / "config.json").write_text("[]")
        finetune.Work(tmp_path / "w", {})
    with pytest.raises(ConflictError, match="a is 1 there, 2 was asked"):
        finetune.Work(tmp_path / "x", {"a": 1})
        finetune.Work(tmp_path / "x", {"a": 2})
    assert Recipe().preset == "ucf"


@pytest.mark.slow
def test_on_the_demo_set_it_beats_chance(tmp_path):
    """Sound of 96 training and 24 test clips of 8 classes: at least 0.5 above the commonest class, from pre-trained
    weights; scratch stands beside it."""
    from avstore.ingest import ingest
    from benchmarks import demo_set
    from trainers.config import resolve

    demo_set.generate(tmp_path / "media", train=96, test=24, seconds=2, workers=1)
    ingest(tmp_path / "media", tmp_path / "demo.zarr", size=(64, 96), fps=8, sample_rate=24000, front_ends=())
    store = avstore.open(tmp_path / "demo.zarr")
    sets = ["steps=20", "batch=16", "size=32", "frames=4", "negatives=16", "statistics_clips=64", "threads=1"]
    run = train("avid", store, resolve("avid", preset="tiny", sets=sets), tmp_path / "runs" / "avid").run
    recipe = make_recipe("ucf", "a", epochs=12, warm_up=1, draws=2, batch=16, clips=4, rate=2e-3, dropout=0.0)
    table = finetune.bench(store, [run], recipe=recipe, work=tmp_path / "work")
    got = {r["features"]: r["top-1"] for r in table.rows}
    assert list(got) == ["avid", "from scratch", "commonest class"]
    assert got["avid"] > got["commonest class"] + 0.5  # measured: 0.958, 0.125
    tuned = [json.loads(p.read_text()) for p in (tmp_path / "work").glob("avid-*.json")]
    assert tuned[0]["epochs"][-1]["loss"] < 0.8 * tuned[0]["epochs"][0]["loss"]
