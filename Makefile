# SPDX-License-Identifier: MIT
# make demo, make test: all the set-up a fresh machine needs. Both share .venv and the build in it.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet
SOURCES := setup.py $(wildcard csrc/*/*)
CPP := $(wildcard csrc/*/* tests/native/* tests/static/*.cpp tests/simt/*.cpp tests/simt/*.h tests/simt/*.cu \
	tests/simt/cuda/*)

OUT    ?= gpu-check
# This machine's GPUs, or one architecture where there is none: all of them, as pip builds, take ten times as long.
GPUS   := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPUS),8.0+PTX)

.PHONY: demo test gpu-check lint format cuda-build cuda-objects static-slow static-baseline clean

demo: $(VENV)/.built
	$(PY) -m repvgg_cuda demo

test: $(VENV)/.built
	$(PY) -m pytest

# On a machine with an NVIDIA GPU and nvcc, in 8 minutes: what the CUDA kernels are worth there. docs/gpu-check.md
gpu-check: $(VENV)/.built
	$(PY) -m repvgg_cuda gpu-check --out $(OUT)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) tests/check_includes.py
	$(PY) -m mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

# Every default architecture, warnings and register spills are errors; then what the binary holds is checked.
cuda-build: cuda-objects
	REPVGG_CUDA_GATE=build/cuda-gate $(PY) -m pytest tests/static -m "not slow"

# On what cuda-build built: the faults that take long to plant, the proofs that take long.
static-slow: $(VENV)/.dev
	REPVGG_CUDA_GATE=build/cuda-gate $(PY) -m pytest tests/static -m slow

# The baseline of the installed compiler becomes what it makes of the kernels now: look at `git diff tests/static`.
static-baseline: cuda-objects
	$(PY) tests/static/report.py --write-baseline build/cuda-gate

cuda-objects: $(VENV)/.dev
	rm -rf build/cuda-gate && mkdir -p build/cuda-gate
	REPVGG_CUDA_BUILD=cuda REPVGG_CUDA_WERROR=1 TORCH_CUDA_ARCH_LIST= $(PY) setup.py --quiet \
		build_ext --build-lib build/cuda-gate --build-temp build/cuda-gate/objects

# torch first: which build of it is installed (CPU or CUDA) is the user's choice, and an existing one is kept.
$(VENV)/.stamp: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) torch==2.13.0
	$(PIP) "setuptools>=77" ninja pybind11
	touch $@

$(VENV)/.dev: $(VENV)/.built
	$(PIP) ruff mypy clang-format types-setuptools nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(PIP) sentryward==0.1.1 || echo "no sentryward for this machine: tests/static/test_sync.py will be skipped"
	touch $@

# The torch that is there stays: without the constraint a dependency of the tests could replace it by another build.
$(VENV)/.built: $(VENV)/.stamp $(SOURCES)
	$(PY) -c "import torch; print('torch==' + torch.__version__)" > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info repvgg_cuda/_C*.so
