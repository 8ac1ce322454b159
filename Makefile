# make demo: from a fresh clone to a result.    make test: the test suite.    make docs: the site.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes of make test; each needs a core and 2 GB.
WORKERS ?= 2

.PHONY: setup demo test lint docs clean

setup: $(VENV)/.complete

$(VENV)/.complete: requirements.txt tests/requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v <= (3, 13) else f"error: Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; set PYTHON=python3.11")'
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo \
	  "error: the pesq package is built from source and needs a C compiler; on Debian: apt-get install gcc python3-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; \
	  sys.exit(0 if os.path.exists(s.get_path("include") + "/Python.h") else "error: the pesq package needs the Python headers; on Debian: apt-get install python3-dev")'
	@echo "== setting up $(VENV) (about 5 GB, some minutes)"
	$(PYTHON) -m venv "$(VENV)"
	# pesq needs NumPy to be built, this project a setuptools that knows licence expressions.
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "numpy<2.4" "setuptools>=77" wheel
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements.txt
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch "$@"

demo: setup
	@"$(BIN)/python" recipes/ablate.py hparams/demo.yaml

# A test moves to a worker that has none left; until then neighbours stay together, and so do the
# models that their module builds once.
test: setup
	"$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal

lint: setup
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

docs: $(VENV)/.docs
	"$(BIN)/sphinx-build" -q -W --keep-going -d build/doctrees docs site
	@echo "site/index.html"

$(VENV)/.docs: $(VENV)/.complete docs/requirements.txt
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch "$@"

clean:
	rm -rf "$(VENV)" results site
