# The commands of this project. Each sets up what it needs in .venv first (one to three minutes on a fresh machine).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export NO_ALBUMENTATIONS_UPDATE := 1
export MPLBACKEND := Agg

.PHONY: help setup demo test test-slow check format docs bench-cifar bench-data bench-train clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(BIN)/.ready  ## the virtual environment with everything in it

$(BIN)/.ready: pyproject.toml
	@echo "Setting up $(VENV) (once; downloads PyTorch) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: setup  ## pretrain on digits, fine-tune on 50 labels, read the table: a few minutes
	$(BIN)/selfsup demo --out demo

test: setup  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses=auto --durations=10

test-slow: setup  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses=auto --durations=10

check: setup  ## style and import walls
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python -m pytest -q tests/test_imports.py

format: setup  ## put the code in its one shape
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: setup  ## the pages and tables that are generated from the code
	$(BIN)/python docs/generate.py

bench-cifar: setup  ## the figures of docs/benchmarks.md (long; needs the CIFAR-10 folder)
	$(BIN)/python bench/cifar10.py

bench-data: setup  ## batches, views, cache and imports beside other libraries (about ten minutes; installs them)
	@$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python bench/data.py

bench-train: setup  ## training beside lightly, plain fastai and the bare step (one to two hours; installs them)
	@$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python bench/train.py

clean:  ## remove what the commands above made
	rm -rf $(VENV) demo runs build dist *.egg-info .pytest_cache .ruff_cache
