# Every target creates the virtual environment that it needs below .venv/, one per interpreter and
# constraints file. The only requirement is Python 3.11 or newer.
#   make test PYTHON=python3.13                          another interpreter
#   make test CONSTRAINTS=constraints-lowest.txt         the lowest supported versions
PYTHON ?= python3
CONSTRAINTS ?=
VERSION := $(shell $(PYTHON) -c 'import platform, sys, zlib; \
  print(f"{platform.python_version()}{sys.abiflags}-{zlib.crc32(sys.base_prefix.encode()):08x}")')
ifeq ($(VERSION),)
$(error PYTHON=$(PYTHON): no such interpreter)
endif
VENV := .venv/$(VERSION)$(if $(CONSTRAINTS),-$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# Scripts beside the package are checked for wrong names and arguments, not for types.
NAMES := $(addprefix --disable-error-code=,arg-type assignment call-overload dict-item index \
  list-item method-assign misc override union-attr var-annotated)
PYTEST := $(BIN)/python -m pytest -n 2 --durations=30

.PHONY: train test test-fast test-medium lint format docs reference versions clean

$(VENV)/.run: requirements.txt pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt $(wildcard requirements/*.txt)
	$(PIP) --requirement requirements-dev.txt
	touch $@

train: $(VENV)/.run
	$(BIN)/python launch.py --config=configs/digits.py --workdir=runs/digits --mode=train

test: $(VENV)/.dev
	$(PYTEST)

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not medium"

test-medium: $(VENV)/.dev
	$(PYTEST) -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dgl_jax launch.py
	$(BIN)/mypy --explicit-package-bases $(NAMES) benchmarks results examples
	$(BIN)/codespell

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site is written to site/ and opens without a server: site/index.html.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Writes docs/config.md anew from the dataclasses that declare the fields.
reference: $(VENV)/.dev
	$(BIN)/python docs/generate_config.py

versions: $(VENV)/.dev
	$(BIN)/python --version
	$(BIN)/pip --disable-pip-version-check list

clean:
	rm -rf .venv .cache build dist site *.egg-info
