"""`avstore bench gpu`: every check and measure that wants a GPU, in one command, under ten minutes, into one report.

Each part runs in a process of its own with a time limit (so that a crash or a hang costs that part alone), yields rows
(what, value, the limit beside it, their ratio), and what cannot run says why. On a CPU all of it runs at toy size, in
this process: that shows that the script works, its numbers mean nothing, and the report says so.

The parts are in gpu_limits, gpu_train, gpu_media, gpu_search, gpu_run. Here: their order, the report, the machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from avstore.durable import write_atomic
from avstore.errors import UsageError, did_you_mean
from benchmarks.table import Table

MINUTES = 9.5  # for all parts together; what does not fit is told as not run
# what, value, unit, limit, of (value / limit; limit / value for seconds), note; or what, note where it could not be
# measured. asked, met: what is wanted of it and whether it is so (`wanted`)
Row = dict[str, Any]
COLUMNS = ("what", "value", "unit", "limit", "of", "asked", "met", "note")
LEGEND = (
    "limit: the most that this machine could give, by what was measured beside it (the note says by what). "
    "of: the share of it that was reached, limit / value for seconds. asked, met: what this project asks of the figure."
)
TOY = "At toy size, on a CPU: these numbers show that the script runs, and nothing else."


@dataclass(frozen=True)
class Size:
    """How much is measured. `seconds`: of each timing; `clips`: (frames, side) of R(2+1)D-18."""

    clips: tuple[tuple[int, int], ...]
    batch: int
    width: int  # channels of R(2+1)D-18's first stage; the paper's 64
    seconds: float
    matrix: int
    copy_bytes: int
    disk_bytes: int
    banks: tuple[int, ...]
    bank_queries: int
    whole_bank: float  # seconds: a refresh over all rows is run where a sample predicts less
    media: tuple[int, int, int]  # files, seconds each, height (16:9)
    pictures: int
    sound: tuple[int, int]  # windows, seconds each
    demo: tuple[int, int, int]  # training and test clips, steps (0: the preset's)


SIZES = {
    "full": Size(((8, 112), (16, 112), (8, 224), (32, 224)), 32, 64, 2.5, 8192, 2 << 30, 1 << 30, (232_000, 1_780_000),
                 8192, 60.0, (48, 10, 720), 4096, (256, 2), (300, 100, 0)),
    "toy": Size(((2, 32),), 2, 4, 0.05, 128, 1 << 20, 1 << 20, (600,), 64, 5.0, (2, 1, 96), 8, (2, 1), (10, 4, 2)),
}  # fmt: skip


@dataclass
class Bench:
    """What a part is given: the device's name, the sizes, a folder to work in, and the limits measured before it."""

    device: str
    size: Size
    folder: Path
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


def _limits(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_limits

    return gpu_limits.limits(bench)


def _train(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_train

    return gpu_train.train_rates(bench, ("fp32", "bf16"))


def _compiled(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_train

    return gpu_train.train_rates(bench, ("bf16 compile", "bf16 graphs"))


def _store(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_store

    return gpu_store.store_against_synthetic(bench)


def _adam(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_train

    return gpu_train.adam_through_a_checkpoint(bench)


def _batch_norm(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_train

    return gpu_train.two_processes_one_device(bench)


def _jpeg(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_media

    return gpu_media.jpeg(bench)


def _sound(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_media

    return gpu_media.spectrograms(bench)


def _ingest(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_media

    return gpu_media.ingest_rates(bench)


def _bank(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_search

    return gpu_search.bank_and_mining(bench)


def _search(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_search

    return gpu_search.engines(bench)


def _run(bench: Bench) -> Iterator[Row]:
    from benchmarks import gpu_run

    return gpu_run.avid_cma(bench)


@dataclass(frozen=True)
class Part:
    """A line of PARTS. `seconds`: after which it is ended, at full size."""

    title: str
    run: Callable[[Bench], Iterator[Row]]
    seconds: float


PARTS = {  # in the order in which they run: checks first, what may be cut by the time last
    "limits": Part("What this machine can do at most", _limits, 60),
    "adam": Part("Fused Adam through a checkpoint, channels last", _adam, 40),
    "batch-norm": Part("SyncBatchNorm: two processes on one device", _batch_norm, 60),
    "train": Part("R(2+1)D-18: training clips a second", _train, 120),
    "store": Part("Training from the store, and the loader alone", _store, 100),
    "ingest": Part("Ingest: DALI, a bare NVDEC loop, PyAV", _ingest, 120),
    "jpeg": Part("JPEG on the device and on CPU threads", _jpeg, 45),
    "sound": Part("Spectrograms on the device", _sound, 40),
    "search": Part("Exact search: engines", _search, 60),
    "bank": Part("Memory bank and CMA mining", _bank, 120),
    "run": Part("AVID-CMA on the demo set, to its retrieval table", _run, 200),
    "compiled": Part("R(2+1)D-18: training clips a second, compiled and in CUDA graphs", _compiled, 300),
}


@dataclass
class Report:
    """All that was measured. `parts`: name -> rows, seconds, why (a part that did not end)."""

    machine: dict[str, Any]
    size: str
    seconds: float
    parts: dict[str, dict[str, Any]]

    def tables(self) -> list[Table]:
        """A table for each part, in their order; figures as text, in four digits, whatever their size."""
        out = []
        for name, part in self.parts.items():
            why = (f"Did not end: {part['why']}",) if part["why"] else ()
            rows = [{k: _digits(v) for k, v in row.items()} for row in part["rows"]]
            used = tuple(c for c in COLUMNS if c in ("what", "value", "note") or any(r.get(c) for r in rows))
            about = (*why, f"this part took {part['seconds']:.0f} s")
            out.append(Table(f"{PARTS[name].title} (--part {name})", used, rows, about))
        return out

    def verdicts(self) -> Table:
        """Every figure of which something is asked, and every part that did not end: the report in short."""
        rows: list[Row] = []
        for name, part in self.parts.items():
            of = {"part": name}
            rows += [of | {k: _digits(v) for k, v in r.items()} for r in part["rows"] if "asked" in r]
            if part["why"]:
                rows.append({**of, "what": "did not end", "met": False, "note": part["why"]})
        return Table("What is asked, and whether it is so", ("part", "what", "value", "asked", "met", "note"), rows)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        words = ", ".join(f"{k} {v}" for k, v in self.machine.items() if v is not None)
        head = f"# avstore bench gpu\n\n{words}; {self.size} size; {self.seconds:.0f} s in all.\n"
        toy = [f"**{TOY}**\n"] if self.size == "toy" else []
        tables = [t.to_markdown() for t in (self.verdicts(), *self.tables())]
        return "\n".join([head, *toy, f"{LEGEND}\n", *tables])

    def write(self, folder: Path) -> tuple[Path, Path]:
        """gpu.json and gpu.md in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "gpu.json", folder / "gpu.md"
        write_atomic(paths[0], (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        write_atomic(paths[1], self.to_markdown().encode())
        return paths


def run(
    *,
    device: str = "auto",
    parts: Sequence[str] = (),
    size: str | None = None,
    minutes: float = MINUTES,
    work: Path | None = None,
    alone: bool | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Report:
    """Runs `parts` (default all) on `device` ("auto": CUDA where there is a device, else the CPU at toy size).

    size: "full" or "toy"; default by the device. work: a folder for stores and media, default one that is removed.
    alone: each part in a process of its own; default on CUDA. UsageError for unknown names.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device", "torch sees none", "avstore doctor says why; or --device cpu")
    size = size or ("full" if device.startswith("cuda") else "toy")
    if size not in SIZES:
        raise UsageError(f"no size {size!r}", did_you_mean(size, SIZES))
    for name in parts:
        if name not in PARTS:
            raise UsageError(f"bench gpu has no part {name!r}", did_you_mean(name, PARTS))
    if minutes <= 0:
        raise UsageError(f"{minutes} minutes", "more than none")
    chosen = [name for name in PARTS if not parts or name in parts]
    alone = device.startswith("cuda") if alone is None else alone
    began = time.monotonic()
    done: dict[str, dict[str, Any]] = {}
    limits: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="avstore-gpu-") as scratch:
        for i, name in enumerate(chosen):
            progress(name, i, len(chosen))
            left = 60 * minutes - (time.monotonic() - began)
            bench = Bench(device, SIZES[size], (work or Path(scratch)) / name, limits)
            since = time.monotonic()
            why: str | None
            if left < 5:
                rows, why = list[Row](), f"the {minutes:g} minutes were over"
            elif alone:
                rows, why = _alone(name, bench, min(PARTS[name].seconds, left))
            else:
                rows, why = _here(name, bench)
            done[name] = {"rows": rows, "why": why, "seconds": time.monotonic() - since}
            limits |= {r["key"]: r["value"] for r in rows if "key" in r and r.get("value") is not None}
        progress("done", len(chosen), len(chosen))
    return Report(machine(device), size, time.monotonic() - began, done)


def _here(name: str, bench: Bench) -> tuple[list[Row], str | None]:
    """The rows of a part, and why it ended early if it did."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        for row in PARTS[name].run(bench):
            rows.append(_ratio(row))
    except Exception as e:  # whatever fails is what the report is to say; the other parts go on
        return rows, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return rows, None


def _ratio(row: Row) -> Row:
    """The row with the share of its limit. A figure that is not finite is none: JSON has no other way."""
    value, limit = row.get("value"), row.get("limit")
    if value is not None and not math.isfinite(value):
        lost = {k: x for k, x in row.items() if k not in ("value", "limit", "met")}
        said = f"not measured: it came out as {value}; {row.get('note', '')}".rstrip("; ")
        return {**lost, **({"met": False} if "asked" in row else {}), "note": said}
    if value is None or not limit or not math.isfinite(limit):
        return {k: x for k, x in row.items() if k != "limit"}
    return {**row, "of": limit / value if row.get("unit") == "s" and value else value / limit}


def wanted(value: float | None, sign: str, bound: float, what: str = "") -> Row:
    """`asked` and `met` of a row: what is asked of `value`; of a figure that was not measured (None) `asked` alone.
    sign: ">=", "<=" or "==" (NaN never meets it). what: of what, where it is not the row's own value."""
    asked = f"{sign} {bound:g}{' ' if what else ''}{what}"
    if value is None:
        return {"asked": asked}
    return {"asked": asked, "met": bool({">=": value >= bound, "<=": value <= bound, "==": value == bound}[sign])}


def _digits(value: Any) -> Any:
    """A figure in four digits: a table's three decimals would show 4e-7 as 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from benchmarks.gpu import child; child(sys.argv[2])"


def _alone(name: str, bench: Bench, seconds: float) -> tuple[list[Row], str | None]:
    """As `_here`, in a process of its own: rows come as lines, so that those before a crash are kept."""
    given = {"name": name, "device": bench.device, "size": asdict(bench.size), "folder": str(bench.folder),
             "limits": bench.limits}  # fmt: skip
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path), json.dumps(given)],
            stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        why = None
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            why = f"ended after {seconds:.0f} s"
        finally:
            if child.poll() is None:
                import signal

                os.killpg(child.pid, signal.SIGKILL)  # its decoding children too
                child.wait()
        out.seek(0)
        lines = [json.loads(line) for line in out.read().decode().splitlines() if line.startswith("{")]
        err.seek(0)
        words = err.read().decode(errors="replace").strip().splitlines()
    rows = [line["row"] for line in lines if "row" in line]
    ends = [line for line in lines if "why" in line]
    if why is None:
        why = ends[-1]["why"] if ends else f"exit code {code}: {words[-1] if words else 'no word'}"[:300]
    return rows, why


def child(text: str) -> None:
    """The process of one part: its rows, then why it ended early, as JSON lines."""
    given = json.loads(text)
    sizes: dict[str, Any] = {k: tuple(map(tuple, v)) if k == "clips" else tuple(v) if isinstance(v, list) else v
             for k, v in given["size"].items()}  # fmt: skip
    bench = Bench(given["device"], Size(**sizes), Path(given["folder"]), given["limits"])
    bench.folder.mkdir(parents=True, exist_ok=True)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def tell(value: dict[str, Any]) -> None:
        lines.write(json.dumps(value) + "\n")
        lines.flush()

    why = None
    try:
        for row in PARTS[given["name"]].run(bench):
            tell({"row": _ratio(row)})
    except Exception as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    tell({"why": why})


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    import torch

    from avstore import dali
    from trainers.search import faiss_flavour

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out: dict[str, Any] = {"device": device, "python": platform.python_version(), "torch": torch.__version__,
                           "cpus": cpus, "faiss": faiss_flavour(), "dali": dali.installed()}  # fmt: skip
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(torch.device(device))
        out |= {"device": about.name, "memory": f"{about.total_memory / 2**30:.0f} GiB", "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version()}  # fmt: skip
    return out


def rate(bench: Bench, call: Callable[[], Any], items: float = 1.0, seconds: float | None = None) -> float:
    """Items a second of `call`, which does `items` of them: warmed up by three calls, then timed for `seconds`, and
    the device waited for at the end."""
    import torch

    def wait() -> None:
        if bench.cuda:
            torch.cuda.synchronize()

    for _ in range(3):  # CUDA graphs are recorded at the second call
        call()
    wait()
    limit, began, done = bench.size.seconds if seconds is None else seconds, time.perf_counter(), 0
    while True:
        call()
        done += 1
        if time.perf_counter() - began >= limit:
            wait()  # what was launched ahead belongs to the time
            return done * items / (time.perf_counter() - began)
        if bench.cuda and done % 8 == 0:
            wait()  # never far ahead of the device
