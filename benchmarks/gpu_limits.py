"""The limits that figures stand beside: matrix products, copies on the device and to it, the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch

from benchmarks.gpu import Bench, Row, rate


def limits(bench: Bench) -> Iterator[Row]:
    """`key`s: matmul-fp32, matmul-bf16 (TFLOP/s), copy (GB/s, read and write counted), upload (GB/s), disk (MB/s)."""
    n = bench.size.matrix
    torch.manual_seed(0)
    for key, dtype, precision in (
        ("matmul-fp32", torch.float32, "highest"),
        ("matmul-tf32", torch.float32, "high"),
        ("matmul-bf16", torch.bfloat16, "highest"),
    ):
        if key == "matmul-tf32" and not bench.cuda:
            continue
        a = torch.randn(n, n, device=bench.device).to(dtype)
        out = torch.empty_like(a)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            value = rate(bench, lambda a=a, out=out: torch.mm(a, a, out=out), 2 * n**3 / 1e12)  # type: ignore[misc]
        finally:
            torch.set_float32_matmul_precision(before)
        yield {"key": key, "what": f"{n} x {n} matrix product, {key[7:]}, random data", "value": value,
               "unit": "TFLOP/s"}  # fmt: skip
    count = bench.size.copy_bytes
    source = torch.empty(count, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    yield {"key": "copy", "what": "copy on the device, bytes read and written",
           "value": rate(bench, lambda: target.copy_(source), 2 * count / 1e9), "unit": "GB/s"}  # fmt: skip
    host = torch.empty(min(count, 1 << 28), dtype=torch.uint8, pin_memory=bench.cuda)
    part = target[: host.numel()]
    yield {
        "key": "upload",
        "what": f"copy from {'pinned ' if bench.cuda else ''}memory to the device",
        "value": rate(bench, lambda: part.copy_(host, non_blocking=True), host.numel() / 1e9),
        "unit": "GB/s",
    }
    block = os.urandom(1 << 20)
    path = bench.folder / "speed"
    began = time.perf_counter()
    with open(path, "wb") as f:
        for _ in range(max(1, bench.size.disk_bytes >> 20)):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
    wall = time.perf_counter() - began
    path.unlink()
    yield {"key": "disk", "what": "disk, written and synced", "value": bench.size.disk_bytes / 1e6 / wall,
           "unit": "MB/s"}  # fmt: skip
