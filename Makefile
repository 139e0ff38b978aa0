# Every target sets up what it needs: its own virtual environment in .venv, made
# with uv where there is one and with venv otherwise.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format clean

help:  ## lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
	  awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

# The stamp is older than pyproject.toml after its dependencies changed.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dllm_jax needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 2; }
	@echo "installing into $(VENV) ..."
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --seed --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

demo: $(VENV)/.installed  ## trains on Shakespeare for some minutes, evaluates, samples
	@$(BIN)/dllm train --config=configs/shakespeare.py --workdir=$(DEMO)
	@$(BIN)/dllm sample --workdir=$(DEMO) --num_samples=2 --trace=$(DEMO)/unmasking.html
	@$(BIN)/dllm evaluate --workdir=$(DEMO)

test: $(VENV)/.installed  ## runs the tests, under 15 minutes on 2 cores
	@$(BIN)/python -m pytest -n 2 -m "not all"

test-all: $(VENV)/.installed  ## runs every test, the long ones too
	@$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed  ## checks style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed  ## mends what of the style can be mended
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## removes the environment, caches and the demo's run
	@rm -rf $(VENV) .cache $(DEMO) .pytest_cache .ruff_cache build dist
