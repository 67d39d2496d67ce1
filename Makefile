# make run     a cluster on this machine, from nothing: router, prefill node, decode node
# make test    everything that must hold: style, types, tests
# make nightly what takes hours: the slow tests, 500 faults under load, half an hour of soak (docs/reliability.md)
#
# Both make .venv and install into it; from then on they start at once. Where there is no GPU, `TORCH=cpu` fetches
# PyTorch's CPU build: 0.2 GB instead of 3. Another interpreter: `make run PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Uncompiled: of all that torch and transformers bring, only what is imported is compiled, when it first is, and kept whatever the environment
# says. Most of it is what a node imports (COMPILE), so that no node has to.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
COMPILE := @$(BIN)/python -c 'import disaggd.roles.decode, disaggd.roles.prefill, disaggd.roles.router'
unexport PYTHONDONTWRITEBYTECODE

# The oldest triton that pyproject.toml allows: the kernels are tested with it as well. Its interpreter wants numpy before 2.4.
OLDEST_TRITON := triton==3.6.0 numpy==2.3.5

ifeq ($(TORCH),cpu)
TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: run test nightly clean ready

run: $(VENV)/.installed
	@exec $(BIN)/python tools/run.py

test: ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers 2
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

nightly: ready
	$(BIN)/pytest -m nightly -o faulthandler_timeout=900
	$(BIN)/python -m tests.chaos --faults 500 --requests 5000 --json $(VENV)/chaos.json
	$(BIN)/python -m tests.chaos --soak 30 --load 0.8 --json $(VENV)/soak.json

# Both at once: pip keeps one processor busy, and most of the time none.
ready:
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/.installed-dev $(VENV)/triton-3.6/.installed

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "disaggd needs Python 3.11 or newer: make run PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch first, and alone: it is the one package that comes in builds.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) --constraint constraints.txt $(TORCH_INDEX) torch
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard disaggd/kernels/native/*) $(VENV)/.torch
	$(INSTALL) --constraint constraints.txt --editable .
	$(COMPILE)
	@touch $@

# What runs is among it: so that the kernels are compiled once, not twice.
$(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt $(wildcard disaggd/kernels/native/*) $(VENV)/.torch
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(COMPILE)
	@touch $(VENV)/.installed $@

$(VENV)/triton-3.6/.installed: Makefile | $(BIN)/python
	rm -rf $(@D)
	$(INSTALL) --no-deps --target $(@D) $(OLDEST_TRITON)
	@touch $@
