# make demo: from a fresh clone to a result.    make test: the test suite.    make docs: the site.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes of make test; each needs a core and 2 GB.
WORKERS ?= 2

.PHONY: setup demo test test-minimal lint docs clean kernels kernels-validate kernels-short gpu benchmarks-test peers

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

# What optional packages have to do with, as if none were installed.
MINIMAL := bad_recordings cli config data declares docs export inference layouts loggers metrics page \
  phonemes public_api real_recordings recognition recordings rooms similarity
test-minimal: setup
	PYTHONPATH="$(CURDIR)/tests/without$${PYTHONPATH:+:$$PYTHONPATH}" "$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal \
	  $(MINIMAL:%=tests/test_%.py) tests/soft_dtw/test_api.py tests/soft_dtw/test_triton.py

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

# The Triton kernels on a checker that needs no GPU. It needs Python 3.12 or 3.13, which PYTHON312
# names, and an environment of its own.
KERNELS := .venv-kernels
PYTHON312 ?= $(firstword $(foreach p,python3.12 python3.13 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python),$(shell $(p) -c 'import sys; print("$(p)" if (3, 12) <= sys.version_info < (3, 14) else "")' 2>/dev/null)))
SANITIZE = PYTHONPATH=.:tests/soft_dtw "$(KERNELS)/bin/python" -m ttsem.sanitize pytest tests/soft_dtw/checked_kernels.py -q \
  --confcutdir=tests/soft_dtw -p no:cacheprovider -o addopts= -o markers="short: the part that CI runs"

$(KERNELS)/.complete: tests/soft_dtw/kernels.txt
	@test -n "$(PYTHON312)" || { echo "error: make kernels needs Python 3.12 or 3.13; set PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON312) -m venv "$(KERNELS)"
	"$(KERNELS)/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/soft_dtw/kernels.txt
	@touch "$@"

kernels: $(KERNELS)/.complete
	$(SANITIZE)

# Their compilation, pass by pass, kernel by kernel: two minutes of processor time.
kernels-validate: $(KERNELS)/.complete
	PYTHONPATH=. "$(KERNELS)/bin/python" tests/soft_dtw/validated.py

# The short part, where there is an interpreter for it.
kernels-short:
	@if test -n "$(PYTHON312)"; then $(MAKE) "$(KERNELS)/.complete" && $(SANITIZE) -m short; \
	  else echo "skipped: the Triton kernels are not checked, no Python 3.12 or 3.13 was found (PYTHON312)"; fi

# Whatever needs a GPU, in ten minutes at most: build/gpu/gpu.json and gpu.md say what passed.
gpu: setup
	"$(BIN)/python" benchmarks/gpu.py --output build/gpu

# The other soft-DTW libraries, in an environment that sees this one.
peers: .venv-peers/.complete

# Other libraries' own test cases, with our soft-DTW in the place of theirs.
benchmarks-test: peers
	PYTHONPATH=.:tests/soft_dtw .venv-peers/bin/python -m pytest -q -p no:cacheprovider --confcutdir=tests/soft_dtw tests/soft_dtw/peers.py

.venv-peers/.complete: $(VENV)/.complete benchmarks/requirements.txt
	"$(BIN)/python" -m venv .venv-peers
	echo "import site; site.addsitedir('$$("$(BIN)/python" -c "import sysconfig; print(sysconfig.get_path(\"purelib\"))")')" \
	  > "$$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_base.pth"
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@touch "$@"

clean:
	rm -rf "$(VENV)" "$(KERNELS)" .venv-peers results site build/gpu
