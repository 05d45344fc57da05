# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
TESTS ?= tests
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test slow lint clean

quickstart: $(VENV)/installed
	$(BIN)/peft-uniattn quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow $(TESTS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and by itself, so that the other packages take the build that is there.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) quickstart-output
