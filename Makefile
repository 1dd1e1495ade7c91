# Each target does its own set-up: only Python 3.10 to 3.13, a C++ compiler, make and a package index are needed.
PYTHON ?= python3
# test-upstream may run on other Pythons: make test-upstream OLDEST_PYTHON=python3.10 NEWEST_PYTHON=python3.13
OLDEST_PYTHON ?= $(PYTHON)
NEWEST_PYTHON ?= $(PYTHON)
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo cpu)
# what DeepSpeed compiles stays in this environment: torch's lock file outlives a killed build, and all others wait for it
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# two processes of one thread, each with a file of tests at a time (tests/conftest.py says in which order)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-all quick check test-upstream test-oldest test-newest test-wheel bench gpu docs format plans clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(VENV)/ready  ## make .venv with everything

# torch first and pinned: without that, an index may hand out a build with several gigabytes of CUDA
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,trl]'
	touch $@

demo: setup  ## plan, pre-split and train a small model at TP=2, beside an unsharded run
	$(BIN)/python examples/demo.py

test: setup  ## every test, the distributed ones too
	$(PYTEST) -m "not slow"

test-all: setup  ## every test and the slow ones: every plan and preset proven, at TP 2, 4 and 8 (an hour)
	$(PYTEST)

quick: setup  ## the tests that start no ranks, but the sweeps: under two minutes
	$(PYTEST) -m "not distributed and not slow and not sweep"

check: setup  ## what to run before a commit: lint, types, the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not distributed and not slow"

test-upstream: test-oldest test-newest  ## the tests of upstream names and of parity, with the oldest and the newest versions

# what is tested with other versions of torch, DeepSpeed, transformers and accelerate: the private names of theirs that
# are in use, and a model of each kind against the unsharded one, under every ZeRO stage, the Trainer and LoRA
CANARIES := tests/runtime/test_canaries.py tests/huggingface/test_canaries.py
define test-with
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(1)/torch_extensions $(1)/bin/python -m pytest $(CANARIES)
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(1)/torch_extensions $(1)/bin/python -m pytest -m upstream
endef

# torch first, as in setup: an index that has builds of it without CUDA hands them out by themselves
test-oldest: .venv-oldest/ready  ## with the oldest versions that pyproject.toml allows
	$(call test-with,.venv-oldest)

.venv-oldest/ready: pyproject.toml .ci/lower_bounds.py
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip build
	.venv-oldest/bin/python .ci/lower_bounds.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[dev]'
	touch $@

test-newest:  ## with the newest versions on the index
	test -e .venv-newest/bin/python || $(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager torch
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(call test-with,.venv-newest)

test-wheel:  ## build dist/, install the wheel in an environment without torch, and use it there
	rm -rf dist .venv-wheel .venv-installed
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --upgrade pip build twine
	.venv-wheel/bin/python -m build --quiet
	.venv-wheel/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-installed
	.venv-installed/bin/python -m pip install --quiet dist/*.whl
	env -u PYTHONPATH .venv-installed/bin/python .ci/try_wheel.py

# the chart needs matplotlib, which nothing else does
$(VENV)/ready-to-bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

bench: $(VENV)/ready-to-bench  ## load and train beside AutoTP and transformers; writes docs/benchmark.* (twenty minutes)
	$(BIN)/python -m benchmarks.training

gpu: setup  ## on a machine with a CUDA card: what holds on CPU holds there; writes docs/gpu.md and gpu.json (8 minutes)
	$(BIN)/python -m benchmarks.gpu --output docs

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
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-wheel .venv-installed $(VENV)-docs site demo-run example-run build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
