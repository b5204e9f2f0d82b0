# Every target does its own set-up: a fresh clone needs only make, Python >= 3.10 and a C++ compiler
# (nvcc adds the CUDA kernels; without a compiler the library is pure Python).
# CONTRIBUTING.md lists the environment variables that steer the build.

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt
CXX_FILES := find csrc tests bench -type f \
	\( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \)
# Every process imports torch, and more than a few are not worth the wait. ARGS=-n0 is one process.
IN_PARALLEL := -n logical --maxprocesses 8 --dist worksteal
# OpenMP's threads would otherwise spin between calls, on cores that other processes want: the tests
# would take twice the time.
test asan tsan: export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help build demo test bench plots docs lint format asan tsan clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

$(RUN):
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3.10; do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' \
	      2>/dev/null; then \
	    echo "making $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python >= 3.10 with venv and ensurepip found. Install one (Debian, Ubuntu:" >&2; \
	echo "apt install python3-venv python3-dev) or name it: make $(MAKECMDGOALS) PYTHON=..." >&2; \
	exit 1

$(VENV)/.installed: constraints.txt pyproject.toml | $(RUN)
	@echo "installing pinned packages into $(VENV) (the first time torch alone takes minutes)"
	@$(PIP_INSTALL) setuptools cmake ninja numpy torch
	@MLLOSS_NATIVE=off MLLOSS_CUDA=0 $(PIP_INSTALL) --no-build-isolation -e '.[xmc,dev]'
	@touch $@

# Incremental: a fraction of a second when no source changed.
build: $(VENV)/.installed ## make .venv, install everything, build the native part in place
	@$(RUN) setup.py -q build_ext --inplace

demo: build ## train on generated data, or on DATA=dir with *_train.txt and *_test.txt
	@$(RUN) -m mlloss_cuda.xmc demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: build ## run the tests; ARGS="-k name" selects
	@$(RUN) -m pytest $(IN_PARALLEL) $(ARGS)

bench: build ## time the losses against eager and compiled torch
	@$(RUN) bench/run.py $(ARGS)

plots: build ## draw the results of the benchmarks into docs/images
	@$(RUN) bench/plots.py $(ARGS)

# The extra `docs` is apart from the others, since nothing else needs it.
$(VENV)/.installed_docs: $(VENV)/.installed
	@echo "installing what the documentation is built with"
	@$(PIP_INSTALL) $$($(RUN) -I -c "from importlib.metadata import requires; \
	  required = (line.partition(';') for line in requires('mlloss_cuda')); \
	  print(*(name for name, _, extra in required if 'docs' in extra))")
	@touch $@

docs: build $(VENV)/.installed_docs ## build the documentation into build/docs
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build
	@echo "build/docs/index.html (for its search: $(RUN) -m http.server -d build/docs)"

lint: build ## check formatting, style and types
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(CXX_FILES) | xargs -r $(VENV)/bin/clang-format --dry-run -Werror
	@$(RUN) -m mypy

format: build ## format Python, C++ and CUDA in place
	@$(RUN) -m ruff check --fix-only
	@$(RUN) -m ruff format
	@$(CXX_FILES) | xargs -r $(VENV)/bin/clang-format -i

asan: build ## run the emulated CUDA kernels under AddressSanitizer and UBSan
	@$(RUN) -m tests.emulation.run --sanitizer address $(IN_PARALLEL) $(ARGS)

tsan: build ## run the emulated CUDA kernels under ThreadSanitizer
	@$(RUN) -m tests.emulation.run --sanitizer thread $(IN_PARALLEL) $(ARGS)

clean: ## remove everything built, but not .venv
	rm -rf build dist *.egg-info mlloss_cuda/_C.abi3.so mlloss_cuda/_build_information.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find mlloss_cuda tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
