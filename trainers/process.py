"""The process that trains: its device and precision, threads, signals, and the group of processes under `torchrun`."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from avstore.errors import UsageError
from trainers import checkpoint as checkpoints
from trainers import distributed
from trainers.config import TrainConfig


def choose_device(asked: str) -> torch.device:
    """The device of this process. UsageError for one that is not there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as e:
        raise UsageError(f"no device {asked!r}", str(e).splitlines()[0], "--set device=cpu or device=cuda") from e
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                "there is no CUDA device", "torch sees none", "avstore doctor says why; or --set device=cpu"
            )
        several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
        if device.index is not None and several:
            raise UsageError(
                f"device={asked} in several processes", "each takes a device of its own", "--set device=cuda"
            )
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UsageError(
                f"no device {device}: there {'is' if count == 1 else 'are'} {count}",
                "torchrun started more processes than there are devices" if several else "they count from cuda:0",
                f"torchrun --nproc-per-node {count}" if several else "--set device=cuda",
            )
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UsageError(f"device {asked!r}", "training runs on cpu or cuda", "--set device=cpu")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """'auto': bf16 where the hardware multiplies it, else fp32 (emulated bf16 is several times slower)."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = checkpoints.environment()["cpu_features"]
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(features) else "fp32"


@contextlib.contextmanager
def processes(config: TrainConfig) -> Iterator[torch.device]:
    """The device, and under `torchrun` a process group that is taken down in the order that gloo survives."""
    inside = dist.is_available() and dist.is_initialized()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and not inside
    device = choose_device(config.device)
    if several and device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)  # named, or barriers guess it
    elif several:
        dist.init_process_group("gloo")
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), kernels(device, config.deterministic):
        try:
            yield device
        except BaseException:
            if several:
                with contextlib.suppress(RuntimeError, ValueError):
                    dist.destroy_process_group()
            raise
        if several:
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()


@contextlib.contextmanager
def kernels(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Which kernels CUDA may take: the fastest that cuDNN finds for each shape, or those that give the same bits each
    time (where torch has such; it warns of what has none). A CPU's are deterministic already."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    asked, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it before its first product
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.benchmark, cudnn.deterministic = False, True
    elif not cudnn.deterministic:  # somebody's own wish stands
        cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(asked, warn_only=warned)


@contextlib.contextmanager
def thread_count(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once. Only the main thread can listen."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    for s in before:
        signal.signal(s, ask)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def agreed(stopping: bool, device: torch.device) -> bool:
    """Whether any rank was asked to stop: all of them then stop at this step."""
    if distributed.world() == 1:
        return stopping
    flag = torch.tensor([float(stopping)], device=device)
    return bool(distributed.all_reduce_sum(flag).item())
