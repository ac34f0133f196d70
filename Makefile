# make        the environment, with everything built        make test   style, types and tests
# make demo   tune and prune a real model and compare       make bench  speed, kept in benchmarks/results.csv
# make lint   style and types        make format  put the style right        make clean  remove what make made
# make docs   the site, in build/site; a broken link or reference is an error
# make sanitize    the CPU kernels under AddressSanitizer and UBSan
# make gpu-check   all that needs a GPU, in less than nine minutes, with the python3 that has torch there
#
# A fresh machine needs python3 (3.10 or later) and g++; nvcc, if there is one, adds the CUDA kernels.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*)
NATIVE := $(wildcard csrc/* tests/simt/*.h tests/simt/*.cu tests/simt/*.cpp)
CLANG := $(filter %.h %.cuh %.cu %.cpp,$(NATIVE))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.PHONY: install venv test demo lint docs format sanitize bench gpu-check clean

install: $(VENV)/built

venv: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyprune needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements-dev.txt requirements-demo.txt requirements-eval.txt | $(VENV)/bin/python
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps -r requirements-demo.txt -r requirements-eval.txt
	touch $@

$(VENV)/built: $(VENV)/installed pyproject.toml setup.py $(SOURCES)
	$(PIP) install --no-deps --no-build-isolation --editable .
	$(BIN)/pyprune info
	touch $@

test: lint docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile $(PYTEST)

demo: install
	$(BIN)/pyprune demo --out $(or $(OUT),runs/demo) --resume

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CLANG)
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG)

sanitize: install
	tests/ops/sanitize.sh

bench: install
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script --save || exit 1; done

gpu-check:
	PYTHON=$(PYTHON) tests/gpu/check.sh $(or $(OUT),runs/gpu-check)

clean:
	rm -rf $(VENV) build *.egg-info pyprune/*.so
