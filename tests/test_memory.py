"""A run that goes on from one of other videos: networks and Z go over, the bank is filled by embedding its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tiny_run import SETS, differing, store_in, tensors
from tiny_run import config as tiny_config

from avstore.errors import ConflictError, InterruptedRun
from avstore.store import Store
from trainers import memory
from trainers.config import RunConfig, resolve
from trainers.embed import embed_videos
from trainers.events import Event
from trainers.loop import train, train_with_stages
from trainers.methods import METHODS
from trainers.run import Run, build

OWN = ("snippets=3", "hop=0.25", "model_width=8", "heads=2", "feed_forward=16", "positives=2", "within_negatives=0",
       "alternate=step", "batch=4", "epochs=2", "steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_in(tmp_path_factory.mktemp("memory"), 14)


@pytest.fixture(scope="module")
def avid(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of videos 0, 2, ..., of class a."""
    folder = tmp_path_factory.mktemp("runs")
    return train("avid", store, tiny_config("steps=2"), folder / "avid", where=["label=a"]).run


@pytest.fixture(scope="module")
def cma(store: Store, avid: Run) -> Run:
    c = tiny_config("steps=2", name="avid-cma")
    return train("avid-cma", store, c, avid.path.parent / "avid-cma", init=avid.path).run


def temporal() -> RunConfig:
    sets = [*(s for s in SETS if s.split("=")[0] not in ("batch", "epochs")), *OWN]
    return resolve("temporal", sets=sets)


def started(name: str, init: Run, run: Run) -> dict[str, Any]:
    """The state of `run`'s method as it begins, by its embeddings one video after another."""
    numbers = run.snapshot.numbers
    found = embed_videos(init.load(), run, Store(run.snapshot.store), numbers)
    made = build(run.config, run.snapshot, len(numbers)).bank
    dim = made.memory.shape[2]
    expected = torch.zeros(len(numbers), 2, dim)
    for column, tower in enumerate(("video", "audio")):
        vectors, video, _ = found[tower]
        for row, number in enumerate(numbers):
            total = sum(v / np.linalg.norm(v) for v in vectors[video == number])
            expected[row, column] = torch.from_numpy(total / np.linalg.norm(total))
    return {"expected": expected}


@pytest.mark.parametrize(("name", "kind"), [("avid-cma", "avid"), ("temporal", "avid-cma")])
@pytest.mark.parametrize("other", ["selection", pytest.param("store", marks=pytest.mark.slow)])
def test_weights_and_z_go_over_and_the_bank_is_of_the_new_videos(
    name: str, kind: str, other: str, store: Store, avid: Run, cma: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = {"avid": avid, "avid-cma": cma}[kind]
    here = store if other == "selection" else store_in(tmp_path, 10, height=64, width=80)
    chosen: dict[str, Any] = {"where": ["label=b"]} if other == "selection" else {}
    banks, notes = [], []

    def spy(*given: Any, **more: Any) -> Any:
        banks.append(kept(*given, **more))
        return banks[-1]

    kept = memory.fill_memory
    monkeypatch.setattr(memory, "fill_memory", spy)
    c = tiny_config("steps=2", name="avid-cma") if name == "avid-cma" else temporal()
    hear = lambda event: notes.append(event.text) if event.kind == "note" else None  # noqa: E731
    run = train(name, here, c, tmp_path / name, init=init.path, on_event=hear, **chosen).run
    assert run.snapshot.init is not None and run.snapshot.init["checkpoint"] == init.checkpoint().digest
    assert not set(run.snapshot.numbers.tolist()) & set(avid.snapshot.numbers.tolist()) or other == "store"
    assert run.snapshot.statistics == init.snapshot.statistics, "bins as the networks learned them"
    assert any("other videos" in n for n in run.snapshot.notes) and any("filling the memory bank" in n for n in notes)
    ((filled, seen),) = banks
    assert bool(seen.all()) and len(filled) == len(run.snapshot.numbers)
    torch.testing.assert_close(filled, started(name, init, run)["expected"], atol=1e-5, rtol=0)
    one, two = tensors(init), tensors(run)
    assert torch.equal(one["method.safetensors:partition"], two["method.safetensors:partition"])
    rows = len(run.snapshot.numbers) * (3 if name == "temporal" else 1)
    assert two["method.safetensors:bank.memory"].shape == (rows, 2, 8)
    assert (two["method.safetensors:positives"] >= 0).all(), "mined in the new bank"

    monkeypatch.setattr(memory, "CHUNK", 2)  # and in pieces, with an end between them, it is the same
    again, _ = kept(init.load(), run, here, torch.zeros_like(filled))
    torch.testing.assert_close(again, filled, atol=1e-5, rtol=0)
    banks.clear()
    assert train(name, here, c, tmp_path / name, init=init.path, **chosen).repeated and not banks


def test_equal_selections_copy_the_rows(store: Store, avid: Run, tmp_path: Path, monkeypatch: Any) -> None:
    """Asked for again or not asked for: nothing is embedded, and the runs are equal to the bit."""
    monkeypatch.setattr(memory, "fill_memory", None)
    c = tiny_config("steps=1", name="avid-cma")
    one = train("avid-cma", store, c, tmp_path / "one", init=avid.path).run
    two = train("avid-cma", store, c, tmp_path / "two", init=avid.path, where=["label=a"]).run
    assert not differing(tensors(one), tensors(two)) and one.snapshot.digest == avid.snapshot.digest


@pytest.mark.slow
def test_an_interrupted_filling_begins_again(
    store: Store, avid: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    monkeypatch.setattr(memory, "CHUNK", 2)
    c = tiny_config("steps=1", name="avid-cma")

    def interrupt(event: Event) -> None:
        if "filling the memory bank" in event.text:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRun, match="stopped after 2 of 6 videos"):
        train("avid-cma", store, c, tmp_path / "cut", init=avid.path, where=["label=b"], on_event=interrupt)
    assert not Run(tmp_path / "cut").checkpoints()
    cut = train("avid-cma", store, c, tmp_path / "cut", init=avid.path, where=["label=b"]).run
    whole = train("avid-cma", store, c, tmp_path / "whole", init=avid.path, where=["label=b"]).run
    assert not differing(tensors(cut), tensors(whole))


def test_other_networks_are_refused_before_the_pass_over_the_store(
    store: Store, avid: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "fill_memory", None)
    c = tiny_config("steps=1", "width=8", name="avid-cma")
    with pytest.raises(ConflictError, match="other networks"):
        train("avid-cma", store, c, tmp_path / "wider", init=avid.path, where=["label=b"])


def test_a_stage_in_the_way_is_offered_as_it_is(store: Store, avid: Run, tmp_path: Path) -> None:
    c, stage = tiny_config("steps=1", name="avid-cma"), tiny_config("steps=2")
    with pytest.raises(ConflictError, match="another selection") as e:
        train_with_stages("avid-cma", store, c, avid.path.parent / "x", stage_config=stage, where=["label=b"])
    assert f"--init {avid.path}" in str(e.value)


def test_the_methods_that_go_on_keep_a_bank() -> None:
    """What `loop` fills is named bank.memory and bank.seen in the state of each stage."""
    for name, line in METHODS.items():
        if line.stage is not None:
            file = METHODS[line.stage].load()
            method = file.make(file.presets["tiny"], 40)
            assert {"bank.memory", "bank.seen"} <= set(method.method_state()), name


class _Silent(torch.nn.Module):
    """Hears nothing: its second tower is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def embed(self, video: Any = None, audio: Any = None) -> dict[str, torch.Tensor]:
        if video is None:
            return {}
        x = video.flatten(1)[:, :8] * self.weight
        return {"video": torch.nn.functional.normalize(x + 1e-3, dim=1)}


def test_rows_without_a_modality_keep_what_they_were_given(store: Store, cma: Run) -> None:
    noise = torch.nn.functional.normalize(torch.randn(len(cma.snapshot.numbers), 2, 8), dim=-1)
    filled, seen = memory.fill_memory(_Silent(), cma, store, noise)
    assert bool(seen[:, 0].all()) and not bool(seen[:, 1].any())
    assert torch.equal(filled[:, 1], noise[:, 1]) and not torch.equal(filled[:, 0], noise[:, 0])
    torch.testing.assert_close(filled.norm(dim=-1), torch.ones(len(noise), 2))


def _process(rank: int, world: int, folder: str, store: str, run: str) -> None:
    import avstore

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    memory.CHUNK = 2
    made, done = Run(run), []
    blank = torch.zeros(len(made.snapshot.numbers), 2, 8)
    filled, seen = memory.fill_memory(made.load(), made, avstore.open(store), blank, device="cpu", on_chunk=done.append)
    torch.save({"filled": filled, "seen": seen, "done": done}, Path(folder) / f"{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_videos_and_end_with_the_same_bits(store: Store, cma: Run, tmp_path: Path) -> None:
    for world in (1, 2):
        given = (world, str(tmp_path), str(store.path), str(cma.path))
        multiprocessing.start_processes(_process, given, nprocs=world, start_method="spawn")
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert alone["done"] == [2, 4, 6] and first["done"] == second["done"] == [4, 6]
    for x in (first, second):
        assert torch.equal(x["filled"], alone["filled"]) and torch.equal(x["seen"], alone["seen"])
    assert bool(alone["seen"].all())
