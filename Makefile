# `make demo` makes a video, `make test` tests everything. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for the installation, for instance an index with CPU-only wheels of torch.
PIP_FLAGS ?=
PYTEST := $(BIN)/pytest
WORKERS := -n auto --dist worksteal
INTERPRETED := tests/kernels/interpreted
PROMPT ?= a red circle moves right on a white background

.PHONY: demo test test-fast test-kernels lint format clean

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,bench,plots]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/cogvx-fast generate "$(PROMPT)" -o out/demo.mp4 --sheet out/demo.png --zoom 6 --guidance 1.5

# A worker for each core, which takes over what another has left. Triton's kernels are interpreted in processes of their
# own: it is decided when they are defined.
test: $(VENV)/.installed
	$(PYTEST) $(WORKERS)
	TRITON_INTERPRET=1 $(PYTEST) $(WORKERS) $(INTERPRETED)

# What needs no compiler, no interpreter, no process of its own and no trained model: for while one writes.
test-fast: $(VENV)/.installed
	$(PYTEST) $(WORKERS) -m 'not slow and not kernels_all'

# Every kernel in every configuration for every GPU, on all cores: minutes the first time, and no GPU needed.
test-kernels: $(VENV)/.installed
	$(PYTEST) -m kernels_all tests/kernels
	TRITON_INTERPRET=1 $(PYTEST) -m kernels_all $(INTERPRETED)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
