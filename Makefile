# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
TESTS ?= tests
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test slow serving lint clean

quickstart: $(VENV)/cli
	$(BIN)/peft-uniattn quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow $(TESTS)

# vLLM holds on to versions of its own, so it has an environment of its own.
serving: .venv-serving/installed
	.venv-serving/bin/python -m pytest -m "" tests/serving

.venv-serving/installed: pyproject.toml tests/serving/install_vllm.py
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/pip install --quiet --upgrade pip packaging
	.venv-serving/bin/python tests/serving/install_vllm.py
	.venv-serving/bin/pip install --quiet --editable . gguf platformdirs pytest
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Warnings are errors, and so are broken links; nothing is fetched. Pages of results are made from the raw files first.
.PHONY: docs
docs: $(VENV)/docs
	$(BIN)/python docs/make_results_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
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
	rm -rf $(VENV) .venv-serving quickstart-output
