# make demo   the main job on bundled real data      make test   lint, types, import contracts, tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint tables clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/lifelong-ens compare --stream split_digits --strategies finetune,independent,batch_ensemble,pnn \
		--seeds 3 --out results/demo
	@echo "open results/demo/report.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# one thread per worker: two pytest workers on two cores would otherwise fight over four
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

# the tables of README and of experiments/results, from the records there
tables: $(STAMP)
	$(BIN)/python -m experiments.reproduce.readme

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
