# make demo   set up and compare the decoders on the embedded model
# make test   set up and run everything that must pass
# make bench  side by side with peers, minutes to an hour
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPU_TORCH := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test bench docs

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "torch==2.13.0" \
		|| $(BIN)/pip install -q "torch>=2.11,<2.14" --index-url $(CPU_TORCH)
	$(BIN)/pip install -q -e ".[dev,ray]"
	touch $@

demo: setup
	$(BIN)/locum compare decode

test: setup
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/locum verify --all --fast
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

bench: setup
	for file in benchmarks/*.py; do $(BIN)/python $$file || echo "$$file did not run: its peer may be missing"; done

docs: setup
	$(BIN)/python scripts/readme_table.py
