# `make help` lists what there is. Settings: WTFLOW_VENV (where the environment lives), PYTHON (a Python 3.11).
SHELL := /bin/bash
.DEFAULT_GOAL := help
LOCK_HASH := $(shell sha256sum requirements.lock | cut -c1-12)
CACHE_HOME := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)
VENV := $(or $(WTFLOW_VENV),$(CACHE_HOME)/wtflow/venv-$(LOCK_HASH))
BIN := $(VENV)/bin
PEERS_HASH := $(shell cat requirements.lock infra/peers.lock | sha256sum | cut -c1-12)
PEERS_VENV := $(or $(WTFLOW_PEERS_VENV),$(CACHE_HOME)/wtflow/peers-$(PEERS_HASH))
# known to tests and benchmarks once it is installed
ifneq ($(wildcard $(PEERS_VENV)/.ready),)
export WTFLOW_PEERS_PYTHON ?= $(PEERS_VENV)/bin/python
endif
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR := false
# torch frees and asks for the same large buffers all the time: let malloc keep them (half of the time was the kernel's)
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296
# tests: a process a core, four at most; a file of tests goes to one of them whole
AT_ONCE := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup lock repro preset tune fleet reproduce serve test check fast-test s3 format bench clean venv peers peers-venv

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## install the locked environment, once per lock, outside the clone
	@infra/setup_env.sh "$(VENV)" requirements.lock

venv:  ## print the environment's folder, whose bin/activate puts dvc and python on the PATH
	@echo "$(VENV)"

repro: setup  ## the main job: fetch, prepare, extract, train, evaluate, register every line; then a table
	@dvc repro
	@python -m pipelines.summary

preset: setup  ## make preset LINE=solar-mono PRESET=edge: lay presets/edge.yaml over a line; default takes it away
	@test -n "$(LINE)" -a -n "$(PRESET)" || { echo "error: which line, which preset? Type: make preset LINE=<a line of params.yaml> PRESET=<one of: default $(basename $(notdir $(wildcard presets/*.yaml)))>" >&2; exit 2; }
	@python -m pipelines.preset "$(LINE)" "$(PRESET)"

tune: setup  ## make tune LINE=solar-mono: search settings of train for a line; APPLY=--apply writes the best to params.yaml
	@test -n "$(LINE)" || { echo "error: which line? Type: make tune LINE=<a line of params.yaml>" >&2; exit 2; }
	@python -m pipelines.tune "$(LINE)" $(APPLY)

fleet: setup  ## train every stale line at once, on this machine or the cluster of RAY_ADDRESS; then make repro does the rest
	@python -m pipelines.fleet

reproduce: setup  ## make reproduce DATASET=mvtec_ad ROOT=/data/mvtec: the paper's preset (or PRESET=) on every category, beside the paper's figures
	@test -n "$(DATASET)" -a -n "$(ROOT)" || { echo "error: which data set, where? Type: make reproduce DATASET=<mvtec_ad, visa, mpdd, mvtec_loco, mvtec_3d or mvtec_ad_2> ROOT=<the folder of its categories>" >&2; exit 2; }
	@python -m pipelines.reproduce "$(DATASET)" "$(ROOT)" --preset "$(or $(PRESET),paper)"

serve: setup  ## score over HTTP on 127.0.0.1:8000 with every line that has a champion (Ctrl-C stops it)
	@python -m serving.app

test: setup  ## the test suite, the whole road and its kills among it: a quarter to half an hour on two cores
	@python -m pytest $(AT_ONCE)

fast-test: setup  ## the tests of a few seconds at most
	@python -m pytest -m "not slow" $(AT_ONCE)

check: setup  ## format, lint, types, import contracts, and the guards: docs, claims, dependencies of stages
	@ruff format --check .
	@ruff check .
	@mypy
	@lint-imports
	@python -m pytest tests/guards

s3:  ## a real S3 server (Ceph) in memory, for tests: prints the WTFLOW_TEST_S3 that they want; Ctrl-C stops it (PORT=9470)
	@infra/s3_server.sh $(PORT)

format: setup  ## format the code and mend what the linter can mend
	@ruff format .
	@ruff check --fix .

bench: setup  ## make bench NAME=main_job: run a benchmark, print its table, write benchmarks/results/; ARGS=--kept: options of it
	@test -f "benchmarks/$(NAME).py" || { echo "error: no benchmarks/$(NAME).py. Type: make bench NAME=<one of: $(filter-out __init__ report neighbours product_lines,$(basename $(notdir $(wildcard benchmarks/*.py))))>" >&2; exit 2; }
	@python -m benchmarks.$(NAME) $(ARGS)

peers: setup  ## install what the comparison with other methods needs (infra/peers.lock), once, on top of the environment
	@infra/setup_env.sh "$(PEERS_VENV)" infra/peers.lock "$(VENV)"

peers-venv:  ## print the folder of that second environment
	@echo "$(PEERS_VENV)"

lock: setup  ## resolve pyproject.toml anew into requirements.lock
	@pip-compile --quiet --upgrade --allow-unsafe --strip-extras --all-extras --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o requirements.lock.new pyproject.toml
	@{ echo "# Exact versions for Linux x86_64, CPython 3.11. Made by 'make lock' from pyproject.toml; do not edit."; \
	    cat requirements.lock.new; } > requirements.lock && rm requirements.lock.new
	@git --no-pager diff --stat -- requirements.lock

clean:  ## remove models, reports, and .wtflow with the feature cache and kept benchmark runs; never data/, the DVC cache or MLflow's
	rm -rf models evaluations reports registry .wtflow
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
