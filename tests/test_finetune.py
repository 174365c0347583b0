"""Fine-tuning: recipes, parts, what is kept; that it learns, repeats and goes on; the bench with its controls."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import config, store_in
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.errors import AvstoreError, ConflictError, CorruptError, UsageError
from benchmarks import blocks, finetune, probing, tuning
from benchmarks.recipe import PRESETS, Recipe, make_recipe
from benchmarks.tuning import Classifier, Tuned, clips, needs_for, scores, tune
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
    probed = probing.choose(store, modality="v")
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
    s1 = make_recipe("avcl", "av")
    assert (s1.select, s1.frames, s1.fps, s1.alone) == ("validation", 16, "native", 0)  # 16 consecutive frames
    assert (make_recipe("avcl", frames=1).frames, make_recipe("ucf").frames, make_recipe("ucf").fps) == (1, 8, 16)
    assert [(make_recipe(p, frames=f).clips, make_recipe(p, frames=f).alone) for p in ("ucf", "hmdb") for f in (8, 32)
            ] == [(10, 25)] * 4  # fmt: skip
    assert (make_recipe("ucf", clips=4).clips, make_recipe("ucf", clips=4).alone) == (4, 0)
    short, long = make_recipe("crisscross-hmdb", frames=8), make_recipe("crisscross-hmdb", frames=32)
    assert (short.optimiser, short.momentum, short.rate, short.decay) == ("sgd", 0.9, 5e-4, 0.1)
    assert (short.milestones, short.size, short.pool, short.select) == ((6, 10, 14), 224, "max", "best")
    assert (short.blur, short.dropout, short.warm_up, short.weight_decay) == (0.0, 0.0, 0, 0.0)
    assert (long.batch, long.rate, long.decay, long.milestones) == (32, 1e-4, 0.3, (8, 12, 16))
    assert make_recipe("crisscross-ucf", frames=32, epochs=10).milestones == (4, 6, 8)
    assert make_recipe("crisscross-ucf", size=112).size == 112
    for wrong in ({"frames": 32}, {"size": 64}, {"fps": 8}):
        with pytest.raises(UsageError, match="of sound"):
            make_recipe("ucf", "a", **wrong)
    assert finetune._pictures(make_recipe("ucf", "a")) == ""
    assert finetune._pictures(make_recipe("ucf", "av", 4, size=64)) == ", 4 frames at 16 fps, 64 pixels"
    for wrong in ({"preset": "ufc"}, {"size": -1}, {"pool": "sum"}, {"blur": 1.5},
                  {"epochs": 0}, {"rate": 0.0}, {"milestones": (3, 2)}, {"modality": "x"},
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


def test_the_size_and_the_pool_are_the_recipes(trained):
    store, run = trained
    order = tuning.SequentialOrder(2, 1, batch_size=2)
    for size, side in ((0, 32), (48, 48)):
        recipe = dataclasses.replace(FAST, size=size)
        needs = needs_for(run, store, recipe)
        (batch,) = clips(run, store, store.numbers[:2], needs, order, torch.device("cpu"))
        assert batch.video.shape[-3:] == (4, side, side)
    with pytest.raises(ConflictError, match="pictures of 224 pixels are asked"):
        needs_for(run, store, dataclasses.replace(FAST, size=224))
    found = {}
    for pool in ("run", "max", "avg"):
        net = Classifier(blocks.with_weights(run), 3, dataclasses.replace(FAST, pool=pool), seed=0).eval()
        with torch.no_grad():
            found[pool] = net.features(batch)
            maps = net.nets["v"].forward_blocks(batch.video)["conv5x"].flatten(2)
        torch.testing.assert_close(found[pool], maps.mean(2) if net.nets["v"].pool == "avg" else maps.amax(2))
    assert not torch.equal(found["max"], found["avg"])


def test_a_fusion_is_fine_tuned_and_others_are_side_by_side(trained):
    """S1 Table 4: AVCL's [f_v, f_a], its rivals' [v, a]; 1024 -> 512 -> ReLU -> dropout .7 -> classes at paper size."""
    from trainers.config import resolve
    from trainers.run import build

    _, run = trained
    recipe = make_recipe("avcl", "av", 4)
    snapshot = run.snapshot
    net = Classifier(build(resolve("avcl", preset="tiny"), snapshot, len(snapshot.numbers)), 3, recipe, seed=0)
    bare = Classifier(build(resolve("simclr", preset="tiny"), snapshot, len(snapshot.numbers)), 3, recipe, seed=0)
    assert net.fusion is not None and bare.fusion is None
    assert any(k.startswith("fusion.") for k in net.state_dict())  # trained with the rest
    assert net.head[0].in_features == sum(n.dim for n in net.nets.values()) and net.head[0].out_features == 512
    assert (recipe.optimiser, recipe.rate, recipe.weight_decay, recipe.batch, recipe.epochs, recipe.select) == (
        "sgd", 1e-3, 5e-3, 16, 150, "validation")  # fmt: skip


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
    given = parts_of(store)[0][0][:2], np.array([1, 0])  # with labels that are the wrong way round
    c = tune(blocks.with_weights(run), run, store, train_part, test_part, 2, recipe, val=given)
    d = tune(blocks.with_weights(run), run, store, train_part, test_part, 2,
             dataclasses.replace(recipe, select="last"), val=given)  # fmt: skip
    chosen_by = [e.pop("validation") for e in c.epochs[1:]]
    assert c.epoch == 1 + chosen_by.index(max(chosen_by)) and c.epochs == d.epochs  # all of training is trained on
    assert set(chosen_by) <= {0.0, 0.5, 1.0}  # of two videos
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
    probed = probing.choose(MoreColumns(store, extra), modality="v")
    assert [p.name for p in probed.parts] == ["split1", "split2", "split10"]
    assert [(len(p.train), len(p.test)) for p in probed.parts] == [(10, 2), (10, 2), (6, 2)]  # four are in neither
    assert store.key(int(probed.numbers[probed.parts[1].test[0]])) == "002.mp4"
    few = probing.choose(MoreColumns(store, extra), split_columns=["split2"])
    assert [p.name for p in few.parts] == ["split2"]
    recipe = make_recipe("ucf")
    one = finetune.configuration(store, probed, recipe, "label")
    assert one != finetune.configuration(store, few, recipe, "label")
    part = probed.parts[0]
    for other in (
        dataclasses.replace(probed, labels=np.where(np.arange(12) == part.test[0], 1 - probed.labels, probed.labels)),
        dataclasses.replace(probed, classes=("a", "c")),
    ):  # a test label, a class' name
        assert one["videos"] != finetune.configuration(store, other, recipe, "label")["videos"]
    val = dataclasses.replace(probed, parts=(dataclasses.replace(part, val=np.array([3])),))
    bare = dataclasses.replace(probed, parts=(part,))
    for select, same in (("last", True), ("validation", False)):
        asked = dataclasses.replace(recipe, select=select)
        a, b = (finetune.configuration(store, p, asked, "label") for p in (val, bare))
        assert (a == b) is same


def test_what_a_run_decides_is_in_the_name_of_a_result(trained):
    _, run = trained
    method = blocks.with_weights(run)
    name, random = finetune.told(run, method, "a"), finetune.told(run, blocks.with_weights(run, "random"), "a")
    assert name == finetune.told(run, blocks.with_weights(run), "a") not in (random, finetune.told(run, method, "b"))

    class Like:
        config, snapshot = run.config, run.snapshot

    crop, bins = Like(), Like()
    crop.config = run.config.replace(flip=0.5)
    statistics = {**run.snapshot.statistics, "mean": [x + 1 for x in run.snapshot.statistics["mean"]]}
    bins.snapshot = dataclasses.replace(run.snapshot, statistics=statistics)
    assert len({name, finetune.told(crop, method, "a"), finetune.told(bins, method, "a")}) == 3


def test_single_clips_are_scored_apart(trained):
    store, run = trained
    train_part, test_part = parts_of(store)
    seen = []
    real = tuning.scores

    def spy(net, run, store, numbers, needs, recipe, *rest):
        seen.append(recipe.clips)
        return real(net, run, store, numbers, needs, recipe, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "scores", spy)
        both = tune(blocks.with_weights(run), run, store, train_part, test_part, 2, dataclasses.replace(FAST, alone=3))
    only = tune(blocks.with_weights(run), run, store, train_part, test_part, 2, dataclasses.replace(FAST, clips=3))
    assert seen == [2, 3] and both.clip == only.clip and both.epochs == only.epochs


@pytest.mark.parametrize("scratch", [False, True])
def test_an_epoch_that_is_done_is_not_done_again(trained, tmp_path, scratch):
    """Ended within each epoch of a fine-tuning and begun again: the same bits as one that was not."""
    store, run = trained
    train_part, test_part = parts_of(store)
    recipe = dataclasses.replace(FAST, epochs=3, warm_up=2, select="best")
    nets = []

    def once(method, **rest):
        return tune(
            method,
            run,
            store,
            train_part,
            test_part,
            2,
            recipe,
            scratch=scratch,
            keep=lambda net: nets.append({k: v.clone() for k, v in net.state_dict().items()}),
            **rest,
        )

    whole = once(blocks.with_weights(run))
    state, cut, steps = tmp_path / "epoch.pt", [0], []
    per_epoch = 2  # ten clips in batches of eight

    def power_cut(done, total):
        steps.append(done)
        assert total == 5 * per_epoch
        if done == cut[0]:
            raise KeyboardInterrupt

    for epoch in range(1, 5):
        cut[0] = epoch * per_epoch + 1
        with pytest.raises(KeyboardInterrupt):
            once(blocks.with_weights(run), state=state, progress=power_cut)
        assert state.is_file()
    cut[0] = 0
    again = once(blocks.with_weights(run), state=state, progress=power_cut)
    assert not state.exists() and steps.count(1) == 1 and len(steps) == 5 * per_epoch + 4
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert all(torch.equal(nets[0][k], nets[-1][k]) for k in nets[0])
    state.write_bytes(b"torn")
    with pytest.raises(CorruptError, match="damaged"):
        once(blocks.with_weights(run), state=state)


def test_official_splits_that_divide_nothing_are_refused(trained):
    store, _ = trained
    with pytest.raises(UsageError, match="split1 has 12 training and 0 test"):
        probing.choose(MoreColumns(store, {"split1": ["train"] * 12}), modality="v")
    with pytest.raises(UsageError, match="tested but not trained"):
        probing.choose(MoreColumns(store, {"split3": ["train" if i % 2 else "test" for i in range(12)]}))


ARGS = ["--frames", "4", "--fps", "8", "--epochs", "1", "--warm-up", "1", "--batch", "8", "--draws", "1",
        "--clips", "2"]  # fmt: skip


def test_the_bench_keeps_what_is_done(trained, tmp_path, capsys, monkeypatch):
    store, run = trained
    work = tmp_path / "work"
    base = ["bench", "finetune", "--run", str(run.path), "--work", str(work), *ARGS, "--json", str(store.path)]
    assert invoke([*base, "--seeds", "2", "--published", "UCF101"]) == 0
    table = json.loads(capsys.readouterr().out)
    names = [r["features"] for r in table["rows"]]
    assert names[:3] == ["avid", "from scratch", "commonest class"]
    theirs = table["rows"][3:]
    assert len(theirs) > 30 and all(r["features"].startswith("published: ") and r["frames"] >= 8 for r in theirs)
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
    assert [r["top-1"] for r in again["rows"]] == [r["top-1"] for r in table["rows"][:3]]
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


def test_one_part_and_one_seed_are_compared_over_test_videos(trained, tmp_path, capsys):
    """What is kept by a version that did not note who was right gives no pair, and the table says so."""
    store, run = trained
    work = tmp_path / "work"
    asked = ["bench", "finetune", "--run", str(run.path), "--work", str(work), *ARGS, "--json", str(store.path)]
    assert invoke(asked) == 0
    table = json.loads(capsys.readouterr().out)
    files = sorted(work.glob("*-0.json"))
    right = {f.name.split("-")[0]: json.loads(f.read_text())["right"] for f in files}
    for row, name in zip(table["rows"], ("mine", "scratch"), strict=False):
        assert len(right[name]) == 2 and np.mean(right[name]) == row["top-1"]
    mean = table["rows"][0]["top-1"] - table["rows"][1]["top-1"]
    (line,) = [n for n in table["notes"] if n.startswith("avid - from scratch")]
    assert f"scratch: {mean:+.3f}" in line and "over 2 test videos" in line and "nothing of other seeds" in line
    for file in files:
        value = json.loads(file.read_text())
        del value["right"]
        file.write_text(json.dumps(value))
    assert invoke(asked) == 0
    again = json.loads(capsys.readouterr().out)
    assert [r["top-1"] for r in again["rows"]] == [r["top-1"] for r in table["rows"]]
    (line,) = [n for n in again["notes"] if n.startswith("no paired test")]
    assert "kept of avid, from scratch" in line and "--seeds 3 or --folds 5" in line
    assert not any("over 2 test videos" in n for n in again["notes"])
    assert finetune._compared({"avid": {("split", 0): [Tuned(0.5, 0.5, 1, None, None, (), 0.0)]}}) == []


def test_pairs_are_of_the_same_part_and_seed():
    """Runs of folds come in any order."""
    def of(video):
        return [Tuned(video, 0, 1, None, None, (), 0.0)]

    found = {"a": {("f1", 0): of(0.5), ("f2", 0): of(0.9)}, "b": {("f2", 0): of(0.8), ("f1", 0): of(0.4)},
             "from scratch": {("f2", 0): of(0.1), ("f1", 0): of(0.2)}}  # fmt: skip
    ab, scratch, _ = finetune._compared(found)
    assert ab.startswith("a - b: +0.100 (sd 0.000)") and scratch.startswith("a - from scratch: +0.550 (sd 0.354)")


def test_tested_videos_that_are_lost_are_told(tmp_path):
    """As the probes do: a test part does not shrink in silence."""
    made = [Tiny(2.0, key=f"{i}.mp4", label="ab"[i % 2], split="test" if i > 7 else "train",
                 status="failed" if i == 9 else "ok") for i in range(12)]  # fmt: skip
    store = avstore.open(make_store(tmp_path / "lost.zarr", made, default_spec(sample_rate=24000, codec="jpeg")))
    run = train("avid", store, config("steps=1", *PLAIN), tmp_path / "runs" / "mine").run
    table = finetune.bench(store, [run], recipe=FAST, scratch=False, work=tmp_path / "work")
    assert any(n.startswith("1 of the 4 videos that column split tests are not ok") for n in table.notes)


def test_the_best_epoch_is_labelled_and_published_figures_are_theirs(trained, tmp_path, capsys):
    store, run = trained
    assert invoke(["bench", "finetune", "--run", str(run.path), "--work", str(tmp_path / "w"), *ARGS, "--modality",
                   "av", "--best-epoch", "--no-scratch", "--markdown", str(store.path)]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "avid, best test epoch" in out and "optimistic by construction" in out and "| av |" in out
    rows = finetune.published_rows("HMDB51", 32)
    assert {r["features"]: r["top-1"] for r in rows}["published: AVID-CMA, AudioSet"] == 0.647
    asked = [r["frames"] == 32 for r in rows]
    assert asked == sorted(asked, reverse=True) and {r["frames"] for r in rows} == {8, 16, 25, 30, 32}
    # S0 Table 1: each of its five rows with the frames that it had
    told = {(r["features"].removeprefix("published: "), r["frames"]): r["top-1"] for r in rows}
    for of, frames, value in (("L3*", 16, 0.516), ("AVTS", 25, 0.616), ("XDC, as CrissCross prints it", 32, 0.637),
                              ("AVID-CMA", 32, 0.647), ("temporally cognizant", 32, 0.662)):  # fmt: skip
        assert told[f"{of}, AudioSet", frames] == value
    assert {r["setting"] for r in rows if "published: CrissCross" in r["features"]} == {"theirs: best test epoch"}
    ks = {r["features"]: (r["top-1"], r["modality"], r["frames"]) for r in finetune.published_rows("K100", 16)}
    assert ks["published: AVCL, R(2+1)D, K100"] == (0.671, "av", 16) and len(ks) == 12
    assert ks["published: Baseline-A, K100"] == (0.409, "a", None)
    assert not any("temporally" in r["features"] for r in finetune.published_rows("UCF101", 32))


def test_checkpoints_are_drawn_over_the_epoch(tmp_path, capsys):
    store = store_in(tmp_path, codec="jpeg")
    sets = ("steps=4", "checkpoint_every=2", "keep_every=2", *PLAIN)
    run = train("avid", store, config(*sets), tmp_path / "runs" / "two").run
    picture = tmp_path / "curve.svg"
    assert (
        invoke(
            [
                "bench",
                "finetune",
                "--run",
                str(run.path),
                "--work",
                str(tmp_path / "w"),
                *ARGS,
                "--warm-up",
                "0",
                "--no-scratch",
                "--all-checkpoints",
                "--curve",
                str(picture),
                "--json",
                str(store.path),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    rows = json.loads(said.out)["rows"]
    mine = [r for r in rows if r.get("of run") == "avid"]
    assert [(r["features"], r["step"], r["epoch"]) for r in mine] == [("avid step 2", 2, 1.0), ("avid step 4", 4, 2.0)]
    assert "wrote" in said.err and picture.read_text().startswith("<svg")


def test_a_part_may_have_a_rate_of_its_own(trained, tmp_path, monkeypatch):
    store, run = trained
    seen = []
    real = finetune.tune

    def spy(method, run, store, train, test, classes, recipe, **rest):
        seen.append((len(test[0]), recipe.rate))
        return real(method, run, store, train, test, classes, recipe, **rest)

    monkeypatch.setattr(finetune, "tune", spy)
    recipe = dataclasses.replace(FAST, modality="a", epochs=1, warm_up=0)
    table = finetune.bench(store, [run], recipe=recipe, rates={"fold 2": 5e-4}, fold_count=3, scratch=False,
                           work=tmp_path / "w")  # fmt: skip
    assert [rate for _, rate in seen] == [1e-3, 5e-4, 1e-3]
    assert any("adam 0.001, 0.0005 on fold 2" in n for n in table.notes)
    with pytest.raises(ConflictError, match="rates is"):
        finetune.bench(store, [run], recipe=recipe, fold_count=3, scratch=False, work=tmp_path / "w")


def test_what_cannot_be_fine_tuned_is_told(trained, tmp_path, capsys, monkeypatch):
    store, run = trained
    monkeypatch.chdir(tmp_path)
    path, mine = str(store.path), ["--run", str(run.path)]
    for arguments, code, word in (
        ([path], 2, "no run is named"),
        ([*mine, "--fps", "x", path], 2, "whole number"),
        ([*mine, "--fold-rate", "1e-3", path], 2, "a part and a rate above 0"),
        ([*mine, "--fold-rate", "split1=-1", path], 2, "a part and a rate above 0"),
        ([*mine, "--fps", "8", "--fold-rate", "split1=1", path], 2, "no part 'split1'"),
        ([*mine, "--curve", "x.svg", path], 2, "a curve is drawn over checkpoints"),
        ([*mine, "--select", "first", path], 2, "does not hold"),
        ([*mine, "--best-epoch", "--select", "last", path], 2, "each of them says which epoch counts"),
        ([*mine, "--split", "spilt", path], 2, "no column"),
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
