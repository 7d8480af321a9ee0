PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo

NEWEST := build/newest

.PHONY: demo test test-newest lint browser cross docs clean
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

test: lint browser cross
	$(BIN)/python -m pytest

# The wheel in an environment of its own beside the newest releases of what it uses, whatever constraints.txt says: takes
# minutes, and some gigabytes where PyTorch comes with CUDA. Warnings that something will be removed are shown there.
NEWEST_TESTS := layers_conv layers_changes ops_functions ops_tracing ops_transforms ops_autocast compile_model \
	compile_backend convert_network cost_counter train_trainer runs_onnx_file
SHOWN := $(foreach kind,Deprecation PendingDeprecation Future,-W default::$(kind)Warning)

test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(NEWEST) .
	for wheel in $(NEWEST)/*.whl; do $(NEWEST)/bin/python -m pip install --quiet "$$wheel[test]" torchvision timm; done
	$(NEWEST)/bin/python -m pip list | grep -E '^(torch|torchvision|timm|halide|numpy|onnx) '
	$(NEWEST)/bin/pytest $(SHOWN) -m 'slow or not slow' tests/test_newest.py
	$(NEWEST)/bin/pytest $(SHOWN) $(foreach name,$(NEWEST_TESTS),tests/test_$(name).py)

# A browser for the tests of the report. Without one they are skipped, and say so.
browser:
	@command -v chromium >/dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y chromium; } \
		|| echo "No chromium and no way to install it here: the report is not tested in a browser."

# What C libraries for other machines are built and run with. Without it their tests are skipped, and say so.
cross:
	@( for tool in aarch64-linux-gnu-gcc qemu-aarch64 node; do command -v $$tool >/dev/null || exit 1; done ) \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y \
			gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user nodejs; } \
		|| echo "No cross compiler and no way to install it here: C libraries for other machines are not run."

clean:
	rm -rf .venv demo build
