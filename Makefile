# Two commands on a fresh machine: `make demo`, then `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test fuzz chaos check format family tables clean

install: $(VENV)/installed

# torch first, by its exact version: a CPU build on the wheel path is taken then, and nothing replaces it later
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	# reads exports back in tests; by itself, as it asks for an older fsspec than s3fs, and runs with this one
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt datasets multiprocess dill xxhash
	touch $@

demo: install
	$(BIN)/shardscribe demo

test: install
	$(BIN)/pytest

# new damaged inputs for so many minutes; the suite draws the same few hundred every time
MINUTES ?= 10
fuzz: install
	FUZZ_MINUTES=$(MINUTES) $(BIN)/pytest tests/test_fuzz.py

# 100 kills of a job's parts, 20 minutes on two idle cores; needs radosgw. SEED repeats the order of another run
KILLS ?= 100
chaos: install
	$(BIN)/python -m tests.chaos --kills $(KILLS) --out build/chaos $(if $(SEED),--seed $(SEED))

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# trains the embedded checkpoints anew (two hours on 2 cores); FSDD is a folder of the digit shards
family: install
	$(BIN)/shardscribe family --fsdd $(FSDD)

# labels, quantizes, distills and scores the embedded student (an hour on 2 cores); FSDD as above
tables: install
	$(BIN)/shardscribe tables --fsdd $(FSDD)

clean:
	rm -rf $(VENV) demo-out build .mypy_cache .pytest_cache .ruff_cache .hypothesis
