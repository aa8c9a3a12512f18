# `make demo` and `make test` set up everything they need in .venv, or, for another
# interpreter (`make test PYTHON=python3.13`), in one of its own, such as .venv-3.13.
PYTHON ?= python3
VERSION = $(shell $(PYTHON) -c 'import sys; print("-%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter-out python3,$(PYTHON)),$(VERSION))
BIN := $(VENV)/bin

.PHONY: demo test test-all fast lint bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# Modules are compiled as they are imported, which most of them never are.
$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile -e ".[dev]"
	touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	$(BIN)/ospec demo

# The modes on the package's prompts, and other decoders where they are installed (".[peers]").
PEERS ?=
PROMPTS ?=
bench: $(VENV)/.installed
	$(BIN)/ospec bench $(if $(PROMPTS),--prompts $(PROMPTS)) --peers "$(PEERS)" \
	  --json bench-output/results.json --markdown bench-output/results.md \
	  --plot bench-output/speed.png
	$(BIN)/ospec roofline | tee bench-output/roofline.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# How programs are compiled depends on a test's mark, and on whether a run leaves out
# those that are compiled as users' are: see tests/conftest.py.
# The second run, and processes that tests start, read what Python keeps of the first.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

# Where such tests are: to collect the others takes longer than some tests do.
FOR_USERS = $(shell grep -rlE 'mark\.(slow|optimized|bits)' tests --include='test_*.py')

fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not (slow or optimized or gpu or thorough or long)"

test: lint
	$(PYTEST) -m "not (slow or optimized or gpu or thorough)"
	$(PYTEST) -m "(slow or optimized) and not (gpu or thorough)" $(FOR_USERS)

# With every combination of what `make test` tries each value of once.
test-all: lint
	$(PYTEST) -m "not (slow or optimized or gpu)"
	$(PYTEST) -m "(slow or optimized) and not gpu" $(FOR_USERS)

clean:
	rm -rf .venv .venv-* build dist *.egg-info demo-output bench-output
