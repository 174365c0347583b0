"""Fine-tuned networks on disk and their class activation maps: planted networks, files, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_run
import tiny_store
import torch
from torch.nn import functional as F

import avstore
from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError
from avstore.sampler import SequentialOrder
from benchmarks import blocks, finetune, probing
from benchmarks.explain_page import explain
from benchmarks.head import Head, attend_class, class_saliency, read_head, write_head
from benchmarks.recipe import make_recipe
from benchmarks.tuning import Classifier, clips, needs_for
from cli.main import invoke
from trainers.loop import train
from trainers.run import Run

RECIPE = make_recipe("ucf", "av", 4, fps=8, epochs=1, warm_up=0, batch=8, draws=1, clips=1, milestones=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny store, a run of one step, and its fine-tuned network of sight, kept by the bench."""
    root = tmp_path_factory.mktemp("head")
    store = tiny_run.store_in(root)
    run = train("avid", store, tiny_run.config("steps=1"), root / "runs" / "mine").run
    recipe = dataclasses.replace(RECIPE, modality="v", hidden=0, dropout=0.0)
    finetune.bench(store, [run], recipe=recipe, scratch=False, keep=True, work=root / "work")
    return root


def a_batch(run: Run, store: avstore.Store, recipe):
    order = SequentialOrder(2, 1, batch_size=2)
    (batch,) = clips(run, store, store.numbers[:2], needs_for(run, store, recipe), order, torch.device("cpu"))
    return batch


def test_of_averages_and_a_linear_classifier_it_is_the_classifiers_weights_on_the_maps(folder: Path) -> None:
    """Zhou et al.'s class activation map, by hand: ReLU(sum_c w_c A_c), enlarged and divided by its maximum."""
    store, run = avstore.open(folder / "tiny.zarr"), Run(folder / "runs" / "mine")
    recipe = dataclasses.replace(RECIPE, hidden=0, pool="avg")
    net = Classifier(blocks.with_weights(run), 3, recipe, seed=0).eval()
    batch, targets = a_batch(run, store, recipe), torch.tensor([2, 0])
    p, sight, sound = attend_class(net, batch, targets)
    with torch.no_grad():
        torch.testing.assert_close(p, net(batch).softmax(1)[[0, 1], targets])
        weights = net.head[1].weight[targets]  # (2, 64): 32 of sight, 32 of sound
        sides = (("v", batch.video, weights[:, :32], sight), ("a", batch.audio, weights[:, 32:], sound))
        for m, x, part, found in sides:
            maps = net.nets[m].forward_blocks(x)["conv5x"]
            heat = F.relu((part.reshape(2, 32, *[1] * (maps.dim() - 2)) * maps).sum(1, keepdim=True))
            mode = "trilinear" if m == "v" else "bilinear"
            heat = F.interpolate(heat, x.shape[2:], mode=mode, align_corners=False)[:, 0]
            most = heat.flatten(1).amax(1)
            heat = heat / torch.where(most > 0, most, 1).reshape(-1, *[1] * (heat.dim() - 1))
            torch.testing.assert_close(found, heat, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="train mode"):
        attend_class(net.train(), batch, targets)
    with pytest.raises(UsageError, match="conv9x"):
        attend_class(net.eval(), batch, targets, block="conv9x")


def test_what_is_kept_comes_back_and_names_what_it_sees(folder: Path) -> None:
    store = avstore.open(folder / "tiny.zarr")
    (file,) = (folder / "work").glob("*.safetensors")
    net, about, run = read_head(file)
    assert run.name == "mine" and about.recipe.modality == "v" and about.store == store.fingerprint
    assert not net.training and about.classes == sorted(about.classes) and len(about.classes) > 1
    kept = json.loads(file.with_suffix(".json").read_text())  # the result beside it is that network's
    probed = probing.choose(store, modality="v")
    part = probed.parts[0]
    from benchmarks.tuning import scores

    recipe = about.recipe
    p = scores(net, run, store, probed.numbers[part.test], needs_for(run, store, recipe), recipe, torch.device("cpu"))
    assert (p.mean(1).argmax(1) == probed.labels[part.test]).mean() == kept["video"]
    number = int(store.numbers[0])
    (seen,) = class_saliency(net, about, run, store, [(number, 0)], name=about.classes[1])
    assert seen.frames.shape == (4, 32, 32, 3) and seen.sight.shape == (4, 32, 32) and not seen.rows.size
    assert seen.sight.min() >= 0 and seen.sight.max() <= 1 and seen.told.startswith(f"mine gives {about.classes[1]} 0.")
    with pytest.raises(UsageError, match="no class 'zebra'"):
        class_saliency(net, about, run, store, [(number, 0)], name="zebra")
    with pytest.raises(UsageError, match="it lasts"):
        class_saliency(net, about, run, store, [(number, 99)])


def test_a_file_that_is_no_head_is_refused(folder: Path, tmp_path: Path) -> None:
    (file,) = (folder / "work").glob("*.safetensors")
    with pytest.raises(NotFoundError):
        read_head(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptError, match="no fine-tuned network"):
        read_head(tmp_path / "x.safetensors")
    net, about, run = read_head(file)
    wide = Classifier(blocks.with_weights(run), 9, about.recipe, seed=0)
    write_head(tmp_path / "y.safetensors", wide, about)
    with pytest.raises(ConflictError, match="is not of"):
        read_head(tmp_path / "y.safetensors")
    moved = dataclasses.replace(about, run=str(tmp_path / "gone"))
    write_head(tmp_path / "z.safetensors", net, moved)
    with pytest.raises(NotFoundError):
        read_head(tmp_path / "z.safetensors")
    assert read_head(tmp_path / "z.safetensors", run)[1] == moved
    assert isinstance(about, Head)


def test_the_bench_makes_a_missing_network_again_to_the_same_result(folder: Path) -> None:
    store, run = avstore.open(folder / "tiny.zarr"), Run(folder / "runs" / "mine")
    recipe = dataclasses.replace(RECIPE, modality="v", hidden=0, dropout=0.0)
    (file,) = (folder / "work").glob("*.safetensors")
    before, result = file.read_bytes(), json.loads(file.with_suffix(".json").read_text())
    file.unlink()
    finetune.bench(store, [run], recipe=recipe, scratch=False, keep=True, work=folder / "work")
    assert file.read_bytes() == before
    again = json.loads(file.with_suffix(".json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_the_command_draws_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (folder / "work").glob("*.safetensors")
    out, store = tmp_path / "out", str(folder / "tiny.zarr")
    assert invoke(["explain", store, "--head", str(file), "--count", "2", "-o", str(out)]) == 0
    assert len(list(out.glob("class-*.png"))) == 2 and not list(out.glob("saliency-*.png"))
    assert invoke(["explain", store, "--head", str(tmp_path), "-o", str(out)]) == 4  # a folder without any
    assert invoke(["explain", store, "--head", str(file.parent), "--count", "2", "-o", str(out)]) == 0
    text = (out / "explain.html").read_text()
    assert "Class activation" in text and "the video&#x27;s own class" in text and text.count("data:image/png") == 2
    assert invoke(["explain", store, "--class", "cat", "--run", str(folder / "runs" / "mine"), "-o", str(out)]) == 2
    assert "without a classifier" in capsys.readouterr().err
    assert "with respect to conv5x" in text
    drawn = ["explain", store, "--head", str(file), "--count", "1"]
    assert invoke([*drawn, "--block", "conv2x", "-o", str(tmp_path / "early")]) == 0
    assert "with respect to conv2x" in (tmp_path / "early" / "explain.html").read_text()
    assert invoke([*drawn, "-o", str(tmp_path / "late")]) == 0
    (early,), (late,) = ((tmp_path / n).glob("class-*.png") for n in ("early", "late"))
    assert early.read_bytes() != late.read_bytes()


@pytest.mark.parametrize("modality", ["v", "a"])
def test_a_head_of_one_sense_needs_no_other(folder: Path, tmp_path: Path, modality: str) -> None:
    """Silent videos for a network of sight, sound alone for one of sound."""
    store, run = avstore.open(folder / "tiny.zarr"), Run(folder / "runs" / "mine")
    recipe = dataclasses.replace(RECIPE, modality=modality, hidden=0, dropout=0.0)
    net = Classifier(blocks.with_weights(run, "latest"), 2, recipe, 0)
    file = tmp_path / "h.safetensors"
    write_head(file, net, Head(str(run.path), ["a", "b"], recipe, 0, "x", store.fingerprint, "label"))
    lacking = {"sound": None} if modality == "v" else {"picture": False}
    videos = [tiny_store.Tiny(2.0, key=f"{i}.mp4", label="ab"[i % 2], **lacking) for i in range(4)]
    made = tiny_store.make_store(tmp_path / "one.zarr", videos, tiny_store.default_spec(sample_rate=24000))
    out = tmp_path / "out"
    assert invoke(["explain", str(made), "--head", str(file), "--count", "2", "-o", str(out)]) == 0
    assert len(list(out.glob("class-*.png"))) == 2
    named = ["--video", "3", "--where", "label=a"]
    assert invoke(["explain", str(made), "--head", str(file), *named, "-o", str(out)]) == 0
    assert (out / "class-000003.png").is_file()
    with pytest.raises(NotFoundError, match="has picture and sound"):
        explain(avstore.open(made), [run], out, numbers=avstore.open(made).numbers)
