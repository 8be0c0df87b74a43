# Everything starts from a machine that has Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
export OMP_NUM_THREADS ?= 1
export WANDB_SILENT ?= true
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-full chaos slurm check format bench clean

$(VENV)/.base: Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

$(VENV)/.quickstart: $(VENV)/.base pyproject.toml
	$(BIN)/pip install -q -e ".[quickstart,hf]"
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	$(BIN)/pip install -q --no-deps "$(TRITON)"
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

quickstart: $(VENV)/.quickstart  ## the main job, end to end, on two CPU processes
	$(BIN)/polylepis data build quickstart
	$(BIN)/polylepis train quickstart
	$(BIN)/polylepis evaluate runs/quickstart
	$(BIN)/polylepis generate runs/quickstart
	$(BIN)/polylepis convert runs/quickstart --to hf

test: $(VENV)/.dev  ## the suite that every commit passes
	$(BIN)/python -m pytest -q -m "not full and not chaos"

test-full: $(VENV)/.dev $(VENV)/.triton36  ## everything, minutes longer; the static gate also with Triton 3.6
	TRITON_36=$(CURDIR)/$(VENV)/triton36 $(BIN)/python -m pytest -q -m "not chaos"

chaos: $(VENV)/.dev  ## injected faults: killed, stopped and slow ranks, NaN, full disks, jumping clocks
	$(BIN)/python -m pytest -q -m chaos

slurm:  ## programs that the tests of launch/ use where they find them (Debian, as root)
	apt-get install -y --no-install-recommends slurm-wlm munge iproute2

$(VENV)/.triton36: $(VENV)/.base
	$(BIN)/pip install -q --no-deps --target $(VENV)/triton36 "triton==3.6.0"
	touch $@

check: $(VENV)/.dev  ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## ratios against peers, printed with command, commit and machine
	$(BIN)/python -m benchmarks.ssd

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
