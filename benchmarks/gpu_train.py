"""R(2+1)D-18's training rate beside the matrix products' limit; fused Adam through a checkpoint; SyncBatchNorm in two
processes on one device."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avstore.errors import AvstoreError
from benchmarks.gpu import Bench, Row, rate, wanted
from trainers import checkpoint
from trainers.backbones import video_net
from trainers.compiled import begin_part, compile_networks
from trainers.config import TrainConfig
from trainers.optimiser import channels_last, make_optimiser
from trainers.process import kernels

ANCHORS = {(16, 112): "published: 425-537 clips/s on an H100 (R3D-18, batch 16, bf16, cached data)"}


class Head(nn.Module):
    """R(2+1)D-18 with a linear layer over its pooled features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = video_net("r2plus1d-18", width=width)
        self.last = nn.Linear(self.net.dim, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


def multiplications(module: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one forward pass in convolutions and linear layers, counted from the shapes."""
    with counted(module) as total, torch.no_grad():
        module(x)
    return total[0]


@contextlib.contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Multiply-accumulates of the forward passes within, in convolutions and linear layers: a list of one number."""
    total = [0]

    def count(layer: nn.Module, given: Any, out: Tensor) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        total[0] += out.numel() * weight[0].numel()

    hooks = [
        m.register_forward_hook(count)
        for m in module.modules()
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    ]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def stepper(bench: Bench, module: nn.Module, x: Tensor, bf16: bool, how: Any = "") -> Callable[[], None]:
    """One training step: forward, backward, fused SGD. how: `compile=` of the module's networks."""
    optimiser = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        begin_part(how)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = module(x).float().square().mean()
        loss.backward()
        optimiser.step()

    return step


def train_rates(bench: Bench, kinds: Sequence[str]) -> Iterator[Row]:
    """Clips a second for each (frames, side) and kind: fp32 (torch: convolutions in TF32), bf16, "bf16 compile",
    "bf16 graphs" (as `compile=` of a run)."""
    with kernels(torch.device(bench.device), False):
        yield from _train_rates(bench, kinds)


def _train_rates(bench: Bench, kinds: Sequence[str]) -> Iterator[Row]:
    for frames, side in bench.size.clips:
        batch = max(1, bench.size.batch * 16 * 112**2 // max(frames * side**2, 16 * 112**2))
        module = _head(bench)
        x = torch.randn(batch, 3, frames, side, side, device=bench.device)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        flops = 6 * multiplications(module, x[:1]) / 1e12  # forward, and twice that backward; 2 for each
        for kind in kinds:
            row: Row = {"what": f"{frames} x {side}², batch {batch}, {kind}", "unit": "clips/s"}
            precision, _, how = kind.partition(" ")
            if how and not bench.cuda:
                yield {**row, "note": "not measured on a CPU here: avstore bench step --only compiled"}
                continue
            ceiling = bench.limits.get(
                "matmul-bf16" if "bf16" in kind else "matmul-tf32", bench.limits.get("matmul-fp32")
            )
            try:
                torch.cuda.reset_peak_memory_stats() if bench.cuda else None
                if how:
                    torch.compiler.reset()  # or the second shape would be compiled for any shape
                    module = _head(bench)
                    compile_networks(module, how, x.device)  # type: ignore[arg-type]
                value = rate(bench, stepper(bench, module, x, precision == "bf16", how), batch)
            except (torch.cuda.OutOfMemoryError, RuntimeError) as e:
                yield {**row, "note": f"not measured: {type(e).__name__}: {' '.join(str(e).split())[:120]}"}
                continue
            note = f"{flops * value:.3g} TFLOP/s, {flops:.3g} TFLOP a clip; the limit: matrix products alone"
            if bench.cuda:
                note += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if (frames, side) in ANCHORS and kind != "fp32":
                note += f"; {ANCHORS[frames, side]}"
            yield {**row, "value": value, "limit": ceiling / flops if ceiling else None, "note": note}


def _head(bench: Bench) -> nn.Module:
    torch.manual_seed(0)
    module = Head(bench.size.width).to(bench.device)
    channels_last(module)
    return module


class _Net(nn.Module):
    """What checkpoints take: a small channels-last 3-d net with an (empty) state of a method."""

    def __init__(self) -> None:
        super().__init__()
        self.net = video_net("avid-r2plus1d-10", width=4, small=True)
        self.last = nn.Linear(self.net.dim, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))

    def method_state(self) -> dict[str, Tensor]:
        return {}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        del state


def adam_through_a_checkpoint(bench: Bench) -> Iterator[Row]:
    """Four steps at once against two, a checkpoint, and two in fresh objects; fused Adam, channels last: largest
    difference of weights and moments. The optimiser state is copied element by element only where strides are kept."""
    value = adam_difference(bench.device, bench.folder)
    yield {
        "what": "largest difference after going on from a checkpoint",
        "unit": "",
        "value": value,
        **wanted(value, "==", 0),
        "note": "of all weights and moments; deterministic kernels",
    }


def adam_difference(device: str, folder: Any) -> float:
    """See `adam_through_a_checkpoint`. Raises AvstoreError where the checkpoint has other tensors."""

    def fresh() -> tuple[_Net, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = _Net().to(device)
        channels_last(module)
        return module, make_optimiser(module, TrainConfig(optimiser="adam", learning_rate=1e-2))

    def steps(module: _Net, optimiser: torch.optim.Optimizer, which: range) -> None:
        for k in which:
            generator = torch.Generator().manual_seed(k)
            x = torch.randn(2, 3, 4, 32, 32, generator=generator).to(device)
            optimiser.zero_grad(set_to_none=True)
            module(x.contiguous(memory_format=torch.channels_last_3d)).square().mean().backward()
            optimiser.step()

    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    try:
        whole, adam = fresh()
        steps(whole, adam, range(2))
        saved = checkpoint.save(folder / "checkpoints", 2, whole, adam, {}, {})
        steps(whole, adam, range(2, 4))
        resumed, again = fresh()
        checkpoint.load(saved, resumed, again)
        steps(resumed, again, range(2, 4))
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before
    mine = {**whole.state_dict(), **checkpoint.flat_optimiser(whole, adam)}
    theirs = {**resumed.state_dict(), **checkpoint.flat_optimiser(resumed, again)}
    if mine.keys() != theirs.keys():
        raise AvstoreError("the resumed run has other tensors than the uninterrupted one")
    return max(float((mine[k].double() - theirs[k].double()).abs().max()) for k in mine if mine[k].numel())


def two_processes_one_device(bench: Bench) -> Iterator[Row]:
    """SyncBatchNorm over two processes on one device (gloo: NCCL refuses two ranks there) against one process."""
    row: Row = {"what": "largest difference of outputs and gradients to one process", "unit": ""}
    if not bench.cuda:
        yield {**row, **wanted(None, "<=", 1e-10), "note": "not measured: torch's SyncBatchNorm refuses a CPU"}
        return
    value = batch_norm_difference(bench.device)
    yield {**row, "value": value, **wanted(value, "<=", 1e-10), "note": "float64, over gloo"}


_CODE = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from benchmarks.gpu_train import rank; rank(sys.argv[2])"
)


def batch_norm_difference(device: str, timeout: float = 120) -> float:
    """Two processes of half a batch against one of the whole. Raises AvstoreError where one of them fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path), device],
            env={**os.environ, "RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        said = [c.communicate(timeout=timeout) for c in children]
    finally:
        for c in children:
            c.kill()
    for c, (_, error) in zip(children, said, strict=True):
        if c.returncode:
            raise AvstoreError("a process of SyncBatchNorm failed", (error.strip().splitlines() or ["no word"])[-1])
    return max(float(line) for out, _ in said for line in out.split())


def rank(device: str) -> None:
    """One of the two processes: prints its largest difference to the whole batch in one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    r = dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 8, 8, dtype=torch.float64).to(device)

    def net() -> nn.Module:
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Conv3d(3, 4, 3, bias=False), nn.BatchNorm3d(4), nn.SiLU(), nn.Conv3d(4, 2, 1))
        return layers.double().to(device)

    whole = net()
    out = whole(x)
    out.square().mean().backward()
    half = nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net()))
    mine = half(x[3 * r : 3 * r + 3])
    mine.square().mean().backward()
    off = (mine - out[3 * r : 3 * r + 3]).abs().max()
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        off = torch.maximum(off, (a.grad - b.grad).abs().max())
    print(float(off))
    sys.stdout.flush()
    del half
    import gc

    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
