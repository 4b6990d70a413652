# `make demo` converts a small checkpoint, verifies it and compares it with ModelOpt's. `make test`
# runs all tests, `make test-fast` those that take no longer than a second. All of them create the
# environment if it is not there.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The working tree; or, with EDITABLE empty, a wheel.
PACKAGE ?= .
EDITABLE ?= -e
MODEL := fixtures/qwen3_moe
DEMO := build/demo

.PHONY: demo test test-fast coverage docs lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(EDITABLE) "$(PACKAGE)[fast,dev,docs,oracle]"
	touch $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/moe-ckpt convert $(MODEL)/source $(DEMO) --stats $(MODEL)/stats.json --quantize linear -v
	@echo
	$(BIN)/moe-ckpt verify $(DEMO) --source $(MODEL)/source --all
	@echo
	$(BIN)/python -m bench same $(DEMO) $(MODEL)/modelopt-nvfp4

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

coverage: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow" --cov --cov-report=term-missing:skip-covered

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist
