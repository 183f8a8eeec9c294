PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test coverage zennit-1 lint docs examples benchmarks clean

demo: $(INSTALLED)
	$(BIN)/xai-edit demo --out xai-edit-demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

# Of lines and branches; below 90 % it fails.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest -q --cov --cov-report=term-missing:skip-covered

# On Zennit 1.0 as well, which pip takes by itself only from Python 3.11.11 on.
zennit-1: $(INSTALLED)
	test -d .zennit-1 || $(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python \
		--target .zennit-1 "zennit==1.0.*"
	PYTHONPATH=$(CURDIR)/.zennit-1 $(BIN)/python -m pytest tests/attribution tests/concepts tests/edits tests/test_guard.py tests/test_testing.py

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
	rm -rf $(VENV) .zennit-1 .coverage docs/_build docs/_tables xai-edit-demo .pytest_cache .mypy_cache .ruff_cache
