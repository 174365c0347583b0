"""The reader by itself: it imports little, a policy's error is told, slots go round, and layouts are exact."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avstore.errors import AvstoreError
from avstore.filler import _scaled
from avstore.loader import Loader
from avstore.sampler import Order
from avstore.slots import Layout, Memory
from avstore.views import RandomView
from tests.tiny_store import Tiny, make_store


def test_the_reader_imports_neither_torch_nor_av() -> None:
    code = "import sys, avstore.reader; print([m for m in ('torch', 'av', 'faiss', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from(["uint8", "int16", "int64", "bool"])
        ),
        min_size=1, max_size=5,
    ),
    st.integers(1, 3),
)  # fmt: skip
def test_fields_of_slots_never_overlap(shapes: list[tuple[list[int], str]], slots: int) -> None:
    layout = Layout({f"f{i}": (tuple(shape), dtype) for i, (shape, dtype) in enumerate(shapes)})
    memory = Memory(slots * layout.nbytes, shared=False)
    views = [layout.views(memory.map, k) for k in range(slots)]
    for k, slot in enumerate(views):
        for i, array in enumerate(slot.values()):
            array[...] = (k * 7 + i) % 2
            assert array.ctypes.data % 64 == 0
    for k, slot in enumerate(views):
        for i, (array, (shape, dtype)) in enumerate(zip(slot.values(), shapes, strict=True)):
            assert array.shape == tuple(shape) and array.dtype == dtype and (array == (k * 7 + i) % 2).all()
    del views, slot, array
    memory.close()


def test_memory_outlives_its_owner_while_arrays_use_it() -> None:
    memory = Memory(8192, shared=True)
    array = np.frombuffer(memory.map, np.uint8)
    array[:] = 7
    memory.close()
    assert (array == 7).all()


@given(
    st.integers(0, 40), st.integers(0, 40), st.integers(8, 100), st.integers(8, 100), st.sampled_from([1, 2, 4, 8])
)  # fmt: skip
def test_scaled_boxes_stay_inside_the_picture(y: int, x: int, h: int, w: int, scale: int) -> None:
    ((top, left, height, width),) = _scaled(np.array([[y, x, h, w]]), scale).tolist()
    assert height >= 1 and width >= 1
    if h >= 2 * scale and w >= 2 * scale:
        assert y <= top * scale and (top + height) * scale <= y + h
        assert x <= left * scale and (left + width) * scale <= x + w
        assert height * scale > h - 2 * scale and width * scale > w - 2 * scale


@dataclass(frozen=True)
class Broken(RandomView):
    """A policy with a bug."""

    def starts(self, *_):
        raise ZeroDivisionError("a bug of mine")


@pytest.mark.parametrize("in_process", [True, False])
def test_an_error_in_a_policy_is_told_not_hung(tmp_path: Path, in_process: bool) -> None:
    path = make_store(tmp_path / "s.zarr", [Tiny(3.0), Tiny(2.0)])
    o = Order(2, seed=0, batch_size=2)
    with Loader(path, None, Broken(), order=o, frames=4, in_process=in_process) as clips:
        with pytest.raises(AvstoreError, match="a bug of mine"):
            list(clips.epoch(0))
        with pytest.raises(AvstoreError, match="a bug of mine"):
            list(clips.epoch(1))


def test_many_iterations_left_early_lose_no_slot(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", [Tiny(3.0), Tiny(2.0), Tiny(9.0)])
    with Loader(path, None, RandomView(), order=Order(3, 50, seed=0, batch_size=3), frames=4, slots=2,
                in_process=False) as clips:  # fmt: skip
        for i in range(30):
            it = clips.steps(i)
            for k in range(i % 4):
                assert next(it).step == i + k
        assert [b.step for b in clips.steps(0, 50)] == list(range(50))
