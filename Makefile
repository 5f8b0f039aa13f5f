SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
STAMP := .venv/.setup-done
# Files go to two processes whole, in order: their tests share what they start. Half of the tests use one core alone.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder
GPU_FLAGS := --recompute-granularity selective --recompute-modules gated_act --recompute-ticks 3  # with which XL fits into 80 GB
export PYTHON  # .ci/find-python tries it first

.PHONY: help setup demo test check ruff mypy slow gpu ranks clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv and install everything (seconds, once done)

.venv: $(STAMP)

$(STAMP): pyproject.toml setup.py .ci/setup
	@.ci/setup $@

# Ranks share the cores, so one thread each.
test check slow ranks: export OMP_NUM_THREADS = 1

demo: $(STAMP)  ## Train, convert and question a small HRM on this machine
	$(BIN)/python examples/demo/run.py

test: $(STAMP)  ## Run the tests that take minutes in all
	$(BIN)/python -m pytest $(IN_TWO)

check: ruff mypy  ## Lint, check types, and check the rules of the house
	$(BIN)/python -m pytest -q tests/house

ruff: $(STAMP)
	$(BIN)/ruff check

mypy: $(STAMP)
	$(BIN)/mypy hrm_megatron $(wildcard tools/*.py) $(wildcard examples/*.py examples/*/*.py)

slow: $(STAMP)  ## Run the tests that take minutes each, and parts of the suite as other machines would
	$(BIN)/python -m pytest -m "slow and not ranks"

ranks: $(STAMP)  ## Train in every parallel layout and print how far each is from one process
	$(BIN)/python -m pytest -m ranks

gpu: $(STAMP)  ## Run the tests that need a GPU, then the benchmark of training into docs
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tools/benchmark.py gpu --hrm-preset XL --row-tokens 24576 --peer --record docs/benchmarks.md -- $(GPU_FLAGS)

clean:  ## Remove .venv and caches; runs/ and other results stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
