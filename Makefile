# `make demo` and `make test` need Python 3.11 or newer (with its venv module), make and git.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TYPES  := build/types
BUILD  := pyproject.toml setup.py quant/kernels/counting.c
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types layout kernels docs clean

demo: $(VENV)/.installed
	$(BIN)/adq-search --budget-bits 2.8

test: $(VENV)/.installed-test lint types kernels docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and mkdocs do not know setuptools' package-dir: they get the packages laid out as installed.
layout:
	rm -rf $(TYPES)
	mkdir -p $(TYPES)/adq
	ln -s $(CURDIR)/adq/*.py $(TYPES)/adq/
	ln -s $(CURDIR)/quant $(CURDIR)/proxies $(CURDIR)/search $(TYPES)/adq/

types: $(VENV)/.installed-test layout
	cd $(TYPES) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p adq

# compiles every GPU kernel, without a GPU; fails where one spills registers
kernels: $(VENV)/.installed-test
	$(BIN)/python -m adq.quant.kernels.aot

# build/docs/index.html is the home page; a broken link or a warning fails
docs: $(VENV)/.installed-test layout
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; name another one: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) lacks its venv module; on Debian: apt-get install python3-venv"; exit 2; }

$(VENV)/.installed: $(BUILD) | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: $(BUILD) | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
