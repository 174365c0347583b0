"""Teachers: the three kinds of source, that they stay out of their student, and that none is swapped unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import config, store_in
from torch import nn

from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError
from avstore.store import Store
from avstore.store import open as open_store
from trainers import backbones
from trainers.batch import Batch
from trainers.embed import embed, video_means
from trainers.loop import train
from trainers.run import Run
from trainers.snapshot import Snapshot, take_snapshot
from trainers.teacher import Teacher, bind_teachers, digest_of, digests, kind_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_in(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train("avid", store, config("steps=1"), tmp_path_factory.mktemp("runs") / "avid").run


@pytest.fixture(scope="module")
def snapshot(store: Store, run: Run) -> Snapshot:
    return take_snapshot(store, config())


def batch(rows: list[int], **changes: Any) -> Batch:
    n, g = len(rows), torch.Generator().manual_seed(3)
    given: dict[str, Any] = {
        "row": torch.tensor(rows), "position": torch.arange(n), "draw": torch.zeros(n, dtype=torch.int64),
        "has_picture": torch.ones(n, dtype=torch.bool), "has_sound": torch.ones(n, dtype=torch.bool), "epoch": 0,
        "seed": 0, "video": torch.randn(n, 3, 4, 32, 32, generator=g), "audio": torch.randn(n, 1, 50, 129, generator=g),
    }  # fmt: skip
    return Batch(**{**given, **changes})


@pytest.mark.parametrize(
    ("source", "kind"),
    [("runs/avid", "run"), ("runs/avid@400#video", "run"), ("r.pt#image-resnet-18", "weights"),
     ("a/b.safetensors#resnet-9:16", "weights"), ("s.zarr/embeddings/avid/audio", "vectors")],
)  # fmt: skip
def test_kinds_are_told_by_their_form(source: str, kind: str) -> None:
    assert kind_of(source) == kind


@pytest.mark.parametrize("source", ["", "r.pt", "#x"])
def test_sources_of_no_form(source: str) -> None:
    with pytest.raises(UsageError):
        Teacher(source, "video", 8)


def test_a_run_teaches_what_it_embeds(store: Store, run: Run, snapshot: Snapshot) -> None:
    b = batch([0, 1, 2], has_sound=torch.tensor([True, False, True]))
    for source, modality, key, dim in (
        (f"{run.path}", "audio", "audio-trunk", 32),
        (f"{run.path}@1#video", "video", "video", 8),
    ):
        teacher = Teacher(source, modality, dim)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="not bound"):
            teacher(b)
        teacher.bind(store, snapshot, CPU)
        got = teacher(b)
        with torch.no_grad():
            expected = run.load().embed(**{modality: b.video if modality == "video" else b.audio})[key]
        known = b.has_sound if modality == "audio" else b.has_picture
        torch.testing.assert_close(got[known], expected[known], rtol=1e-4, atol=1e-5)
        assert not got.requires_grad and not got[~known].any() and torch.equal(teacher.known(b), known)
        assert not teacher.state_dict() and not list(teacher.parameters())
        assert teacher.digest == digest_of(source) and teacher.digest.startswith(run.checkpoint().digest)


def test_a_run_of_another_front_end_is_refused(store: Store, run: Run, snapshot: Snapshot) -> None:
    import dataclasses

    assert snapshot.statistics is not None
    other = dataclasses.replace(snapshot, statistics={**snapshot.statistics, "hash": "0", "front_end": "x"})
    with pytest.raises(ConflictError, match="another front-end"):
        Teacher(str(run.path), "audio", 32).bind(store, other, CPU)
    shifted = {**snapshot.statistics, "mean": [m + 1 for m in snapshot.statistics["mean"]],
               "std": [2 * s for s in snapshot.statistics["std"]]}  # fmt: skip
    renormalised = Teacher(str(run.path), "audio", 32)
    renormalised.bind(store, dataclasses.replace(snapshot, statistics=shifted), CPU)
    plain = Teacher(str(run.path), "audio", 32)
    plain.bind(store, snapshot, CPU)
    b = batch([0, 1])
    assert b.audio is not None
    mean, std = torch.tensor(snapshot.statistics["mean"]), torch.tensor(snapshot.statistics["std"])
    raw = b.audio * std + mean
    again = (raw - torch.tensor(shifted["mean"])) / torch.tensor(shifted["std"])
    torch.testing.assert_close(renormalised(batch([0, 1], audio=again)), plain(b), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_a_file(store: Store, snapshot: Snapshot, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = backbones.image_net("image-resnet-18", 4).eval()
    file = tmp_path / f"r{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{k}": x for k, x in net.state_dict().items()}}, file)
    else:
        save_file({k: x.contiguous() for k, x in net.state_dict().items()}, file)
    teacher = Teacher(f"{file}#image-resnet-18:4", "video", net.dim)
    teacher.bind(store, snapshot, CPU)
    b = batch([0, 1])
    assert b.video is not None
    torch.testing.assert_close(teacher(b), net(b.video[:, :, 2]).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConflictError):
        Teacher(f"{file}#image-resnet-34:4", "video", 32).bind(store, snapshot, CPU)
    wrong = Teacher(f"{file}#image-resnet-18:4", "video", 7)
    wrong.bind(store, snapshot, CPU)
    with pytest.raises(UsageError, match=f"to {net.dim}"):
        wrong(b)
    file.write_bytes(b"no weights")
    with pytest.raises(CorruptError):
        Teacher(f"{file}#image-resnet-18:4", "video", 32).bind(store, snapshot, CPU)
    with pytest.raises(NotFoundError):
        Teacher(f"{tmp_path}/none.pt#image-resnet-18", "video", 32).bind(store, snapshot, CPU)


def test_given_vectors_are_matched_by_key(store: Store, run: Run, snapshot: Snapshot) -> None:
    embed(run, store)
    with open_store(store.path) as again:
        source = f"{store.path}/embeddings/{run.name}/audio"
        teacher = Teacher(source, "audio", 8)
        assert bind_teachers(nn.Sequential(teacher), again, snapshot, CPU) == []
        rows = [4, 0, 7]
        expected = video_means(again, run.name, "audio", snapshot.numbers[rows])
        np.testing.assert_allclose(teacher(batch(rows)).numpy(), expected, rtol=1e-6)
        assert teacher.known(batch(rows)).all()
    with pytest.raises(NotFoundError):
        digest_of(f"{store.path}/embeddings/{run.name}/none")


def test_another_teacher_than_at_the_start_is_refused(store: Store, run: Run, snapshot: Snapshot) -> None:
    import dataclasses

    source = str(run.path)
    kept = dataclasses.replace(snapshot, teachers=digests([source, ""]))
    assert Snapshot.from_json(json.loads(json.dumps(kept.to_json()))).teachers == kept.teachers != {}
    Teacher(source, "video", 32).bind(store, kept, CPU)
    with pytest.raises(ConflictError, match="another than when this run began"):
        Teacher(source, "video", 32).bind(store, dataclasses.replace(kept, teachers={source: "0"}), CPU)


def test_given_functions(snapshot: Snapshot) -> None:
    teacher = Teacher("runs/none", "video", 3)
    teacher.give(lambda b: torch.ones(len(b.row), 3))
    assert teacher(batch([0, 1])).tolist() == [[1, 1, 1]] * 2 and teacher.digest == "given"
