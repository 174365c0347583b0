"""Decoding children: order, limits, crashes, hangs, and that nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faulty
import numpy as np
import pytest

from avstore.children import Child, Job, Pool
from avstore.codecs import decode_jpeg_into
from avstore.durable import temporary
from avstore.spec import Spec
from avstore.spool import Payloads, Spool

SPEC = Spec(height=32, width=48, fps=8, sample_rate=8000, front_ends=(), shard_seconds=8)


def job(path: Path, tmp: Path, kind: str = "decode", slot: int = 3, cpu: float = 60) -> Job:
    return Job(kind, str(path), str(temporary(tmp / f"video-{path.stem}")), cpu, slot)


def outcomes(folder: Path, names: list[str], tmp: Path, workers: int = 2, **how: float) -> list[str]:
    with Pool(workers, SPEC) as pool:
        jobs = [job(folder / n, tmp, "probe", 0, **how) for n in names]
        return [r.header.get("failed", "ok") for r in pool.run(jobs)]


@pytest.fixture
def clips(tiny_media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one good clip under several names; children misbehave with some of them."""
    faulty.install(tmp_path / "site", monkeypatch)
    good = min(tiny_media.rglob("*.mp4"))
    folder = tmp_path / "clips"
    folder.mkdir()
    names = "a b c segv once-segv killed once-killed leaves spins hangs once-hungry bad-disk secret slow"
    for name in names.split(" "):
        (folder / f"{name}.mp4").write_bytes(good.read_bytes())
    return folder


def test_a_decoded_video_comes_whole(tiny_media: Path, tmp_path: Path) -> None:
    with Pool(1, SPEC) as pool:
        for result in pool.run([job(min(tiny_media.rglob("*.mp4")), tmp_path)]):
            facts, index = result.header["facts"], result.header["index"]
            assert facts["status"] == "ok" and facts["frames"] == sum(r for _, _, r in index["frames"])
            assert facts["frames"] == sum(r for _, r in index["source"]) == 16
            assert len(index["waveform"]) == -(-facts["samples"] // 8000) and facts["sound_end"] > 0
            offset, length, _ = index["frames"][0]
            assert result.payloads is not None
            picture = np.zeros((32, 48, 3), np.uint8)
            decode_jpeg_into(bytes(result.payloads[offset, length - 4]), picture)
            assert picture.std() > 5
            offset, length = index["waveform"][0]
            assert np.abs(np.frombuffer(result.payloads[offset, length - 4], "<i2")).max() > 100
        assert {"avstore", "av", "numpy", "simplejpeg"} <= set(pool.versions)


def test_results_keep_the_order_of_the_jobs(clips: Path, tmp_path: Path) -> None:
    names = ["slow.mp4", "a.mp4", "b.mp4", "slow.mp4", "c.mp4"]
    with Pool(2, SPEC) as pool:
        seen = [Path(r.job.path).name for r in pool.run(job(clips / n, tmp_path, "probe") for n in names)]
        assert seen == names
        again = [Path(r.job.path).name for r in pool.run(job(clips / n, tmp_path, "probe") for n in names[:2])]
        assert again == names[:2]


def test_a_crash_costs_one_video_and_no_other(clips: Path, tmp_path: Path) -> None:
    names = ["a.mp4", "segv.mp4", "b.mp4", "leaves.mp4", "c.mp4", "killed.mp4", "a.mp4"]
    assert outcomes(clips, names, tmp_path) == ["ok", "crashed", "ok", "crashed", "ok", "crashed", "ok"]


def test_a_child_that_dies_once_costs_nothing(clips: Path, tmp_path: Path) -> None:
    deaths: list[str] = []
    with Pool(2, SPEC, on_death=lambda job, reason, message: deaths.append(message)) as pool:
        jobs = [job(clips / n, tmp_path, "probe") for n in ("once-segv.mp4", "a.mp4", "once-killed.mp4")]
        assert [r.header.get("failed", "ok") for r in pool.run(jobs)] == ["ok"] * 3
    assert sorted(deaths) == ["the decoder ended with SIGKILL", "the decoder ended with SIGSEGV"]


def test_the_second_try_is_alone(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    lock, busy, done = threading.Lock(), set[str](), Child.do

    def watched(self: Child, job: Job) -> object:
        with lock:
            busy.add(job.path)
            if "segv" in job.path:
                together.append(len(busy))
        try:
            return done(self, job)
        finally:
            with lock:
                busy.discard(job.path)

    monkeypatch.setattr(Child, "do", watched)
    names = ["slow.mp4", "once-segv.mp4", *["slow.mp4"] * 3]
    assert outcomes(clips, names, tmp_path) == ["ok"] * 5
    assert len(together) == 2 and together[1] == 1


def test_cpu_time_is_limited_in_the_child(clips: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    assert outcomes(clips, ["spins.mp4", "a.mp4"], tmp_path, cpu=1) == ["timed_out", "ok"]
    assert time.monotonic() - began < 40


def test_a_child_that_hangs_without_computing_is_ended(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "wall_seconds", property(lambda self: 1.0 if "hangs" in self.path else 60.0))
    assert outcomes(clips, ["hangs.mp4", "a.mp4"], tmp_path) == ["timed_out", "ok"]


def test_memory_is_limited_in_the_child(clips: Path, tmp_path: Path) -> None:
    assert outcomes(clips, ["once-hungry.mp4", "a.mp4"], tmp_path) == ["too_large", "ok"]


def test_a_failing_disk_is_not_the_file(clips: Path, tmp_path: Path) -> None:
    with Pool(1, SPEC) as pool:
        bad, secret = pool.run([job(clips / f"{n}.mp4", tmp_path, "probe") for n in ("bad-disk", "secret")])
    assert bad.header["machine"] == 5 and secret.header["failed"] == "unreadable"


def test_a_full_disk_under_the_spool_is_the_machine(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULL_DISK", "1")
    spec = Spec(height=1024, width=1024, fps=16, sample_rate=8000, front_ends=(), codec="raw")  # 48 MB a second
    with Pool(1, spec) as pool:
        (result,) = pool.run([job(clips / "a.mp4", tmp_path)])
    assert result.header["machine"] == 28 and ".tmp." in result.header["where"]


def test_a_large_video_goes_through_a_file_that_is_gone_afterwards(tiny_media: Path, tmp_path: Path) -> None:
    spec = Spec(height=1024, width=1024, fps=16, sample_rate=8000, front_ends=(), codec="raw")
    with Pool(1, spec) as pool:
        for result in pool.run([job(min(tiny_media.rglob("*.mp4")), tmp_path)]):
            spools = list(tmp_path.glob("*.tmp.*"))
            assert [str(p) for p in spools] == [result.job.spool] and spools[0].stat().st_size > 64 * 2**20
            offset, length, _ = result.header["index"]["frames"][-1]
            assert result.payloads is not None and len(result.payloads[offset, length]) == 1024 * 1024 * 3 + 4
    assert not list(tmp_path.glob("*.tmp.*"))


def test_the_spool_gives_back_what_it_got(tmp_path: Path) -> None:
    parts = [bytes([i]) * (i * 7) for i in range(1, 40)]
    for hold in (10**6, 300):
        path = tmp_path / "video-1.tmp.1"
        spool = Spool(path, hold)
        spans = [(spool.append(p), len(p)) for p in parts]
        body = spool.close()
        assert path.exists() == (hold == 300) == (body is None)
        payloads = Payloads(body, path)
        assert [bytes(payloads[s]) for s in spans] == parts
        payloads.close()
        assert not path.exists()


def test_the_budget_bounds_what_waits_and_the_writer_still_gets_all(tiny_media: Path, tmp_path: Path) -> None:
    files = sorted(tiny_media.rglob("*.mp4"))[:8]
    with Pool(2, SPEC, budget=1) as pool:
        most, got = 0, 0
        for result in pool.run([job(f, tmp_path) for f in files]):
            time.sleep(0.05)
            most = max(most, len(pool.done))
            got += "facts" in result.header
    assert got == 8 and most <= 2  # with a byte of budget only what was begun before the first came back


def test_stop_ends_the_children(clips: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    with Pool(2, SPEC) as pool:
        results = pool.run([job(clips / "slow.mp4", tmp_path, "probe")] * 100, stop)
        next(results)
        pids = [c.process.pid for c in pool.children]
        stop.set()
        assert list(results) == [] and not alive(pids)


def test_children_end_with_a_killed_parent(tiny_media: Path, clips: Path, tmp_path: Path) -> None:
    code = """
import sys, threading
from avstore.children import Pool, Job
from avstore.spec import Spec
pool = Pool(2, Spec(front_ends=()))
threading.Timer(0.5, lambda: None)
results = pool.run([Job("probe", sys.argv[1], "x.tmp.1", 60.0), *[Job("probe", sys.argv[2], "x.tmp.1", 600.0)] * 2])
next(results)
while len(pool.children) < 2: pass
print(*[c.process.pid for c in pool.children], flush=True)
next(results)
"""
    arguments = [sys.executable, "-c", code, str(clips / "a.mp4"), str(clips / "spins.mp4")]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(w) for w in parent.stdout.readline().split()]
    assert len(pids) == 2 and len(alive(pids)) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in until(10):
        if not alive(pids):
            break
    assert not alive(pids)


def test_ctrl_c_in_the_terminal_does_not_reach_the_children(tiny_media: Path, tmp_path: Path) -> None:
    child = Child(SPEC)
    try:
        assert os.getpgid(child.process.pid) != os.getpgid(0)
        os.kill(child.process.pid, signal.SIGINT)
        assert "facts" in child.do(job(min(tiny_media.rglob("*.mp4")), tmp_path)).header
    finally:
        child.end()


def test_a_folder_of_python_files_is_not_imported_by_the_children(
    tiny_media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    Child(SPEC).end()


def alive(pids: list[int]) -> list[int]:
    """Those that run: neither gone nor zombies."""
    out = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            out.append(pid)
    return out


def until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
