# Everything a developer runs. A fresh machine needs python3 (3.10 or later, with venv), make and a C++20 compiler; the rest,
# CMake and Ninja included, comes from the package index into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash

.PHONY: help install demo test bench lint gpu-wheel gpu-build gpu-check gpu-sanitize clean
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

# For a GPU machine with CPython 3.12 and a Hopper GPU, made on a machine without one, and without torch: the extension and the
# checks of the GPU's primitives, in place. The tools of the build have a venv of their own.
GPU_VENV := .venv-gpu
GPU_TREE = build/cmake-$(shell $(GPU_VENV)/bin/python -c 'import sys, sysconfig; print(sysconfig.get_platform(), sys.implementation.cache_tag, sep="-")')
GPU_PYTHON ?= $(shell for python in python3.12 $$(command -v pyenv > /dev/null && pyenv versions --bare | sed -n "s,^3\.12\.[0-9]*$$,$$(pyenv root)/versions/&/bin/python3.12,p"); do \
	"$$python" -c '' 2> /dev/null && command -v "$$python" && break; done)
$(GPU_VENV)/.installed: pyproject.toml
	@"$(GPU_PYTHON)" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2> /dev/null || \
		{ echo "make gpu-wheel needs CPython 3.12, and found '$(GPU_PYTHON)': put python3.12 on PATH, or \`pyenv install 3.12\`, or name it with GPU_PYTHON=" >&2; exit 1; }
	"$(GPU_PYTHON)" -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.24"
	touch $@
gpu-wheel: $(GPU_VENV)/.installed ## build in place for a GPU machine, without a GPU: the extension and its checks for CPython 3.12 and sm_90a
	DNC_KERNELS_BUILD=cuda DNC_KERNELS_CUDA_ARCHS=90a-real $(GPU_VENV)/bin/python setup.py --quiet build_ext --inplace
	$(GPU_VENV)/bin/cmake --build $(GPU_TREE) --target _checks
	@for made in dnc_kernels/_C.cpython-312-*.so build/gpu/_checks.cpython-312-*.so; do \
		echo "$$made: $$(($$(stat -c %s $$made) / 1024)) KiB, CPython 3.12, sm_90a"; done

# For a GPU machine without network: no venv, no download. PYTHON must have torch, numpy, pytest, pybind11, cmake and ninja.
GPU_NAME = $(shell $(PYTHON) -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
GPU_ROWS = benchmarks/results/$(GPU_NAME)/$(shell date -u +%Y-%m-%dT%H%M%S).jsonl
GPU_BENCH ?= --dtype float32 --dtype bfloat16
gpu-build:
	DNC_KERNELS_BUILD=cuda DNC_KERNELS_CUDA_ARCHS=native $(PYTHON) setup.py --quiet build_ext --inplace

# Every step runs, whatever became of those before it: time on a GPU is dear. The tests of the CUDA C++ kernels run within prove.
gpu-check: gpu-build ## build in place for this GPU alone with PYTHON, prove the CUDA C++ kernels, test and measure; keeps proofs, rows and choices
	rows=$(GPU_ROWS); status=0; \
	$(PYTHON) -m dnc_kernels doctor || status=1; \
	$(PYTHON) -m benchmarks.prove || status=1; \
	$(PYTHON) -m pytest -m "gpu or triton or cuda" --ignore-glob='*_cuda.py' $(ARGS) || status=1; \
	mkdir -p $$(dirname $$rows); \
	$(PYTHON) -m benchmarks run --device cuda $(GPU_BENCH) --out $$rows || status=1; \
	$(PYTHON) -m benchmarks.dispatch $$rows || status=1; \
	exit $$status

gpu-sanitize: gpu-build ## run the small tests of the CUDA C++ kernels on this GPU under compute-sanitizer
	$(PYTHON) -m benchmarks.sanitize $(ARGS)

clean: ## remove builds, caches and virtual environments
	rm -rf build dist *.egg-info $(VENV) $(GPU_VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache demo-out train-out
	find dnc_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f dnc_kernels/_C*.so
