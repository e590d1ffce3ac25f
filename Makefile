# Everything a developer does here. `make help` lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup train check test torture bench bench-learning golden docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 23

setup: $(READY)  ## a virtual environment with the tested versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(READY)  ## both stages of Look-Back on real images (RECIPE=… ARGS=… for another)
	$(BIN)/reflectvlm train recipe=$(or $(RECIPE),lookback_rl) $(ARGS)

check: $(READY)  ## format, lint, types, known vulnerabilities (ARGS=--strict: none may go unaudited)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/audit.py $(ARGS)

test: $(READY)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

torture: $(READY)  ## long tests: kills, resumes, a million fuzzed examples; writes benchmarks/results/torture.md
	$(BIN)/python benchmarks/torture.py $(ARGS)

bench: $(READY)  ## speed beside TRL and transformers (ARGS=--tune, --sweep; '--without trl' saves gigabytes)
	$(BIN)/python benchmarks/speed/compare.py $(ARGS)

bench-learning: $(READY)  ## the learning benchmark over three seeds
	$(BIN)/python benchmarks/learning.py --jobs 2

golden: $(READY)  ## record the golden trajectory anew; say why in the commit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_golden.py --record-golden

docs: $(READY)  ## run every code block of README and docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_docs.py

clean:  ## remove what was built, not what was trained
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
