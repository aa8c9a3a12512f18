# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fast lint bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

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
	$(BIN)/pyright --pythonpath $(BIN)/python

PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15
# Most time of tiny models is compilation: theirs need not make fast code.
QUICK := XLA_FLAGS="--xla_backend_optimization_level=0 $(XLA_FLAGS)"

fast: $(VENV)/.installed-dev
	$(QUICK) $(PYTEST) -m "not (slow or optimized or gpu)"

# Where bits matter, and with real weights, programs are compiled as those of users are.
test: lint fast
	$(PYTEST) -m "(slow or optimized) and not gpu"

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output bench-output
