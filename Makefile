# Every target sets up what it needs: a virtual environment in .venv, .venv-min for the oldest supported versions, or .venv-flower.
# They are set up again only when pyproject.toml or the constraints change.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
MIN_BIN := .venv-min/bin
COMMA := ,
# Ranks share the cores, and processes that have used two threads cannot be forked safely.
ONE_THREAD := OMP_NUM_THREADS=1
# Each worker has ranks of its own, for which it waits at times; which test runs where does not matter.
WORKERS := -n $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 4) + 1)') --dist worksteal
FEWER := -m "not exhaustive"

.DEFAULT_GOAL := help
.PHONY: help demo demo-quick test test-all test-min test-flower lint docs results format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Options: PYTHON=python3.12 (for a new environment), ARGS='tests/test_pool.py -k hangs' (for test, test-min, results)"

demo: .venv/.stamp ## train with a distributed strategy and show what it saves
	$(BIN)/lightning-distopt demo

demo-quick: .venv/.stamp ## the same, within a minute
	$(BIN)/lightning-distopt demo --quick

test: .venv/.stamp ## run the tests, and the examples in docstrings
	$(ONE_THREAD) $(BIN)/python -m pytest $(WORKERS) --durations=15 $(FEWER) $(ARGS)

test-all: .venv/.stamp ## the same, and all tests that differ in combinations of options alone
	$(ONE_THREAD) $(BIN)/python -m pytest $(WORKERS) --durations=15 $(ARGS)

test-min: .venv-min/.stamp ## run the tests with the oldest supported versions of the dependencies
	$(ONE_THREAD) $(MIN_BIN)/python -m pytest $(WORKERS) --durations=15 $(FEWER) $(ARGS)

test-flower: .venv-flower/.stamp ## test the bridge to Flower, which wants older versions of some packages
	$(ONE_THREAD) .venv-flower/bin/python -m pytest tests/bridges $(ARGS)

lint: .venv/.stamp ## check style, formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.stamp ## build the documentation site in site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: .venv/.stamp ## all tables and benchmarks once more, beside what the pages say (hours)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.results $(ARGS)

format: .venv/.stamp ## format the code, and fix what can be fixed automatically
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environments, caches and build products
	rm -rf .venv .venv-min .venv-flower .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp: pyproject.toml constraints.txt
	$(call set-up,.venv,dev,constraints.txt)

.venv-min/.stamp: pyproject.toml constraints-min.txt
	$(call set-up,.venv-min,test,constraints-min.txt)

.venv-flower/.stamp: pyproject.toml
	$(call set-up,.venv-flower,flower$(COMMA)test,/dev/null)

# $(1) environment, $(2) extras, $(3) constraints
define set-up
	@echo "Setting up $(1); PyTorch is large: this takes some minutes the first time."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --disable-pip-version-check -e '.[$(2)]' -c $(3)
	@touch $@
endef
