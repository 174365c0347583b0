"""docs/papers.md: commands parse, run files resolve, what it calls missing is missing, its figures are the papers'."""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from avstore.frontends import FRONT_ENDS
from cli.main import app
from trainers.config import METHODS, RunConfig, resolve, resolve_stage
from trainers.fit import needs_of

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "papers.md").read_text()
COMMANDS = re.findall(r"^    (avstore [^\n]+)", TEXT, re.M)
TOYS = re.findall(r"^    \$ (avstore [^\n]+)", TEXT, re.M)  # at toy size, on the demo set, with what they printed
TOMLS = sorted((ROOT / "docs" / "papers").glob("*.toml"))
PAPERS = ROOT.parent / "shared" / "papers"


@functools.cache
def group() -> Any:
    """The command `avstore`."""
    return typer.main.get_command(app)


@functools.cache
def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The command's name and its typed values, without running it. The parser's own error for what does not exist."""
    words = shlex.split(line)[1:]
    command = group()
    name = []
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no such command: {line}"
        name.append(words[0])
        command = command.commands[words.pop(0)]
    return " ".join(name), command.make_context(name[-1], words).params


def resolved(line: str) -> RunConfig:
    """The configuration of an `avstore train` line."""
    values = parsed(line)[1]
    given = values["config"]
    return resolve(
        values["method"], preset=values["preset"], toml_file=given and ROOT / given, sets=list(values["set_"] or ())
    )


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    name, values = parsed(line)
    if name == "train":
        assert resolved(line).preset == "paper", line  # of the papers, by a run file or by name
        if METHODS[values["method"]].stage:
            given = values["config"]
            resolve_stage(values["method"], preset=values["preset"], toml_file=given and ROOT / given)


@pytest.mark.parametrize("line", TOYS)
def test_toy_commands_parse(line: str) -> None:
    name, values = parsed(line)
    if name == "train":
        config = resolve(values["method"], preset=values["preset"], sets=list(values["set_"] or ()))
        assert config.preset == "tiny" and any(s.startswith("steps=") for s in values["set_"]), line


@pytest.mark.parametrize("bench", ["linear", "svm"])
def test_every_published_figure_is_asked_for(bench: str) -> None:
    from benchmarks import published

    for name in published.names(bench):  # type: ignore[arg-type]
        assert re.search(rf"(?m)^    avstore bench {bench} .*--published {name}( |$)", TEXT) or (
            f"`--published {name}`" in TEXT  # the same command on another store
        ), name


def test_toy_commands_stand_in_the_order_in_which_they_run() -> None:
    """Their runs and store are made above; each section of a table or figure has one, with what it printed."""
    made = {"demo/demo.zarr"}
    assert TOYS[:2] == ["avstore demo demo/media", "avstore ingest demo/media demo/demo.zarr"]
    for line in TOYS:
        name, values = parsed(line)
        made |= {str(values["run"])} if name == "train" else set()
        # "--run with-async" of a bench or a query names embeddings: of a run that was made above
        read = set(re.findall(r"runs/[\w-]+|[\w/]+\.zarr", line))
        read |= {f"runs/{x}" for x in re.findall(r"--run ([\w-]+)(?= |$)", line)}
        assert read <= made, (line, read - made)
    sections = re.split(r"^## ", TEXT, flags=re.M)
    for part in sections:
        if re.match(r"S\d ", part):
            title = part.splitlines()[0]
            assert re.search(r"^    \$ avstore ", part, re.M), f"{title}: no toy command"
            printed = re.findall(r"^    (?!\$ |avstore )\S.*", part, re.M)
            assert printed, f"{title}: what its toy commands printed is not there"


@pytest.mark.slow
def test_toy_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, in order, in an empty folder."""
    from cli.main import invoke

    monkeypatch.chdir(tmp_path)
    for line in TOYS:
        assert invoke(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"


def test_words_that_benches_know() -> None:
    """--preset, --modality, --published, --block, ... of each bench; --profile, --list-kind and the like."""
    from avstore.official_lists import KINDS
    from avstore.spec import PROFILES, Spec
    from benchmarks import explain, finetune, linear, svm
    from benchmarks.recipe import make_recipe
    from cli.export import LAYOUTS
    from trainers.encoders import BLOCKS

    published = {"finetune": finetune.PUBLISHED, "linear": linear.PUBLISHED, "svm": svm.PUBLISHED}
    seen = set()
    for line in COMMANDS:
        name, values = parsed(line)
        seen.add(name)
        if name == "bench finetune":
            fps = values["fps"]
            fps = int(fps) if fps is not None and fps.isdigit() else fps
            make_recipe(values["preset"], values["modality"], values["frames"], fps=fps, size=values["size"])
        if values.get("published"):
            assert values["published"] in published[name.split()[1]], line
        if name in ("bench linear", "bench svm"):
            assert set(values["block"] or ()) <= set(BLOCKS), line
            assert values.get("modality", "a") in ("a", "v", "av"), line
        if name == "explain":
            assert values["block"] in (None, *BLOCKS) and values["projection"] in explain.PROJECTIONS, line
        if name == "export":
            assert values["layout"] in LAYOUTS, line
        if name == "ingest":
            assert values["list_kind"] is None or values["list_kind"] in KINDS, line
            assert values["profile"] is None or values["profile"] in PROFILES, line
            if values["size"]:
                height, width = (int(n) for n in values["size"].split("x"))
                Spec(height=height, width=width, fps=values["fps"])
    assert {"train", "ingest", "embed", "export", "explain", "summarize", "query", "report", "bench svm"} <= seen


def test_runs_are_trained_before_they_are_used() -> None:
    """Every runs/... that a line reads is what a `train` line of the page writes."""
    written = {str(parsed(x)[1]["run"]) for x in COMMANDS if x.startswith("avstore train ")}
    lines = COMMANDS + [p.read_text() for p in TOMLS]
    read = {run for x in lines for run in re.findall(r"runs/[\w-]+", x)}
    assert read and read <= written, sorted(read - written)


def test_stores_are_ingested_before_they_are_used() -> None:
    made = {str(parsed(x)[1]["store"]) for x in COMMANDS if x.startswith("avstore ingest ")}
    read = {s for x in COMMANDS for s in re.findall(r"[\w-]+\.zarr", x)}
    assert read <= made, sorted(read - made)


@pytest.mark.parametrize("line", [x for x in COMMANDS if x.startswith("avstore train ")])
def test_a_run_can_hear_what_it_asks_for(line: str) -> None:
    """Its front-end exists."""
    heard = needs_of(resolved(line)).front_end
    assert heard is None or heard in FRONT_ENDS


@pytest.mark.parametrize("file", TOMLS, ids=lambda p: p.name)
def test_run_files(file: Path) -> None:
    """Each is used, resolves, starts from the paper's preset, and holds nothing that this preset says already."""
    table = tomllib.loads(file.read_text())
    assert f"docs/papers/{file.name}" in TEXT and table["preset"] == "paper"
    config, paper = resolve(table["method"], toml_file=file), resolve(table["method"], preset="paper")
    assert config.asked == set(table) - {"method", "preset"}
    ours = config.values()
    same = {k for k in config.asked if ours[k] == paper.values()[k]}
    assert len(same) < len(config.asked)
    assert same <= {"dim", "audio_dim", "image_dim"}, f"{file.name} repeats the preset: {sorted(same)}"


def test_every_file_that_is_named_is_there() -> None:
    for name in re.findall(r"docs/papers/[\w.-]+\.toml", TEXT):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\((\w+\.md)\)", TEXT):
        assert (ROOT / "docs" / name).is_file(), name


def test_what_is_called_missing_is_missing() -> None:
    """A line of that list must go when its thing comes."""
    from trainers.backbones import AUDIO, IMAGE, VIDEO

    part = TEXT[TEXT.index("## Missing") : TEXT.index("## Stores")]
    found = re.findall(r"^- (front-end|network|option) `([^`]+)`", part, re.M)
    assert found and {kind for kind, _ in found} <= {"front-end", "network", "option"}
    for kind, what in found:
        if kind == "front-end":
            assert what not in FRONT_ENDS, f"{what} exists: take it out of docs/papers.md"
        elif kind == "network":
            assert what not in {*AUDIO, *IMAGE, *VIDEO}, f"{what} exists: take it out of docs/papers.md"
        else:
            *path, option = what.split()
            command = group()
            for word in path:
                command = command.commands[word]
            options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            assert option not in options, f"{what} exists: take it out of docs/papers.md"


def test_published_figures_stand_in_the_papers() -> None:
    """Each number of a line `Published, FILE: ...` is in that paper's text."""
    if not PAPERS.is_dir():
        pytest.skip(f"no papers: {PAPERS} is not there")
    lines = re.findall(r"^Published, ([\w-]+\.txt): (.+)$", TEXT, re.M)
    assert len(lines) >= 12
    for name, words in lines:
        text = (PAPERS / name).read_text()
        numbers = re.findall(r"\d+\.\d+", words)
        # "0.1 and 0.9" of S1's Table 3 as well; a number counts only whole
        missing = [n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}(?![\d])", text)]
        assert numbers and not missing, (name, missing)


def test_every_table_and_figure_has_a_section() -> None:
    """Those of clips-and-protocols.md, section 5."""
    heads = " | ".join(re.findall(r"^## (.+)$", TEXT, re.M))
    for wanted in (
        "S4 (AVID) Table 1", "S4 (AVID) Table 2", "S0 (temporal) Table 1", "S0 (temporal) Table 2",
        "S0 (temporal) Fig. 2", "S2 Table 7.1", "S2 Tables 7.2 and 7.3", "S2 Table 7.4", "S1 (AVCL) Table 1",
        "S1 (AVCL) Tables 2 and 3", "S1 (AVCL) Table 4", "S1 (AVCL) Fig. 2", "S3 (CrissCross) Fig. 2",
        "S3 (CrissCross) Table 1", "S3 (CrissCross) Fig. 3", "S3 (CrissCross) Table 2",
        "S3 (CrissCross) Tables 3 and 4", "S3 (CrissCross) Fig. 4", "S3 (CrissCross) Fig. 5",
    ):  # fmt: skip
        assert wanted in heads
