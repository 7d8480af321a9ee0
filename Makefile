PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo

.PHONY: demo test lint browser docs clean
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

# The site for people who read: build/site/index.html.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python website/check.py build/site

test: lint browser
	$(BIN)/python -m pytest

# A browser for the tests of the report. Without one they are skipped, and say so.
browser:
	@command -v chromium >/dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y chromium; } \
		|| echo "No chromium and no way to install it here: the report is not tested in a browser."

clean:
	rm -rf .venv demo build
