# Two targets matter: `make demo` and `make test`. Both set up .venv first, by constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint setup bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not ((3,11) <= sys.version_info[:2] < (3,14)))' || \
	  { echo "raypipe needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/raypipe demo --out demo-run

# Tests without Ray share the cores, a file a worker; those with it come alone, one session for all.
WORKERS ?= 2
test: $(READY)
	status=0; \
	$(BIN)/python -m pytest -m "not ray" -n $(WORKERS) --dist loadfile --no-loadscope-reorder || status=$$?; \
	$(BIN)/python -m pytest -m ray || status=$$?; \
	exit $$status

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One benchmark: make bench NAME=scale. Alone on the machine; each prints one JSON line.
NAME ?= extract
bench: $(READY)
	$(BIN)/python benchmarks/$(NAME).py

clean:
	rm -rf $(VENV) demo-run build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
