# Everything a developer runs. A fresh machine needs python3 (3.10 or later, with venv), make and a C++20 compiler; the rest,
# CMake and Ninja included, comes from the package index into .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash

.PHONY: help install demo test test-gpu-versions bench lint gpu-build gpu-run clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1: /'

# Installed anew when what is installed, or how, has changed.
$(STAMP): pyproject.toml $(CONSTRAINTS) setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

install: $(STAMP) ## set up .venv with the package (editable) and everything a developer needs
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: install ## train a DNC head on scenes of real digits, beside a softmax head; writes demo-out/
	$(BIN)/python -m dnc_kernels demo

# The workers' OpenMP threads share the cores: a thread that waits must sleep, not spin.
WORKERS ?= 2
test: install ## run the whole test suite (marked gpu: skipped without a GPU)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# The Python of GPU machines: the first 3.12 that runs (a shim of pyenv need not), on PATH or of pyenv.
PYTHON312 = $(shell for p in python3.12 $$(pyenv root 2>/dev/null)/versions/3.12*/bin/python3.12; do $$p -c "" 2>/dev/null && echo $$p && break; done)
GPU_VENV ?= .venv-3.12
test-gpu-versions: ## the same with Python 3.12 and the versions of GPU machines, in .venv-3.12 (5 GB)
	@test -n "$(PYTHON312)" || { echo "make $@: no Python 3.12 was found on PATH or in pyenv; try pyenv install 3.12, or PYTHON312=..." >&2; exit 1; }
	$(MAKE) test PYTHON=$(PYTHON312) VENV=$(GPU_VENV) CONSTRAINTS=constraints-gpu.txt

bench: install ## compare the kernels with their baselines on this machine
	$(BIN)/python -m benchmarks run

lint: install ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc examples \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

# For a GPU machine without network: no venv, no download. PYTHON must have torch, triton, numpy, pytest with xdist and timeout,
# and where the extension is not brought along (gpu-wheel) pybind11, cmake and ninja.
gpu-build:
	DNC_KERNELS_BUILD=cuda DNC_KERNELS_CUDA_ARCHS=native $(PYTHON) setup.py --quiet build_ext --inplace

PHASE ?= works
OUT ?= gpu-out
gpu-run: $(if $(DRY),install) ## make the most of MINUTES on a GPU: PHASE=works|numbers|tune OUT=DIR; DRY=1 goes the same way without one
	$(if $(DRY),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_run $(PHASE) --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DRY),--dry) $(if $(PLANT),--plant)

clean: ## remove builds, caches and venvs
	rm -rf build dist *.egg-info $(VENV) $(GPU_VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache demo-out train-out gpu-out
	find dnc_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f dnc_kernels/_C*.so
