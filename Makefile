# Each target does its own set-up: only Python 3.10 to 3.13, a C++ compiler, make and a package index are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo cpu)
# what DeepSpeed compiles stays in this environment: torch's lock file outlives a killed build, and all others wait for it
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# two processes that run tests, a file of tests in one of them: most of their ranks wait for each other
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help setup demo test test-all quick check bench docs format plans clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/ready  ## make .venv with everything

# torch first and pinned: without that, an index may hand out a build with several gigabytes of CUDA
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## plan, pre-split and train a small model at TP=2, beside an unsharded run
	$(BIN)/python examples/demo.py

test: setup  ## every test, the distributed ones too
	$(PYTEST) -m "not slow"

test-all: setup  ## every test and the slow ones: every plan and preset proven, at TP 2, 4 and 8 (an hour)
	$(PYTEST)

quick: setup  ## the tests that start no ranks: under two minutes
	$(PYTEST) -m "not distributed and not slow"

check: setup  ## what to run before a commit: lint, types, the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not distributed and not slow"

# the chart needs matplotlib, which nothing else does
$(VENV)/ready-to-bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

bench: $(VENV)/ready-to-bench  ## load and train beside AutoTP and transformers; writes docs/benchmark.* (twenty minutes)
	$(BIN)/python -m benchmarks.training

# an environment of its own: the site needs neither torch nor DeepSpeed
$(VENV)-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)-docs/ready  ## draw the figures and build the documentation into site/, without a warning
	$(VENV)-docs/bin/python -m scripts.figures
	$(VENV)-docs/bin/python -m scripts.site
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

format: setup  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plans: setup  ## compile every plan of plans/ again
	$(BIN)/python -m tests.plans.test_golden_plans

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-docs site demo-run example-run build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
