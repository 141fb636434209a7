# Everything that a developer runs. A fresh machine needs Python 3.11 or newer and make, nothing else:
# what a target needs is installed into .venv (the demo's, smaller, into .venv-demo) the first time.

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
EXPLORE_ARGS ?=
TORTURE_ARGS ?=
DEMO_ARGS ?=
FUZZ_INPUTS ?= 100000
FUZZ_ARGS ?=
# Where pip looks as well, such as PyTorch's index of CPU-only builds (PyPI's build for Linux brings CUDA along).
TORCH_INDEX ?=

VENV := .venv
DEMO_VENV := .venv-demo
BIN := $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt \
              $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
