PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test coverage coverage-timm portability margins lint docs examples benchmarks clean

demo: $(INSTALLED)
	$(BIN)/xai-edit demo --out xai-edit-demo --force

# One thread a worker: more wait for each other.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Of lines and branches; below the limit in pyproject.toml it fails.
coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term-missing:skip-covered

# Which networks of timm and transformers work, 45 minutes on two cores: docs/coverage-timm.md.
coverage-timm: $(INSTALLED)
	rm -f .coverage-timm.jsonl
	cd examples && { OMP_NUM_THREADS=1 ../$(BIN)/python coverage_timm.py --done ../.coverage-timm.jsonl \
		--reverse & OMP_NUM_THREADS=1 ../$(BIN)/python coverage_timm.py --done ../.coverage-timm.jsonl; wait; }
	cd examples && ../$(BIN)/python coverage_timm.py --done ../.coverage-timm.jsonl --out ../docs

# Another processor, other numbers of threads, Zennit 1.0 and the lowest versions in pyproject.toml.
portability: $(INSTALLED) .zennit-1 .lowest/installed
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n auto
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.zennit-1 $(BIN)/python -m pytest -n auto
	OMP_NUM_THREADS=1 .lowest/bin/python -m pytest -n auto
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.zennit-1 .lowest/bin/python -m pytest -n auto

# pip takes Zennit 1.0 by itself only from Python 3.11.11 on.
.zennit-1: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target $@ "zennit==1.0.*"

.lowest/installed: pyproject.toml
	$(PYTHON) -m venv .lowest
	.lowest/bin/python -m pip install --quiet --editable ".[dev]" \
		"torch==2.4.*" "captum==0.8.*" "numpy==1.26.*" "zennit==0.5.1"
	touch $@

# Which tests hang on one trained network; see tests/margins.py.
margins: $(INSTALLED)
	rm -rf .margins
	for seed in 0 1 2 3; do MARGINS=.margins MARGINS_SEED=$$seed OMP_NUM_THREADS=1 \
		PYTHONPYCACHEPREFIX=$(CURDIR)/.margins/pyc \
		$(BIN)/python -m pytest -n auto -p tests.margins -o enable_assertion_pass_hook=true || true; done
	$(BIN)/python -m tests.margins .margins

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
# With DEVICE=cuda, images a second and peak memory of scoring on that device alone.
DEVICE ?= cpu
benchmarks: $(INSTALLED)
	$(BIN)/python examples/benchmarks/throughput.py --device $(DEVICE) --out docs/results/throughput-$(DEVICE).json
	[ $(DEVICE) != cpu ] || for pair in scoring networks files selection drsa pruning:smaller unlearning:unlearning-cost scaling; do \
		OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/benchmarks/$${pair%:*}.py \
			--out docs/results/$${pair#*:}.json || exit 1; \
	done

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .zennit-1 .lowest .margins .coverage docs/_build docs/_tables docs/generated docs/how-to/network.safetensors xai-edit-demo .pytest_cache .mypy_cache .ruff_cache
