PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test coverage lint docs examples benchmarks clean

demo: $(INSTALLED)
	$(BIN)/xai-edit demo --out xai-edit-demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

# Of lines and branches; below 90 % it fails.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest -q --cov --cov-report=term-missing:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

examples: $(INSTALLED)
	for example in examples/[!_]*.py examples/benchmarks/[!_]*.py; do $(BIN)/python $$example --quick || exit 1; done

# What docs/speed.md shows; they need XAI_EDIT_DATA and write the committed figures anew.
benchmarks: $(INSTALLED)
	for pair in scoring selection drsa pruning:smaller unlearning:unlearning-cost scaling; do \
		OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/benchmarks/$${pair%:*}.py \
			--out docs/results/$${pair#*:}.json || exit 1; \
	done

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) docs/_build docs/_tables xai-edit-demo .pytest_cache .mypy_cache .ruff_cache
