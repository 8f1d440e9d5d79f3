# One set of verbs for people and CI. Needs Python 3.11 or newer, make, gcc and git; everything else is installed into
# .venv from requirements/dev.lock. Arguments for pytest: make test ARGS='tests/shards -k pax'
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv demo check test test-faces test-torch test-packages test-emulators bench bench-http bench-remote bench-tensorflow soak docs docs-generate lock clean

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Pools of threads inside numpy would fight with the worker processes for the same cores.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

venv: $(VENV)/.shardmill ## the environment of every other target: .venv

$(VENV)/.shardmill: pyproject.toml requirements/dev.lock tools/make-venv tools/find-python
	@tools/make-venv $(VENV) requirements/dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: venv ## serve real photographs, transformed; writes demo-out/
	@$(BIN)/shardmill demo --out demo-out $(ARGS)

check: venv ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: check ## check, then every test that needs no torch
	@$(BIN)/python -m pytest $(ARGS)

test-faces: venv ## other people's clients against a node; needs curl, wget and openssl
	@$(BIN)/python -m pytest $(or $(ARGS),tests/faces)

test-torch: venv ## the tests against the real WebDataset, torch and torchvision, in an environment of their own (5 GB)
	@python=$$(tools/torch-venv) && \
	  SHARDMILL_TEST_SERVER_PYTHON=$(CURDIR)/$(BIN)/python PYTHONPATH=$(CURDIR)/src \
	  "$$python" -m pytest -p no:cacheprovider $(or $(ARGS),tests/torch)

test-packages: venv ## environments of packages from the package index; needs a network
	@$(BIN)/python -m pytest $(or $(ARGS),tests/registry)

test-emulators: venv ## the tests against emulators of cloud stores, in an environment of their own; needs npm
	@emulators=$$(tools/emulators) && SHARDMILL_TEST_EMULATORS="$$emulators" \
	  $(BIN)/python -m pytest $(or $(ARGS),tests/emulators)

bench: venv ## ratios to what people use instead, as docs/benchmarks.md shows them (ARGS=--write makes it); installs 5 GB
	@python=$$(tools/bench-venv) && $(BIN)/python -m benchmarks --peers "$$python" $(ARGS)

bench-http: venv ## the data plane alone, beside nginx; ARGS='--peer URL' adds another server; needs nginx and gcc
	@$(BIN)/python -m benchmarks --only plane --only writing --only members --only idle $(ARGS)

bench-remote: venv ## the section of buckets of stores alone, with an S3 emulator; needs npm
	@emulators=$$(tools/emulators) && $(BIN)/python -m benchmarks --only remote --emulators "$$emulators" $(ARGS)

bench-tensorflow: venv ## the same with tf.data service among the loaders; installs 2 GB more
	@python=$$(tools/bench-venv) && tensorflow=$$(tools/bench-venv bench-tensorflow) && \
	  $(BIN)/python -m benchmarks --peers "$$python" --tensorflow "$$tensorflow" $(ARGS)

soak: venv ## a node under mixed traffic for ten minutes: what it holds stays flat, its counts add up
	@$(BIN)/python -m benchmarks.soak $(ARGS)

docs-generate: venv ## the checked-in reference pages: commands, settings, errors
	@$(BIN)/python docs/generate.py

docs: docs-generate ## the documentation, in site/
	@tools/make-venv .venv-docs requirements/docs.lock
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-annotate --custom-compile-command "make lock"
LOCK = $(COMPILE) pyproject.toml

lock: ## requirements/*.lock again from pyproject.toml; ARGS=--upgrade takes the newest
	@$(LOCK) --group dev --extra server --extra notebook --extra demo -o requirements/dev.lock $(ARGS)
	@$(LOCK) --group torch --extra server --extra notebook -o requirements/torch.lock $(ARGS)
	@$(LOCK) --group bench -o requirements/bench.lock $(ARGS)
	@$(LOCK) --group bench-tensorflow -o requirements/bench-tensorflow.lock $(ARGS)
	@$(COMPILE) --group emulators -o requirements/emulators.lock $(ARGS)
	@$(LOCK) --group docs -o requirements/docs.lock $(ARGS)

clean: ## everything made here, but not the torch environment
	rm -rf .venv .venv.lock .venv-docs .venv-docs.lock site demo-out dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
