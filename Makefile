# Everything a developer runs. A fresh machine needs python3 (3.10 or later, with venv), make and a C++20 compiler; the rest,
# CMake and Ninja included, comes from the package index into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash

.PHONY: help install demo test bench lint gpu-build gpu-run clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1: /'

# Installed anew when what is installed, or how, has changed.
$(STAMP): pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

install: $(STAMP) ## set up .venv with the package (editable) and everything a developer needs
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: install ## train a DNC head on scenes of real digits, beside a softmax head; writes demo-out/
	$(BIN)/python -m dnc_kernels demo

# The workers' OpenMP threads share the cores: a thread that waits must sleep, not spin.
WORKERS ?= 2
test: install ## run the whole test suite (marked gpu: skipped without a GPU)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

bench: install ## compare the kernels with their baselines on this machine
	$(BIN)/python -m benchmarks run

lint: install ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc examples \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

# For a GPU machine without network: no venv, no download. PYTHON must have torch, triton, numpy, pytest with xdist and timeout,
# and where the extension is not brought along (gpu-wheel) pybind11, cmake and ninja.
GPU_ARCH = $(shell $(PYTHON) -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a >= 9) + "-real")')
gpu-build:
	test -n "$(GPU_ARCH)"
	DNC_KERNELS_BUILD=cuda DNC_KERNELS_CUDA_ARCHS=$(GPU_ARCH) $(PYTHON) setup.py --quiet build_ext --inplace

PHASE ?= works
OUT ?= gpu-out
ifdef DRY
gpu-run: PYTHON := $(BIN)/python
gpu-run: install
endif
gpu-run: ## make the most of MINUTES on a GPU: PHASE=works|numbers|tune OUT=DIR; DRY=1 goes the same way without one
	$(PYTHON) -m benchmarks.gpu_run $(PHASE) --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DRY),--dry) $(if $(PLANT),--plant)

clean: ## remove builds, caches and .venv
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache demo-out train-out gpu-out
	find dnc_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f dnc_kernels/_C*.so
