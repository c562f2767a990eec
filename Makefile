# Everything sets itself up: only python3 and pip are assumed.
PYTHON ?= python3
DATA ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help test test-slow lint quickstart bench clean
help:
	@echo "make quickstart [DATA=path]   train dense -> 3:4 -> 2:4, sample, measure; leaves pictures in runs/quickstart*"
	@echo "make test                     lint and the whole default test suite"
	@echo "make test-slow                the tests that take minutes"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

quickstart: $(STAMP)
	$(BIN)/sparsedm quickstart $(if $(DATA),--data '$(DATA)')

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
