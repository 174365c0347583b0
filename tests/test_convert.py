"""Published checkpoints: every name finds its place, the networks compute what they computed, nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import published_files as p
import pytest
import torch
import typer
from tiny_run import differing, store_in, tensors
from torch.nn import functional as F

from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError
from avstore.store import Store
from cli.convert import convert
from trainers.ancestry import seen_by
from trainers.config import resolve
from trainers.convert import read_published, write_weights
from trainers.converted_run import make_run
from trainers.embed import embed, embed_random, embed_videos, video_means
from trainers.encoders import count_parameters
from trainers.families import sort_names
from trainers.loop import train
from trainers.published import Config, Published
from trainers.run import Run

W, HEAD = 4, (8, 8, 6)


def saved(folder: Path, value: object, name: str = "theirs.pth.tar") -> Path:
    torch.save(value, folder / name)
    return folder / name


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("blocks", "depth"), [((1, 1, 1, 1), 10), ((2, 2, 2, 2), 18), ((3, 4, 6, 3), 34)])
def test_avid_computes_what_it_computed(tmp_path: Path, blocks, depth: int, parallel: bool) -> None:
    theirs = p.avid_checkpoint(W, blocks, HEAD, parallel=parallel)
    found = read_published([saved(tmp_path, theirs)])
    c = found.config
    assert (c.video_net, c.audio_net, c.video_width, c.video_head) == (
        f"avid-r2plus1d-{depth}",
        "avid-conv2d-10",
        W,
        HEAD,
    )
    assert (c.frames, c.fps, c.size, c.seconds, c.front_end) == (8, 16, 224, 2.0, "avid-linear257")
    assert found.families == ("avid-video", "avid-audio") and found.is_avid and found.partition == 2.25
    model = {k.removeprefix("module."): x for k, x in theirs["model"].items()}
    video, audio = torch.randn(2, 3, 8, 48, 48), torch.randn(2, 1, 60, 65)
    with torch.no_grad():
        out = found.module().embed(video, audio)
    v = p.run_avid_video(p.part(model, "video_model"), video, "max")
    a = p.run_avid_audio(p.part(model, "audio_model"), audio)
    torch.testing.assert_close(out["video-trunk"], v)
    torch.testing.assert_close(out["audio-trunk"], a)
    torch.testing.assert_close(out["video"], F.normalize(p.run_avid_head(p.part(model, "video_proj"), v)))
    torch.testing.assert_close(out["audio"], F.normalize(p.run_avid_head(p.part(model, "audio_proj"), a)))


def test_every_tensor_of_a_file_is_accounted_for(tmp_path: Path) -> None:
    """At full width: 15.38 + 4.73 + 2 x 0.59 M parameters taken; bank, positives, optimiser and counters named."""
    theirs = p.avid_checkpoint()
    found = read_published([saved(tmp_path, theirs)])
    assert count_parameters(found.module()) == 15_379_136 + 4_725_696 + 2 * 590_976
    assert sorted(name for name, _ in found.mapped) == sorted(k.removeprefix("module.") for k in theirs["model"])
    assert sorted(ours for _, ours in found.mapped) == sorted(found.state) == sorted(found.module().state_dict())
    left = dict(found.left)
    assert set(left) == {"epoch", "optimizer", *(f"train_criterion.{k}" for k in theirs["train_criterion"])}
    assert "rows are not yours" in left["train_criterion.nce_average.view1_mem"]
    assert ("video_model.conv3x.0.res_conv.weight", "video.conv3x.0.shortcut.weight") in found.mapped
    assert ("audio_model.block2.bn2.running_var", "audio.conv3x.4.running_var") in found.mapped
    assert ("video_proj.projection.4.bias", "video_head.4.bias") in found.mapped


def test_crisscross_backbones_one_file_each(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    v, a = p.avid_video(W, (2, 2, 2, 2), g), p.crisscross_audio(W, g)
    files = [saved(tmp_path, v, "vid_crisscross.pth.tar"), saved(tmp_path, a, "aud_crisscross.pth.tar")]
    video, mel = torch.randn(2, 3, 8, 40, 40), torch.randn(2, 1, 50, 40)  # 50 frames of 40 bins, ours
    for order in (files, files[::-1]):
        found = read_published(order)
        c = found.config
        assert (c.video_net, c.audio_net, c.video_pool, c.audio_pool) == ("avid-r2plus1d-18", "resnet-18", "avg", "avg")
        assert (c.frames, c.size, c.front_end, c.video_head) == (8, 112, "crisscross-mel80", ())
        assert not found.is_avid and set(found.families) == {"crisscross-video", "crisscross-audio"}
        with torch.no_grad():
            out = found.module().embed(video, mel)
        assert set(out) == {"video-trunk", "audio-trunk"}, "no head was published, so no embedding is made up"
        torch.testing.assert_close(out["video-trunk"], p.run_avid_video(v, video, "avg"))
        torch.testing.assert_close(out["audio-trunk"], p.run_crisscross_audio(a, mel.transpose(2, 3)))
    with pytest.raises(ConflictError, match="two files with a video network"):
        read_published([files[0], files[0]])


def test_a_whole_crisscross_checkpoint(tmp_path: Path) -> None:
    theirs = p.crisscross_checkpoint(W, 16)
    found = read_published([saved(tmp_path, theirs)])
    model = {k.removeprefix("module."): x for k, x in theirs["model"].items()}
    assert (found.config.video_head, found.config.head_norm) == ((16, 16, 16), "all")
    video, mel = torch.randn(2, 3, 8, 40, 40), torch.randn(2, 1, 50, 40)
    with torch.no_grad():
        out = found.module().embed(video, mel)
    v = p.run_avid_video(p.part(model, "video_backbone"), video, "avg")
    a = p.run_crisscross_audio(p.part(model, "audio_backbone"), mel.transpose(2, 3))
    torch.testing.assert_close(out["video"], F.normalize(p.run_crisscross_head(p.part(model, "video_projector"), v)))
    torch.testing.assert_close(out["audio"], F.normalize(p.run_crisscross_head(p.part(model, "audio_projector"), a)))
    why = dict(found.left)
    assert (
        "a second time" in why["video_encoder.0.conv1.0.weight"] and "predictor" in why["audio_predictor.layer2.bias"]
    )
    taken = {name for name, _ in found.mapped} | set(why)
    assert set(model) <= taken, "every tensor is either taken or named"


def test_networks_whose_names_are_ours(tmp_path: Path) -> None:
    """torchvision's three and the VCOP family's three, classifier left out."""
    from trainers.backbones import video_net

    for name in ("r2plus1d-18", "r3d-18", "mc3-18", "vcop-c3d", "vcop-r3d", "vcop-r2plus1d"):
        torch.manual_seed(0)
        state = dict(video_net(name, W).state_dict())
        extra = {"fc.weight": torch.zeros(5, 8 * W), "fc.bias": torch.zeros(5)}
        found = read_published([saved(tmp_path, state | extra)])
        assert (found.config.video_net, found.config.audio_net) == (name, None)
        assert all(torch.equal(found.state[f"video.{k}"], x) for k, x in state.items())
        assert [k for k, _ in found.left] == ["fc.weight", "fc.bias"]
        assert found.module().needs.sound is False and found.module().needs.front_end is None


def test_a_weights_file_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    found = read_published([saved(tmp_path, p.avid_checkpoint(W, head=HEAD))])
    path = write_weights(found, tmp_path / "w.safetensors")
    again = read_published([path])
    assert again.config == found.config and "theirs.pth.tar sha256" in found.config.source
    assert again.partition == 2.25 and again.families == found.families
    assert again.state.keys() == found.state.keys()
    assert all(torch.equal(x, found.state[k]) for k, x in again.state.items())
    assert write_weights(again, tmp_path / "twice.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="no name of a weights file"):
        write_weights(found, tmp_path / "w.pth")


class Harmful:
    """Unpickled, this would leave a file."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"model": p.avid_checkpoint(W, head=HEAD)["model"], "args": Harmful()})
    with pytest.raises(ConflictError, match="more than tensors") as e:
        read_published([path])
    assert "mkdir" in e.value.why and not (tmp_path / "harm").exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises((ConflictError, CorruptError)):
        read_published([tmp_path / "plain.pth"])
    assert not (tmp_path / "harm").exists()


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def changed(**changes: torch.Tensor | None) -> dict[str, object]:
        whole = p.avid_checkpoint(W, head=HEAD)
        for k, x in changes.items():
            name = "module." + k.replace("__", ".")
            if x is None:
                del whole["model"][name]
            else:
                whole["model"][name] = x
        return whole

    cases: list[tuple[object, str]] = [
        (changed(video_model__conv3x__0__res_conv__weight=None), "1 tensors differ.*shortcut"),
        (changed(audio_model__conv1__0__weight=torch.zeros(W, 1, 5, 5)), "differ"),
        (changed(video_model__extra__weight=torch.zeros(1)), "differ.*extra"),
        (changed(audio_proj__projection__0__bias=torch.full((8,), torch.nan)), "not finite"),
        ({"model": {"encoder.weight": torch.zeros(2)}}, "not known here"),
        ({"epoch": 3}, "no network known here"),
        (torch.zeros(3), "no state dict"),
    ]
    for value, message in cases:
        with pytest.raises(ConflictError) as e:
            read_published([saved(tmp_path, value)])
        assert re.search(message, str(e.value), re.S), (message, str(e.value))
    with pytest.raises(NotFoundError):
        read_published([tmp_path / "none.pth"])
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises((ConflictError, CorruptError)):
        read_published([tmp_path / "text.pth"])
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(CorruptError):
        read_published([tmp_path / "text.safetensors"])
    with pytest.raises(UsageError, match="nothing to convert"):
        read_published([])
    with pytest.raises(UsageError, match="no network"):
        Config(video_net=None, audio_net=None)


def test_names_are_sorted_by_prefix() -> None:
    got = sort_names(["video_model.conv1.0.weight", "audio_predictor.layer2.bias", "stray"])
    assert got.slots == {"video": {"conv1.0.weight": "video_model.conv1.0.weight"}} and got.avid
    assert [name for name, _ in got.left] == ["audio_predictor.layer2.bias", "stray"]
    assert sort_names(["block1.0.conv1.weight", "conv1.0.weight"]).slots.keys() == {"audio"}


def test_published_networks_are_not_trained() -> None:
    method = Published(Config(video_net="avid-r2plus1d-10", video_width=2, audio_net=None))
    with pytest.raises(UsageError, match="not trained"):
        method(None)
    with pytest.raises(UsageError, match="not trained"):
        method.start_epoch(0)
    same = Published(Config(video_net="avid-r2plus1d-10", video_width=2, audio_net=None))
    assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), same.state_dict().values(), strict=True))


# ---- runs, and the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_in(tmp_path_factory.mktemp("convert"), 6, codec="jpeg")


def small_avid(folder: Path) -> Path:
    return saved(folder, p.avid_checkpoint(W, (1, 1, 1, 1), HEAD))


@pytest.mark.slow
def test_avid_s_weights_become_a_run_of_avid(tmp_path: Path, store: Store) -> None:
    """It embeds the store with the published functions, and avid-cma starts from it."""
    found = read_published([small_avid(tmp_path)])
    made, notes = make_run(found, tmp_path / "runs" / "theirs", store, bank=True)
    assert made.config.name == "avid" and made.finished and made.checkpoint().step == 0
    assert any("approximate" in n for n in notes) and any("not by its authors'" in n for n in notes)
    seen = seen_by(made, store)  # its selection gave statistics; what its weights saw nobody here can tell
    assert not seen.numbers.size and len(seen.unknown) == 1 and "weights" in seen.unknown[0]
    loaded = made.load()
    x = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed(x)["video"], found.module().embed(x)["video"])
    done = embed(made, store)
    assert sorted(done.towers) == ["audio", "audio-trunk", "video", "video-trunk"] and done.complete

    state = tensors(made)
    assert bool(state["method.safetensors:bank.seen"].all()) and float(state["method.safetensors:partition"]) == 2.25
    memory = state["method.safetensors:bank.memory"]
    torch.testing.assert_close(memory.norm(dim=2), torch.ones(memory.shape[:2]))
    for column, tower in enumerate(("video", "audio")):
        expected = torch.from_numpy(video_means(store, "theirs", tower, made.snapshot.numbers))
        torch.testing.assert_close(memory[:, column], expected, atol=2e-3, rtol=0)  # the tape is float16

    again, _ = make_run(found, tmp_path / "runs" / "theirs", store, bank=True)
    assert not differing(tensors(again), state)

    sets = [f"{k}={v}" for k, v in (("video_depth", 10), ("width", W), ("hidden", HEAD[0]), ("dim", HEAD[2]))]
    sets += ["positives=1", "within_negatives=0", "negatives=2", "batch=4", "steps=2", "size=32", "frames=4"]
    cma = resolve("avid-cma", sets=[*sets, "in_process=true", "threads=1", "precision=fp32"])
    result = train("avid-cma", store, cma, tmp_path / "runs" / "cma", init=made.path)
    assert result.step == 2


@pytest.mark.slow
def test_other_weights_become_a_run_of_published(tmp_path: Path, store: Store) -> None:
    """CrissCross' two backbones: trunks only, their own constants; video alone hears nothing."""
    g = torch.Generator().manual_seed(1)
    v, a = p.avid_video(W, (2, 2, 2, 2), g), p.crisscross_audio(W, g)
    found = read_published([saved(tmp_path, v, "v.pth"), saved(tmp_path, a, "a.pth")])
    made, _ = make_run(found, tmp_path / "cc", store)
    assert made.config.name == "published" and made.config.method.video_net == "avid-r2plus1d-18"
    statistics = made.snapshot.statistics
    assert statistics is not None and set(statistics["mean"]) == {-5.3688107} and set(statistics["std"]) == {4.410007}
    assert sorted(embed(made, store).towers) == ["audio-trunk", "video-trunk"]
    found_again = embed_videos(made.load(), made, store, store.numbers[:1])
    random = embed_random(made, store, store.numbers[:1])
    assert not np.allclose(found_again["video-trunk"][0].mean(0), random["video-trunk"][0][0])

    alone, _ = make_run(read_published([saved(tmp_path, v, "v.pth")]), tmp_path / "v", store)
    assert alone.snapshot.statistics is None and embed(alone, store).towers == ["video-trunk"]
    with pytest.raises(UsageError, match="no memory bank"):
        make_run(found, tmp_path / "bank", store, bank=True)
    with pytest.raises(ConflictError):
        make_run(found, tmp_path / "v", store)


def test_the_command(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, run = small_avid(tmp_path), tmp_path / "w.safetensors", tmp_path / "run"

    def call(*arguments: object) -> None:
        typer.main.get_command(app).main([str(a) for a in arguments], standalone_mode=False)

    app = typer.Typer()
    app.command("convert")(convert)
    call(path, "--dry-run", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["recognised"] == ["avid-video", "avid-audio"] and told["out"] is None and not out.exists()
    assert told["partition"] == 2.25 and told["left"]["optimizer"] == "not weights"
    call(path, "-o", out, "--names")
    printed = capsys.readouterr()
    assert "video_model.conv3x.res_conv.weight" in printed.out and "video.conv3x.0.shortcut.weight" in printed.out
    assert "avid-r2plus1d-10, width 4, max pool, head 8-8-6" in printed.out
    call(out, "--run", run, "--store", store.path)
    assert Run(run).config.name == "avid" and "avstore embed" in capsys.readouterr().err
    with pytest.raises(UsageError, match="nothing to write"):
        call(path)
    with pytest.raises(UsageError, match="no run was named"):
        call(path, "-o", out, "--bank")
