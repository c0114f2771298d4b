# make demo | demo-vlmo | test | test-slow | test-all | lint | bench | compiled | wheel | clean
#
# TORCH=...         the torch to install into .venv (default: the CPU set of constraints.txt)
# TORCH_INDEX=...   an extra package index to find it on, for instance PyTorch's index of CPU wheels
# PYTHON=...        the Python that makes .venv
# DEVICE=cuda make demo    (or bench) runs on the GPU with the current Python and its torch, installs nothing
# DEMO_ARGS="..."   more options for the demo

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

TORCH_DEFAULT := torch==2.13.0
TORCH         ?= $(TORCH_DEFAULT)
TORCH_INDEX   ?=
DEVICE        ?= cpu
DEMO_ARGS     ?=
VENV          ?= .venv
PYTHON        ?= python3
DEVICE_PYTHON ?= $(shell command -v python || command -v python3 || echo python3)

PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check -qq
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Another torch means another stamp, so `make test TORCH=...` is never served by the old one.
STAMP := $(VENV)/.stamp-$(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d' ' -f1)
COMPILED := $(VENV)/.stamp-compiled

.PHONY: help venv compiled wheel demo demo-vlmo test test-slow test-all lint bench audit gpu clean

help:
	@echo "make demo      swap the kernels into VLMo-Base: check, time, table and chart in out/demo/"
	@echo "make demo-vlmo pre-train VLMo in three stages on this CPU and measure it: table and curves in out/demo-vlmo/"
	@echo "make test      lint and the fast tests"
	@echo "make test-all  make test, then the slow tests and the wheel check (make test-slow)"
	@echo "make lint      ruff alone"
	@echo "make compiled  build the compiled parts (csrc/README.md); make venv does it too where g++ is found"
	@echo "make wheel     a wheel with the compiled parts, in dist/"
	@echo "make bench     block, ffn and attention benchmarks into out/bench/"
	@echo "make audit     what the compiler makes of every Triton kernel; needs no GPU"
	@echo "make gpu       on a GPU machine: correctness, tune, bench, peers (each also alone: make gpu-tune)"
	@echo "make clean     remove .venv, out/ and build products"
	@echo "DEVICE=cuda make demo    on the GPU, with the torch of the current Python"

venv: $(STAMP) $(COMPILED)

# torch goes first and is then held at exactly what was installed: no later step can replace it.
# The Triton of constraints.txt is for a torch that brings none (a CPU build).
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer must be there, '$(PYTHON)' is not. Hint: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' must have the modules venv and ensurepip." >&2; \
	  echo "Hint: on Debian and Ubuntu 'apt-get install python3-venv'; or name another one: make PYTHON=... ..." >&2; exit 1; }
	@echo "[1/3] virtual environment in $(VENV)"
	@rm -f $(VENV)/.stamp-*
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] $(TORCH) (the largest download; about a minute when it is at hand)"
	@grep -v -e '^torch==' -e '^triton==' constraints.txt > $(VENV)/constraints.txt
	@$(if $(filter $(TORCH_DEFAULT),$(TORCH)),grep '^torch==' constraints.txt >> $(VENV)/constraints.txt)
	@$(PIP) install $(INDEX) -c $(VENV)/constraints.txt 'setuptools>=64' wheel '$(TORCH)' || { \
	  echo "make: '$(TORCH)' could not be installed. Hint: make TORCH=... TORCH_INDEX=... names another one." >&2; exit 1; }
	@sed -i.bak '/^torch==/d' $(VENV)/constraints.txt
	@$(PY) -W ignore -c 'import torch; print(f"torch=={torch.__version__}")' >> $(VENV)/constraints.txt
	@$(PY) -c 'import importlib.metadata as m; print("triton==" + m.version("triton"))' 2>/dev/null \
	  >> $(VENV)/constraints.txt || grep '^triton==' constraints.txt >> $(VENV)/constraints.txt
	@echo "[3/3] tools for demo and tests, vlmo_kernels itself, and what the tests compare with"
	@VLMO_KERNELS_COMPILED=0 $(PIP) install $(INDEX) --no-build-isolation -c $(VENV)/constraints.txt -e '.[triton,vlmo,test]'
	@# What the tests compare with. Without --no-deps these replace torch (fairscale, torchscale) or pin it (xformers).
	@$(PIP) install $(INDEX) --no-build-isolation --no-deps torchscale==0.3.0 fairscale==0.4.0 xformers==0.0.35
	@touch $@

# The compiled parts; fails with the reason where something is missing. ninja builds what has changed, nothing else.
BUILD := $(PY) -W ignore setup.py -q build_ext --inplace
compiled: $(STAMP)
	$(BUILD)

# The same for the other targets, which go on without them.
$(COMPILED): $(STAMP) setup.py $(wildcard csrc/*/* csrc/include/*/*)
	@$(BUILD) || echo "make: going on without the compiled parts, on slower paths; 'make compiled' tries again" >&2
	@touch $@

# What an installation without a compiler needs: the wheel with every compiled part that can be built here.
wheel: $(STAMP)
	@rm -rf build/lib*  # what setuptools left there of earlier builds would go into the wheel
	VLMO_KERNELS_COMPILED=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls -1 dist/*.whl

ifeq ($(DEVICE),cpu)
RUN := $(VENV)/bin/vlmo-kernels
READY := $(STAMP) $(COMPILED)
else
RUN := PYTHONPATH=.:python$${PYTHONPATH:+:$$PYTHONPATH} $(DEVICE_PYTHON) -m vlmo_kernels.cli
READY := device-python
endif

.PHONY: device-python
device-python:
	@$(DEVICE_PYTHON) -c 'import torch' 2>/dev/null || { \
	  echo "make: DEVICE=$(DEVICE) uses the torch of '$(DEVICE_PYTHON)', which cannot import torch." >&2; \
	  echo "Hint: activate the environment with your torch, or DEVICE_PYTHON=/path/to/python." >&2; exit 1; }

demo: $(READY)
	$(RUN) demo $(if $(filter-out cpu,$(DEVICE)),--device $(DEVICE)) $(DEMO_ARGS)

demo-vlmo: $(STAMP) $(COMPILED)
	$(VENV)/bin/vlmo demo $(DEMO_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .

# A process a core with one thread each: small tensors gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadgroup --durations=10

test: lint $(COMPILED)
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP) $(COMPILED)
	$(PYTEST) -m "slow and not gpu"
	PYTHON=$(PY) tests/check_wheel.sh

# One after the other, also under make -j.
test-all:
	$(MAKE) test
	$(MAKE) test-slow

bench: $(READY)
	@mkdir -p out/bench
	for suite in block ffn attention; do \
	  $(RUN) bench $$suite --device $(DEVICE) --json out/bench/$$suite.json; done

audit: $(STAMP)
	$(VENV)/bin/vlmo-kernels audit

# On a GPU machine, offline, with torch, triton, numpy and pytest in the current Python; installs nothing. With
# ninja and nvcc there too the device planner is built and tested.
# Each stage ends within ten minutes: make gpu-correctness, gpu-tune, gpu-bench, gpu-peers, or all of them in order.
GPU_STAGES := gpu-correctness gpu-tune gpu-bench gpu-peers

.PHONY: $(GPU_STAGES)
gpu:
	for stage in $(GPU_STAGES); do $(MAKE) $$stage; done

$(GPU_STAGES):
	$(if $(findstring correctness,$@),-$(DEVICE_PYTHON) -W ignore setup.py -q build_ext --inplace)
	$(DEVICE_PYTHON) benchmarks/gpu.py $(@:gpu-%=%)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache
	rm -f vlmo_kernels/lib/*.so
	find vlmo_kernels python tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
