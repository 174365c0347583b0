# make demo       from a fresh clone to search by sight and sound, in one command (a CPU, minutes)
# make test       the fast tests, with ruff and mypy among them
# make test-slow  the tests that take minutes
# PYTHON=python3.12 make ...   to choose the interpreter (3.11 to 3.13)

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python,$(shell $(p) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) and print("$(p)")' 2>/dev/null)))
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
AVSTORE := $(BIN)/avstore

.PHONY: demo install test test-slow lint clean
.DELETE_ON_ERROR:

# ---- installation: once, until what is installed changes

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; type: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and exactly, so that nothing else chooses another build of it
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

# ---- the demo: every command is shown before it runs; all of them go on where they stopped when repeated

DEMO  := demo
STORE := $(DEMO)/demo.zarr
RUNS  := $(DEMO)/runs
CLIP  := $(DEMO)/media/test/bounce-drum/0000.mp4

demo: $(VENV)/.installed
	$(AVSTORE) demo $(DEMO)/media
	$(AVSTORE) ingest $(DEMO)/media $(STORE)
	$(AVSTORE) train avid-cma $(STORE) --preset tiny --run $(RUNS)/avid-cma
	$(AVSTORE) embed $(RUNS)/avid $(STORE)
	$(AVSTORE) embed $(RUNS)/avid-cma $(STORE)
	$(AVSTORE) bench retrieval $(STORE) --run $(RUNS)/avid --run $(RUNS)/avid-cma
	$(AVSTORE) query $(STORE) --run $(RUNS)/avid-cma --video $(CLIP)
	$(AVSTORE) query $(STORE) --run $(RUNS)/avid-cma --audio $(CLIP)
	$(AVSTORE) query $(STORE) --run $(RUNS)/avid-cma --audio $(CLIP) --to video

# ---- tests: two processes of one thread each (threads of two processes on two cores wait for each other)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not gpu" --timeout 1800 -o faulthandler_timeout=1500

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy avstore cli trainers benchmarks

clean:
	rm -rf $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find avstore cli trainers benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
