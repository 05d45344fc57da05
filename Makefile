# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test slow lint clean

quickstart: $(VENV)/cli
	$(BIN)/peft-uniattn quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS)

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Warnings are errors, and so are broken links; nothing is fetched.
.PHONY: docs
docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict --quiet
	@echo "built: build/site/index.html"

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

# torch first and by itself, so that the other packages take the build that is there.
$(VENV)/cli: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[cli]"
	touch $@

$(VENV)/installed: $(VENV)/cli
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) quickstart-output
