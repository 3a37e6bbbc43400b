# Everything that is done with a checkout. `make help` lists it.
#
# Each target works alone in a fresh clone and needs only Python 3.10 or later, make and git: what it
# uses is installed into a virtual environment first. A stamp file in there for each group of requirements
# remembers that this has been done; it is done again when pyproject.toml or constraints.txt has changed.
#
#   make test PYTHON=python3.12 VENV=/tmp/venv312      another Python, in an environment of its own
#   make test PYTEST_ARGS="-x -k drain"                further arguments for pytest
#
# The native part is a file in the checkout, which demo, test, bench and more build if there is a C compiler, and again
# when its sources have changed. Where it cannot be built, one line says so, each time, and everything works without it.
# With TORCHWQ_NATIVE=0 in the environment it is neither built nor used.
#
# pip's own settings (pip.conf, the PIP_* environment variables) hold as always.

PYTHON      ?= python3
VENV        ?= .venv
SITE        ?= site
PYTEST_ARGS ?=
BENCH_ARGS  ?=
BENCH       ?= build/bench

# How many processes run the tests side by side: much of a test is waiting for deaths, starts and ends.
TEST_PROCESSES ?= 3

# A test process that dies ends the run: xdist would replace it, and may then wait for ever for what that one had done.
# The order of the files is that of tests/conftest.py, not that of how many tests they have.
PYTEST_SPREAD := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# How long each of the tests goes on that `make soak` and `make chaos` run, in seconds.
TORCHWQ_SOAK_SECONDS ?= 600

# The long tests alone, with nothing that ends one early.
LONG  := -m soak --timeout=0 -o faulthandler_timeout=0
# Among them: those of damaged messages, of what messages leave behind, and of processes that are killed at random.
FUZZ  := tests/native/test_robustness.py -k damaged_messages
LEAKS := tests/native/test_robustness.py -k no_references_behind
CHAOS := tests/channels/test_chaos.py tests/workers/test_chaos.py tests/memory/test_lifetimes.py

# The tests of the rooms that have twins of the native part, and what `make sanitize` runs.
TWINS          := tests/native tests/memory tests/marshalling tests/transport tests/queues tests/channels tests/loading/test_equality.py
COMMA          := ,
SANITIZE_TESTS ?= tests/native tests/memory tests/marshalling

BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install -qq --constraint constraints.txt

NATIVE      := torchwq/_native/_core.abi3.so
BUILD_EXT   := $(BIN)/python setup.py --quiet build_ext --force
is_native   := $(BIN)/python -c 'import sys, torchwq; sys.exit(not torchwq.native)'

# $(call compile,FOLDER,FLAGS) builds the native part into a folder, and fails if it cannot.
compile = TORCHWQ_NATIVE=1 CFLAGS="$(2)" $(BUILD_EXT) --build-temp $(1) --build-lib $(1)

# $(call extra,NAME) is the stamp that says that the extra NAME of pyproject.toml is installed.
extra = $(VENV)/.stamp-extra-$(1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one environment get into each other's way

.PHONY: help demo test devmode lint style types imports warnings sanitize bench docs pages soak fuzz leaks chaos wheels install \
	clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s%s\n", $$1, $$2 }' Makefile

# --- what there is to do ---

demo: $(call extra,demo) $(NATIVE) ## train a small CNN on images that background workers prepare
	$(BIN)/python examples/train_digits.py

test: $(call extra,test) $(call extra,examples) $(NATIVE) ## run the tests, some on each transport, and with and without the native part
	env -u TORCHWQ_TRANSPORT $(BIN)/python -m pytest $(PYTEST_SPREAD) $(PYTEST_ARGS)
	TORCHWQ_TRANSPORT=stream $(BIN)/python -m pytest $(PYTEST_SPREAD) tests/transport tests/queues tests/channels $(PYTEST_ARGS)
	@if $(is_native); then set -x; \
		TORCHWQ_NATIVE=0 $(BIN)/python -m pytest $(PYTEST_SPREAD) $(TWINS) $(PYTEST_ARGS); \
	else echo "These were the tests without the native part."; fi

# By the variable: -X dev would not reach the processes that run tests side by side, nor the programs that tests start.
devmode: $(call extra,test) $(call extra,examples) $(NATIVE) ## run the tests once, in Python's development mode
	PYTHONDEVMODE=1 $(BIN)/python -m pytest $(PYTEST_SPREAD) $(PYTEST_ARGS)

lint: style types imports ## check style, types and layers

style: $(call extra,lint) ## check the style only (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(call extra,lint) ## check the types only (mypy)
	$(BIN)/python -m mypy

imports: $(call extra,lint) ## check only that each layer imports none above it (import-linter)
	$(BIN)/lint-imports

# Not a part of lint, which needs no compiler.
warnings: $(VENV)/.stamp-setuptools ## compile the native part, with every warning an error
	@reason=$$($(BIN)/python -c 'import setup; print(setup.excluded() or setup.missing())') || exit 1; \
	if [ -n "$$reason" ]; then echo "skipped: $$reason"; exit 0; fi; set -x; \
	$(call compile,build/warnings,-O2 -Wall -Wextra -Werror)

# In a copy of the checkout. libstdc++ is loaded before torch is, or torch's exceptions would end the process.
sanitize: $(call extra,test) $(call extra,examples) ## run SANITIZE_TESTS with gcc's sanitizers of addresses and of undefined behaviour
	rm -rf build/sanitize
	mkdir -p build/sanitize
	cp -R torchwq tests pyproject.toml build/sanitize
	$(call compile,build/sanitize,-g -O1 -fno-omit-frame-pointer -fsanitize=address$(COMMA)undefined -fno-sanitize-recover=undefined)
	cd build/sanitize && \
		export TORCHWQ_NATIVE= PYTHONPATH=$(CURDIR)/build/sanitize PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
			LD_PRELOAD="$(foreach name,asan ubsan stdc++,$$($(CC) -print-file-name=lib$(name).so))" && \
		$(abspath $(BIN))/python -c 'import torchwq; assert torchwq.native, torchwq.native' && \
		$(abspath $(BIN))/python -m pytest --timeout 600 -o faulthandler_timeout=590 $(SANITIZE_TESTS) $(PYTEST_ARGS)

# As a module: run as a file, queue.py's folder would come first in sys.path and hide the standard queue.
bench: $(call extra,bench) $(NATIVE) ## measure queues, tensors, loaders, channels, threads and Ray against their peers, and draw it
	mkdir -p $(BENCH)
	for name in queue tensors dataloader channel threads ray; do \
		$(BIN)/python -m benchmarks.$$name --json $(BENCH)/$$name.json $(BENCH_ARGS) || exit 1; \
	done
	$(BIN)/python -m benchmarks.plot $(BENCH)

docs: $(call extra,docs) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir $(SITE)

pages: docs $(call extra,pages) ## look at each page of the documentation in a browser: light, dark and on a phone
	$(BIN)/python docs/_checks/pages.py $(SITE)

soak: $(call extra,test) $(call extra,examples) $(NATIVE) ## run the long tests, TORCHWQ_SOAK_SECONDS=600 long each
	TORCHWQ_SOAK_SECONDS=$(TORCHWQ_SOAK_SECONDS) $(BIN)/python -m pytest $(LONG) $(PYTEST_ARGS)

# soak has these three, too, but nothing under the sanitizers.
fuzz: $(call extra,test) $(call extra,examples) $(NATIVE) ## give the native part two million damaged messages, and again with the sanitizers
	$(BIN)/python -m pytest $(LONG) $(FUZZ) $(PYTEST_ARGS)
	$(MAKE) sanitize SANITIZE_TESTS="$(LONG) $(FUZZ)"

leaks: $(call extra,test) $(call extra,examples) $(NATIVE) ## pass a million messages of each kind on, and look for what they leave behind
	$(BIN)/python -m pytest $(LONG) $(LEAKS) $(PYTEST_ARGS)

chaos: $(call extra,test) $(call extra,examples) $(NATIVE) ## kill workers at random, TORCHWQ_SOAK_SECONDS=600 long for each test
	TORCHWQ_SOAK_SECONDS=$(TORCHWQ_SOAK_SECONDS) $(BIN)/python -m pytest $(LONG) $(CHAOS) $(PYTEST_ARGS)

wheels: $(VENV)/.stamp-setuptools ## build the wheels into dist/: that of this platform, and the one for all
	TORCHWQ_NATIVE=1 $(PIP) wheel -qq --no-deps --no-build-isolation --wheel-dir dist .
	TORCHWQ_NATIVE=0 $(PIP) wheel -qq --no-deps --no-build-isolation --wheel-dir dist .

install: $(call extra,examples) $(call extra,test) $(call extra,lint) $(call extra,docs) $(call extra,pages) $(NATIVE) ## install all that demo, test, lint, docs and pages need

clean: ## remove what was built and cached (the virtual environment stays)
	rm -rf build dist $(NATIVE) *.egg-info $(SITE) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path './.*' -prune -o -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# --- what it needs ---

# An environment that is there already, made by hand, is used as it is.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit("torchwq needs Python 3.10 or later; choose one with PYTHON=..." if sys.version_info < (3, 10) else 0)'
	@$(PIP) --version >/dev/null 2>&1 || { echo "Creating a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install -qq "pip>=22"
	@touch $@

# torch comes first and alone, in the version that constraints.txt names.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv constraints.txt
	@echo "Installing torch (a large download, the first time)"
	@$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.stamp-setuptools: $(VENV)/.stamp-venv pyproject.toml
	@$(PIP_INSTALL) "$$(sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml)"
	@touch $@

$(VENV)/.stamp-extra-%: $(VENV)/.stamp-torch $(VENV)/.stamp-setuptools pyproject.toml constraints.txt
	@echo "Installing torchwq and what \"$*\" needs"
	@$(PIP_INSTALL) --no-build-isolation --editable ".[$*]"
	@touch $@

# pip builds it too, and does not show what is missing. Where it cannot be built, there is no file, and this tries anew.
$(NATIVE): setup.py $(wildcard torchwq/_native/*.[ch]) | $(VENV)/.stamp-setuptools
	@$(BUILD_EXT) --inplace
