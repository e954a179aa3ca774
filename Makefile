# Everything a developer runs. A fresh machine needs python3 (3.10 or later, with venv), make and a C++20 compiler; the rest,
# CMake and Ninja included, comes from the package index into .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash

.PHONY: help install install-demo demo test test-gpu-versions test-newest-versions bench lint gpu-wheel gpu-build gpu-run clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1: /'

# What the extension is built with, torch not among it; and a pip that shows how far it is.
BUILD_TOOLS := "pip>=25.1" "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.24"
$(VENV)/.tools: pyproject.toml
	@echo "==> $(VENV) with CMake, Ninja and pybind11: 35 MB to download, then some 5 seconds"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(BUILD_TOOLS)
	@touch $@

# nvcc, where CMakeLists.txt looks for it. Developers build CUDA kernels wherever they can be compiled, since tests look into them;
# for users `auto` builds them where a GPU is visible.
NVCC := $(shell command -v "$${CUDACXX:-nvcc}" || { test -z "$$CUDACXX" && command -v /usr/local/cuda/bin/nvcc; })
DEVELOPERS := $(or $(DNC_KERNELS_BUILD),$(if $(NVCC),cuda,cpu))
USERS := $(or $(DNC_KERNELS_BUILD),auto)

# Where ccache is, nothing is compiled twice, in another checkout either: it sees paths from the checkout's root, which debug
# information does not name.
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
export CMAKE_CUDA_COMPILER_LAUNCHER ?= ccache
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= true
endif

# set_up EXTRA,BUILD,SIZE,SIZE: the extension in place first, because Ninja shows its progress and pip does not; pip finds it built.
# Made anew when what is installed, or how, has changed. Python files are compiled when they are imported, which most never are.
define set_up
DNC_KERNELS_BUILD=$(2) $(BIN)/python setup.py --quiet build_ext --inplace
@echo "==> torch, the package and its extra [$(1)]: $(4) to download, $(3) where torch is its CUDA build, then some 20 seconds"
DNC_KERNELS_BUILD=$(2) $(BIN)/python -m pip install --no-build-isolation --no-compile -c $(CONSTRAINTS) -e ".[$(1)]"
@touch $@
endef

$(STAMP): pyproject.toml $(CONSTRAINTS) setup.py | $(VENV)/.tools
	$(call set_up,dev,$(DEVELOPERS),3.3 GB,0.6 GB)

install: $(STAMP) ## set up .venv with the package (editable) and everything a developer needs
	DNC_KERNELS_BUILD=$(DEVELOPERS) $(BIN)/python setup.py --quiet build_ext --inplace

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) setup.py | $(VENV)/.tools
	$(call set_up,demo,$(USERS),3 GB,0.3 GB)

install-demo: $(VENV)/.demo
	DNC_KERNELS_BUILD=$(USERS) $(BIN)/python setup.py --quiet build_ext --inplace

# Where the developers' set-up is, the demo takes it as it is.
demo: $(if $(wildcard $(STAMP)),install,install-demo) ## train a DNC head on scenes of real digits, beside a softmax head; writes demo-out/
	@echo "==> two trainings on the CPU; 800 steps each take some 3 minutes on 2 cores, 16 with ARGS=--quick some 20 seconds"
	OMP_WAIT_POLICY=passive $(BIN)/python -m dnc_kernels demo $(ARGS)

# The workers' OpenMP threads share the cores: a thread that waits must sleep, not spin. And tests start many processes, which
# import torch in a third of the time once its bytecode has been written, even where the environment says not to.
WORKERS ?= 2
test: install ## run the whole test suite (marked gpu: skipped without a GPU)
	env -u PYTHONDONTWRITEBYTECODE OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The first Python of a version that runs (a shim of pyenv need not), on PATH or of pyenv.
find_python = $(shell for p in python$(1) $$(pyenv root 2>/dev/null)/versions/$(1)*/bin/python$(1); do "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
GPU_PYTHON ?= $(call find_python,3.12)
NEWEST_PYTHON ?= $(call find_python,3.13)
# needs_python VARIABLE,VERSION
define needs_python
@"$($(1))" -c 'import sys; assert "%d.%d" % sys.version_info[:2] == "$(2)"' 2>/dev/null || \
	{ echo "make $@ needs CPython $(2), and found '$($(1))': put python$(2) on PATH, or run \`pyenv install $(2)\`, or name it with $(1)=" >&2; exit 1; }
endef
GPU_VENV ?= .venv-3.12
test-gpu-versions: ## the same with Python 3.12 and the versions of GPU machines, in .venv-3.12 (5 GB)
	$(call needs_python,GPU_PYTHON,3.12)
	$(MAKE) test PYTHON="$(GPU_PYTHON)" VENV=$(GPU_VENV) CONSTRAINTS=constraints-gpu.txt

NEWEST_VENV ?= .venv-3.13
test-newest-versions: ## the same with Python 3.13 and torch 2.14, in .venv-3.13 (6 GB)
	$(call needs_python,NEWEST_PYTHON,3.13)
	$(MAKE) test PYTHON="$(NEWEST_PYTHON)" VENV=$(NEWEST_VENV) CONSTRAINTS=constraints-newest.txt

bench: install ## compare the kernels with their baselines on this machine
	$(BIN)/python -m benchmarks run

lint: install ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc examples \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

# For a GPU machine with CPython 3.12 and a Hopper GPU, made on a machine without one, and without torch: the extension and the
# checks of the GPU's primitives, in place. The tools of the build have a venv of their own.
TOOLS := .venv-gpu
GPU_TREE = build/cmake-$(shell $(TOOLS)/bin/python -c 'import sys, sysconfig; print(sysconfig.get_platform(), sys.implementation.cache_tag, sep="-")')
$(TOOLS)/.installed: pyproject.toml
	$(call needs_python,GPU_PYTHON,3.12)
	"$(GPU_PYTHON)" -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install $(BUILD_TOOLS)
	touch $@
gpu-wheel: $(TOOLS)/.installed ## build in place for a GPU machine, without a GPU: the extension and its checks for CPython 3.12 and sm_90a
	DNC_KERNELS_BUILD=cuda DNC_KERNELS_CUDA_ARCHS=90a-real $(TOOLS)/bin/python setup.py --quiet build_ext --inplace
	$(TOOLS)/bin/cmake --build $(GPU_TREE) --target _checks
	@for made in dnc_kernels/_C.cpython-312-*.so build/gpu/_checks.cpython-312-*.so; do \
		echo "$$made: $$(($$(stat -c %s $$made) / 1024)) KiB, CPython 3.12, sm_90a"; done

# On the GPU machine: no network, no venv, no download. PYTHON must have torch, triton, numpy, pytest with xdist and timeout, and where
# the extension is not brought along pybind11, cmake and ninja.
gpu-build:
	DNC_KERNELS_BUILD=cuda DNC_KERNELS_CUDA_ARCHS=native $(PYTHON) setup.py --quiet build_ext --inplace

PHASE ?= works
OUT ?= gpu-out
gpu-run: $(if $(DRY),install) ## make the most of MINUTES on a GPU: PHASE=works|numbers|tune OUT=DIR, or some PARTS= FAMILIES= TESTS=; DRY=1: without one
	$(if $(DRY),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_run $(PHASE) --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DRY),--dry) $(if $(PLANT),--plant) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(FAMILIES),--families $(FAMILIES)) $(if $(TESTS),--tests $(TESTS))

clean: ## remove builds, caches and venvs
	rm -rf build dist *.egg-info $(VENV) $(GPU_VENV) $(NEWEST_VENV) $(TOOLS) .pytest_cache .hypothesis .mypy_cache .ruff_cache demo-out train-out gpu-out
	find dnc_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f dnc_kernels/_C*.so
