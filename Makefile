# make demo: from a fresh clone to a report. make test: the checks that CI runs.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
# test processes; each needs 1 GB of memory, those of `test-long` 3 GB and a Slurm of their own
TEST_PROCESSES ?= 3
LONG_TEST_PROCESSES ?= 4
SOURCES := $(wildcard csrc/* gptailor/merging/*.py) setup.py pyproject.toml constraints.txt

.PHONY: demo test test-short test-long test-slow sanitize lint typecheck bench clean

demo: $(VENV)/.installed
	$(BIN)/gptailor demo --workers 2

test: lint typecheck test-short

test-short: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not long and not slow and not gpu" -n $(TEST_PROCESSES) \
		--dist loadfile --no-loadscope-reorder

# whole programs: the demo, islands, searches on a cluster through time limits, dead nodes, preemption
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -m "long and not gpu" -n $(LONG_TEST_PROCESSES) --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow or gpu"

# the compiled extension under AddressSanitizer and UndefinedBehaviorSanitizer, in a scratch copy
sanitize: $(VENV)/.installed
	PYTHON=$(BIN)/python tools/sanitize.sh

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

typecheck: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/stitch.py
	$(BIN)/python benchmarks/evaluate.py

# torch comes first, so that packages that need any torch find the one from constraints.txt
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt setuptools pybind11 ninja cmake
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[dev]'
# MPICH next to the system's MPI, for tests that need two implementations
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt --no-deps --prefix $(VENV)/mpich mpich
	touch $@

clean:
	rm -rf $(VENV) build gptailor-demo *.egg-info gptailor/_C.*.so
