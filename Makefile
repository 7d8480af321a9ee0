PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

# The stamp is made last, so that an interrupted installation is done again.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/sepconv demo --out $(OUT)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv demo
