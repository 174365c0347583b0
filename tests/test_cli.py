"""The command line: exit codes, streams, three-line errors, suggestions, JSON, pipes, and what it loads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import avstore
from avstore.catalogue import INTRINSIC
from avstore.lock import StoreLock
from avstore.records import FIELDS
from avstore.selection import text_of
from cli import console
from cli.main import invoke
from tests.test_retrieval import planted
from tests.tiny_store import Tiny, default_spec, make_store

COMMANDS = ["ingest", "derive", "info", "ls", "verify", "train", "embed", "export", "convert", "query", "summarize"]
COMMANDS += ["explain", "report", "doctor", "demo", "bench"]
ROOT = Path(__file__).resolve().parents[1]
VIDEOS = [
    Tiny(2 + i % 2, key=f"{split}/{label}/{i}.mp4", label=label, split=split)
    for i, (label, split) in enumerate([("cat", "train"), ("dog", "train"), ("owl", "train"), ("cat", "test")] * 2)
]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store in the current folder, and nothing else there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AVSTORE_STORE", raising=False)
    failed = Tiny(1, key="train/cat/broken.mp4", status="failed", sound=None, picture=False, label="cat", split="train")
    return make_store(tmp_path / "s.zarr", [*VIDEOS, failed], default_spec(sample_rate=24000))


Said = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def go(*arguments: object) -> Said:
        code = invoke([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return go


def outside(*arguments: object, cwd: Path, **more: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("AVSTORE_STORE", None)
    command = [sys.executable, "-m", "cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload,no-any-return]


def test_help_loads_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys, time, resource; import cli.main; cli.main.invoke(['--help']);"
        "bad = [m for m in ('torch', 'av', 'numpy', 'zarr', 'faiss', 'rich') if m in sys.modules];"
        "assert not bad, bad; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    done = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
            for _ in range(3)]  # fmt: skip
    for command in COMMANDS:
        assert f"\n  {command} " in done[0].stdout
    assert min(float(d.stdout.splitlines()[-1]) for d in done) < 0.5  # CPU seconds: the machine may be busy


BENCHES = [
    "retrieval",
    "svm",
    "linear",
    "knn",
    "finetune",
    "summarize",
    "untrimmed",
    "loader",
    "growth",
    "methods",
    "pieces",
    "ingest",
    "step",
    "gpu",
]


@pytest.mark.parametrize("command", [*COMMANDS, *(f"bench {name}" for name in BENCHES)])
def test_every_command_has_help(command: str, run) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and "Usage: avstore" in out and len(out) > 200


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("trian", 2, "did you mean train?"),
        ("bench retreival", 2, "did you mean retrieval?"),
        ("info --jsn", 2, "did you mean --json?"),
        ("train avid-cmaa", 2, "did you mean avid-cma"),
        ("train avid --preset tinny", 2, "did you mean tiny"),
        ("train avid --set epohcs=3", 2, "did you mean epochs"),
        ("train avid --set epochs", 2, "is not key=value"),
        ("train avid nowhere.zarr", 4, "there is no store"),
        ("ls --columns labl", 4, "did you mean label"),
        ("ls --where splt=test", 4, "did you mean split"),
        ("ls --where label", 2, "is not column=value"),
        ("info nowhere.zarr", 4, "nowhere.zarr"),
        ("verify --threads 0", 2, "at least one"),
        ("ingest nowhere", 4, "nowhere"),
        ("ingest s.zarr --size 100", 2, "height x width"),
        ("ingest s.zarr --shard 3", 2, "i/n"),
        ("ingest s.zarr --fps many", 2, "--fps"),
        ("query", 2, "--video or --audio"),
        ("query --video 1 --audio 1", 2, "exclude each other"),
        ("query --video 1 --to smell", 2, "video or audio"),
        ("query --video 1", 4, "has no embeddings"),
        ("bench retrieval", 4, "has no embeddings"),
        ("train avid --fold 5/5", 2, "i from 0 to n - 1"),
        ("embed nosuchrun", 4, "there is no run"),
    ],
)
def test_wrong_ways_say_what_why_and_what_next(arguments: str, code: int, words: str, store: Path, run) -> None:
    got, out, err = run(*arguments.split())
    assert got == code, err
    assert out == "" and words in err
    lines = err.splitlines()
    assert len(lines) <= 3 and lines[0].startswith("error: ")
    assert "Traceback" not in err
    assert any(line.startswith("  next: ") for line in lines) or any(line.startswith("  why: ") for line in lines)


def test_debug_gives_the_traceback_wherever_it_stands(store: Path, run) -> None:
    for arguments in (["--debug", "info", "nowhere"], ["info", "nowhere", "--debug"]):
        code, _, err = run(*arguments)
        assert code == 4 and "Traceback" in err and "error: there is no store" in err


def test_which_store(store: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(run("info", "--json")[1])["path"] == "s.zarr"
    (tmp_path / "foreign.zarr").mkdir()
    (tmp_path / "foreign.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    assert run("info")[0] == 0  # another Zarr group is no candidate
    code, _, err = run("info", "foreign.zarr")
    assert code == 4 and "no avstore store" in err
    shutil.copytree(store, tmp_path / "t.zarr")
    code, _, err = run("info")
    assert code == 2 and "s.zarr, t.zarr" in err
    monkeypatch.setenv("AVSTORE_STORE", str(tmp_path / "t.zarr"))
    assert json.loads(run("info", "--json")[1])["path"].endswith("t.zarr")
    monkeypatch.delenv("AVSTORE_STORE")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = run("ls")
    assert code == 4 and "avstore ingest" in err


def test_another_format_is_a_conflict(store: Path, run) -> None:
    file = store / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"format":1', b'"format":7'))
    code, _, err = run("info")
    assert code == 5 and "format 7" in err


def test_info(store: Path, run) -> None:
    code, out, err = run("info", "--json")
    value = json.loads(out)
    assert code == 0 and err == ""
    assert (value["videos"], value["failed"], value["pending"]) == (8, 1, 0)
    assert value["reasons"] == {"unreadable": 1}
    assert value["hours"] == pytest.approx(sum(v.seconds for v in VIDEOS) / 3600)
    assert value["bytes"]["frames"] == sum(p.stat().st_size for p in (store / "frames").glob("c.*"))
    assert "8 ok, 1 failed" in run("info")[1]


def test_ls(store: Path, run) -> None:
    code, out, _ = run("ls")
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and lines[0] == ["number", "key", "seconds", "label", "split"] and len(lines) == 9
    assert lines[1] == ["0", "train/cat/0.mp4", "2.000", "cat", "train"]
    _, out, _ = run("ls", "--where", "split=test", "--where", "label!=dog", "--columns", "key,frames", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["key"] for r in rows] == ["test/cat/3.mp4", "test/cat/7.mp4"] and list(rows[0]) == ["key", "frames"]
    _, out, _ = run("ls", "--failed")
    assert out.splitlines()[1].split("\t")[1:3] == ["train/cat/broken.mp4", "unreadable"]
    assert len(run("ls", "--all", "--json")[1].splitlines()) == 9
    _, out, err = run("ls", "-n", "2", "--json")
    assert len(out.splitlines()) == 2 and "2 of 8" in err
    assert json.loads(out.splitlines()[0])["has_sound"] is True


def test_ls_filters_by_any_column(store: Path, run) -> None:
    """Columns of lists and folders, fields of the records, and what the store knows itself."""
    opened = avstore.open(store)
    video = opened[int(opened.numbers[1])].to_json()
    names = [*opened.columns, *FIELDS, *INTRINSIC]
    assert len(names) > 25
    for name in names:
        (value,) = opened.column(name, [video["number"]])
        code, out, err = run("ls", "--where", f"{name}={text_of(value)}", "--json")
        assert code == 0 and video["key"] in {json.loads(line)["key"] for line in out.splitlines()}, (name, value, err)
        code, out, _ = run("ls", "--where", f"{name}!={text_of(value)}", "--json")
        assert video["key"] not in {json.loads(line)["key"] for line in out.splitlines()}, (name, value)


@pytest.mark.parametrize("command", ["info", "ls", "verify", "query", "doctor", "ingest", "derive", "bench retrieval"])
def test_json_is_there_everywhere(command: str, run) -> None:
    assert "--json" in run(*command.split(), "--help")[1]


def test_text_of_users_is_shown_not_obeyed(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markup, escapes and line breaks in a key reach the terminal as text."""
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "s.zarr", [Tiny(1, key="[red]a[/red]\x1b[2J\nb\t.mp4")])
    _, out, _ = run("ls", "--columns", "key")
    assert out.splitlines()[1:] == [r"[red]a[/red]\x1b[2J\nb\t.mp4"]
    _, out, _ = run("ls", "--json", "--columns", "key")
    assert json.loads(out)["key"] == "[red]a[/red]\x1b[2J\nb\t.mp4"
    assert "\x1b" not in run("info", "nowhere\x1b[2J")[2]


def test_verify(store: Path, run) -> None:
    code, out, err = run("verify")
    assert code == 0 and out == "" and "whole (8 videos" in err
    shard = store / "waveform/c.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    code, out, err = run("verify")
    assert code == 1 and "waveform/c.0: video 0 (train/cat/0.mp4) at second 0: the checksum differs" in out
    code, out, _ = run("verify", "--json")
    report = json.loads(out)
    assert code == 1 and not report["ok"] and report["tasks"] == [0] and report["faults"][0]["video"] == 0
    assert run("verify", "--quick")[0] == 0


def test_derive_and_verify_what_it_wrote(store: Path, run) -> None:
    code, out, _ = run("derive", "--front-end", "avid-linear257", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["videos"] == 8
    code, _, err = run("derive", "--front-end", "avid-linear257")
    assert code == 0 and "8 videos" in err and run("verify")[0] == 0
    shard = store / "spectrograms/avid-linear257/c.0.0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    code, out, _ = run("verify")
    assert code == 1 and "spectrograms/avid-linear257/c.0.0: video 0" in out
    code, _, err = run("derive", "--front-end", "avid-linear256")
    assert code == 2 and "did you mean avid-linear257" in err


def test_query_and_retrieval(store: Path, run) -> None:
    planted(avstore.open(store), "r")
    code, out, _ = run("query", "--video", 0, "-k", 2, "--json")
    hits = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [h["rank"] for h in hits] == [1, 2]
    assert {h["label"] for h in hits} == {"cat"} and 0 not in {h["number"] for h in hits}  # not itself
    _, out, _ = run("query", "--audio", 1, "--to", "video", "-k", 1, "--json")
    assert json.loads(out)["number"] == 1  # across, its own sight is the answer
    _, out, err = run("query", "--video", 0, "--approximate", "-k", 1)
    assert "recall@10" in err and out.splitlines()[1].split("\t")[3] == "cat"
    _, out, _ = run("query", "--video", 0, "-k", 50, "--where", "label=owl", "--json")
    assert {json.loads(line)["label"] for line in out.splitlines()} == {"owl"}
    code, out, err = run("bench", "retrieval", "--json", "--class", "--no-raw", "--seeds", 0)
    table = json.loads(out)
    assert code == 0 and {r["features"] for r in table["rows"]} == {"avid", "chance"}
    assert run("bench", "retrieval", "--no-raw", "--seeds", 0, "--run", "q")[0] == 4
    code, out, _ = run("bench", "retrieval", "--markdown", "--instance", "--no-raw", "--seeds", 0)
    assert code == 0 and out.startswith("**retrieval") and "| instance | v-a | avid |" in out
    code, _, err = run("bench", "retrieval", "--label", "lable")
    assert code == 4 and "did you mean label" in err
    assert run("query", "--video", 8)[0] == 4  # the failed one


def test_train_lists_shows_and_previews(store: Path, run) -> None:
    for arguments in (["train"], ["train", "--list"], ["train", "--list-methods"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "avid-cma\t" in out
    _, out, _ = run("train", "avid", "--show-config", "--preset", "paper", "--json")
    rows = {json.loads(line)["key"]: json.loads(line) for line in out.splitlines()}
    assert rows["seed"]["value"] == 0 and rows["learning_rate"]["source"]
    _, out, _ = run("train", "avid", "--preset", "tiny", "--dry-run", "--json", "--seed", 3)
    value = json.loads(out)
    assert value["videos"] == 6 and "held-out" in value["selection"]
    _, out, _ = run("train", "avid", "--preset", "tiny", "--dry-run", "--json", "--fold", "0/3")
    assert json.loads(out)["videos"] == 4
    assert not (store.parent / "runs").exists()


def test_ingest_from_outside(tiny_media: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: preview, failures and exit 3, a no-op, another spec, a locked store, a closed pipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "train").mkdir(parents=True)
    for i, file in enumerate(sorted(tiny_media.rglob("*.mp4"))[:2]):
        shutil.copy(file, tmp_path / "set" / "train" / f"{i}.mp4")
    (tmp_path / "set" / "bad.mp4").write_bytes(b"not a video")
    code, out, _ = run("ingest", "set", "--dry-run", "--json")
    value = json.loads(out)
    assert code == 0 and (value["files"], value["new"], value["store"]) == (3, 3, "set.zarr")
    assert not (tmp_path / "set.zarr").exists()
    (tmp_path / "list.csv").write_text("path,label\ntrain/0.mp4,x\nnone.mp4,y\n")
    listed = json.loads(run("ingest", "list.csv", "--root", "set", "--dry-run", "--json")[1])
    assert listed["files"] == 1 and "1 missing" in listed["listed"]
    code, out, err = run("ingest", "set", "--workers", 1, "--json", "--front-end", "none")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and events[-1]["event"] == "Summary", err
    assert (events[-1]["ok"], events[-1]["failed"]) == (2, 1)
    assert "bad.mp4: " in err and "avstore train" in err
    code, out, err = run("ingest", "set")
    assert code == 3 and out == "" and "nothing was left to do" in err, err
    code, _, err = run("ingest", "set", "--fps", 8)
    assert code == 5 and "fps is 16 here, 8 was asked" in err
    with StoreLock(tmp_path / "set.zarr") as lock:
        lock.exclusive()
        code, _, err = run("ingest", "set")
        assert code == 5 and f"process {os.getpid()}" in err
    assert run("verify")[0] == 0
    piped = subprocess.run(
        f"{sys.executable} -m cli.main ls set.zarr --json | head -1", shell=True, cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert json.loads(piped.stdout)["status"] == "ok" and piped.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="process groups as on Linux")
def test_ctrl_c_is_130_and_says_how_to_go_on(tiny_media: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "ingest", str(tiny_media), "s.zarr", "--workers", "1"],
        cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stderr is not None
    for line in child.stderr:
        if "planned" in line:
            break
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    rest = child.stderr.read()
    assert child.wait(60) == 130 and "next: " in rest and "Traceback" not in rest
    child.stderr.close()
    assert outside("ingest", tiny_media, "s.zarr", cwd=tmp_path).returncode == 0  # repeating it goes on
    assert outside("verify", cwd=tmp_path).returncode == 0


def test_a_reader_that_goes_away_is_no_error(store: Path) -> None:
    """More rows than a pipe holds, and a reader that stops after the first."""
    code = "from cli import console\nimport cli.main as m\n"
    code += "def many(*a, **k):\n    [console.data('x' * 999) for _ in range(9999)]\n"
    code += "m.typer.main.get_command = lambda app: type('C', (), {'main': staticmethod(many)})\nm.run(['ls'])\n"
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c \"$CODE\" | head -1; exit ${{PIPESTATUS[0]}}"],
                          env={**os.environ, "CODE": code, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout) == 1000


def test_doctor(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    states = {c["check"]: c["state"] for c in report["checks"]}
    assert states["decoding"] == states["jpeg"] == states["disk"] == "ok" and set(states.values()) <= {
        "ok",
        "none",
        "broken",
    }
    assert (code == 0) == report["ok"]
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
    code, out, _ = run("doctor", "--folder", "nowhere")
    assert code == 1 and "broken  disk" in out


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_off_a_terminal_is_a_line_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with console.Progress("ingest", "files", clock=clock) as progress:
        for second in range(1, 100):
            clock.now = float(second)
            progress.update(second * 2, 1000, media=second * 60.0, failed=3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("ingest 60/1000 files, 2 files/s, 60 x real time, 3 failed, 7 min 50 s to go")


def test_progress_counts_from_where_it_went_on() -> None:
    clock = Clock()
    progress = console.Progress("train", "steps", clock=clock)
    progress.goes_on_from(100)
    clock.now = 10.0
    progress.update(120, 200)
    assert "2 steps/s" in progress.line and "40 s to go" in progress.line


def test_units() -> None:
    assert [console.duration(s) for s in (4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 05 min"]
    assert [console.size(n) for n in (12, 1536, 3 * 2**30)] == ["12 B", "1.5 KiB", "3.0 GiB"]
    assert console.visible("a\x00\u202e\udcff") == "a\\x00\\u202e\\udcff"
