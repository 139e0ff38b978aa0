# Every target sets up what it needs: its own virtual environment in .venv, made
# with uv where there is one and with venv otherwise.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# The newest of the Pythons on the path that run.
NEWEST_PYTHON ?= $(shell for n in $$(seq 40 -1 11); do \
  python3.$$n -c '' 2>/dev/null && echo python3.$$n && break; done)
NEWEST_VENV ?= .venv-newest

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-newest docs lint format clean

help:  ## lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
	  awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'

# $(call install,NAME,ENVIRONMENT,newest): with the Python that the variable NAME
# names; the newest of everything, or whatever is new enough.
define install
	@$($(1)) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dllm_jax needs Python 3.11 or newer; set $(1)=/path/to/python"; exit 2; }
	@echo "installing into $(2) ..."
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --seed --allow-existing --python $($(1)) $(2) && \
	  uv pip install --quiet --python $(2)/bin/python $(if $(3),--upgrade) -e '.[dev]'; \
	else \
	  $($(1)) -m venv $(2) && \
	  $(2)/bin/python -m pip install --quiet --disable-pip-version-check \
	    $(if $(3),--upgrade --upgrade-strategy=eager) -e '.[dev]'; \
	fi
endef

# The stamp is older than pyproject.toml after its dependencies changed.
$(VENV)/.installed: pyproject.toml
	$(call install,PYTHON,$(VENV))
	@touch $@

demo: $(VENV)/.installed  ## trains on Shakespeare for some minutes, evaluates, samples
	@$(BIN)/dllm train --config=configs/demo.py --workdir=$(DEMO)
	@$(BIN)/dllm sample --workdir=$(DEMO) --num_samples=2 --trace=$(DEMO)/unmasking.html
	@$(BIN)/dllm evaluate --workdir=$(DEMO)

# Bytecode is kept where Python is told to keep none, too: else each worker compiles
# all sources of the package and of its tests anew.
test test-all test-newest: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.installed  ## runs the tests
	@$(BIN)/python -m pytest -n 2 --dist=loadfile -m "not all"

test-all: $(VENV)/.installed  ## runs every test, the long ones too
	@$(BIN)/python -m pytest -n 2 --dist=loadfile

test-newest:  ## runs the tests on the newest Python here, with the newest of everything
	$(call install,NEWEST_PYTHON,$(NEWEST_VENV),newest)
	@$(NEWEST_VENV)/bin/python -c 'import sys; from importlib.metadata import version; \
	  print("Python", sys.version.split()[0], \
	  *(f"{name} {version(name)}" for name in ("jax", "flax", "numpy")))'
	@$(NEWEST_VENV)/bin/python -m pytest -n 2 --dist=loadfile -m "not all"

docs: $(VENV)/.installed  ## builds the site into build/site
	@NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu PYTHONPATH=docs/site \
	  $(BIN)/mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml

lint: $(VENV)/.installed  ## checks style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed  ## mends what of the style can be mended
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## removes the environment, caches and the demo's run
	@rm -rf $(VENV) $(NEWEST_VENV) .cache $(DEMO) .pytest_cache .ruff_cache build dist
