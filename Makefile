# budget-rl. Every target installs what it needs into .venv first; a second run installs nothing.
#   make quickstart   train the embedded model, warm start included, and print before/after
#   make test         the whole test suite (tests marked gpu are skipped where there is no GPU)
#   make lint         ruff and pyright
#   make gpu-test     the tests that need a GPU; see docs/gpu-checklist.md
#   make bench-learning | bench-trl | bench-kernels   the learning benchmark; one RL step against TRL's GRPOTrainer; the kernels
#   make bench-shaping      tokens per second with shaped sampling against without
#   make bench-grading      verdicts per second against math-verify called directly
#   make bench-scheduling   longest responses first against the order of arrival, in one engine
#   make bench-token-level  HAPO against DAPO (ARGS=hapo), AlignDistil against DPO alone (ARGS=aligndistil)
#   make docs         the documentation as a web site, in site/
# Variables: PYTHON=python3.12, ARGS="max_steps=5" (quickstart, benchmarks), PYTEST_ARGS="-k budget -x" (test, gpu-test).

PACKAGES := rl rollout reward kernels configs launch
BIN := .venv/bin
ARGS ?=
PYTEST_ARGS ?=

# Nothing that runs here reports usage to anyone.
export DO_NOT_TRACK := 1
export VLLM_NO_USAGE_STATS := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart test gpu-test lint bench-learning bench-trl bench-kernels bench-grading bench-scheduling bench-shaping bench-token-level docs
.DEFAULT_GOAL := help

help:
	@sed -n '/^# budget-rl/,/^$$/s/^# \{0,1\}//p' Makefile

install:
	@bash .ci/install main

quickstart: install
	$(BIN)/budget-rl train configs/quickstart.yaml $(ARGS)

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

gpu-test: install
	@nvidia-smi -L || { echo "make gpu-test: nvidia-smi finds no GPU; run it on a machine that has one, or run make test" >&2; exit 1; }
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright $(PACKAGES)

bench-learning: install
	$(BIN)/python -m tests.benchmarks.learning $(ARGS)

bench-trl: install
	@bash .ci/install trl
	$(BIN)/python -m tests.benchmarks.trl $(ARGS)

bench-kernels: install
	@bash .ci/install trl
	$(BIN)/python -m tests.benchmarks.kernels $(ARGS)

bench-shaping: install
	$(BIN)/python -m tests.benchmarks.shaping $(ARGS)

bench-grading: install
	$(BIN)/python -m tests.benchmarks.grading $(ARGS)

bench-scheduling: install
	$(BIN)/python -m tests.benchmarks.scheduling $(ARGS)

bench-token-level: install
	$(BIN)/python -m tests.benchmarks.token_level $(ARGS)

docs:
	@bash .ci/install docs
	.venv-docs/bin/python -m mkdocs build --strict
