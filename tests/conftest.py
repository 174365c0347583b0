"""What every test may ask for: the real media beside the repository, and a few generated clips.

Tests that ran on the real media are counted at the end, so that a run without them does not look like one with.
Property tests try the same examples at every run; `pytest --hypothesis-profile default` draws new ones.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# what was changed decides whether a run is green, not luck
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ON_REAL_MEDIA = pytest.StashKey[set[str]]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real media and annotations (its README lists the sets); skips where it is absent."""
    if not (SHARED / "MANIFEST.tsv").is_file():
        pytest.skip(f"no real media: {SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def tiny_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo set of 16 training and 8 test clips of 2 s, two and one of each class. Read only: copy it to change it."""
    from benchmarks import demo_set

    folder = tmp_path_factory.mktemp("tiny") / "media"
    demo_set.generate(folder, train=16, test=8, seconds=2, workers=1)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by a shell's `&`: children would ignore Ctrl-C too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[ON_REAL_MEDIA] = set()
    config.pluginmanager.register(RealMedia(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report = yield
    if report.when == "call" and not report.skipped and "shared" in getattr(item, "fixturenames", ()):
        report.user_properties.append(("real media", True))  # travels from a worker of xdist to where it is counted
    return report


class RealMedia:
    """Counts, where all reports arrive, the tests that ran on real media."""

    def __init__(self, config: pytest.Config) -> None:
        self.seen = config.stash[ON_REAL_MEDIA]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if ("real media", True) in report.user_properties:
            self.seen.add(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = len(config.stash[ON_REAL_MEDIA])
    there = "" if (SHARED / "MANIFEST.tsv").is_file() else " (the media folder is not there)"
    terminalreporter.write_line(f"{count} test{'s' if count != 1 else ''} ran on real media{there}")
