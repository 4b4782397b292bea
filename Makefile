# `make demo` makes a video, `make test` tests everything. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for the installation, for instance an index with CPU-only wheels of torch.
PIP_FLAGS ?=
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
PYTEST := $(BIN)/pytest
WORKERS := -n auto --dist worksteal
INTERPRETED := tests/kernels/interpreted
# The site of docs/ reads sources and imports none, so that its environment needs no torch.
DOCS_VENV := .venv-docs
PROMPT ?= a red circle moves right on a white background

# A build of torch with CUDA, for machines without a GPU, and the versions to test with.
CUDA_VENV := .venv-cuda
CUDA_TORCH ?= 2.11.0
CUDA_TRITON ?= 3.6.0
CUDA_PIP_FLAGS ?=
CUDA_INSTALLED := $(CUDA_VENV)/.installed-$(CUDA_TORCH)-$(CUDA_TRITON)
CUDA_TESTS := tests/cuda_build tests/transformer/test_fullgraph.py tests/attention \
	$(addprefix tests/kernels/,test_ops.py test_triton.py test_tuned.py test_targets.py test_aot.py)

.PHONY: demo serve test test-fast test-kernels test-cuda-build fuzz fuzz-api soak bench-serve docs docs-serve lint format clean

# What `demo` and `serve` need. The rest adds the tools of development, as much again to wait for.
$(VENV)/.runs: pyproject.toml setup.py constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/.installed: $(VENV)/.runs
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,bench,plots]'
	@touch $@

demo: $(VENV)/.runs
	$(BIN)/cogvx-fast generate "$(PROMPT)" -o out/demo.mp4 --sheet out/demo.png --zoom 3

# A server of the demo model; it says the addresses of its page and API and opens the page. MODEL=... for another.
serve: $(VENV)/.runs
	$(BIN)/cogvx-fast serve --open $(MODEL)

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

# The rest of the constraints holds; torch names its own setuptools.
$(CUDA_INSTALLED): pyproject.toml setup.py constraints.txt
	@echo "test-cuda-build: fetches torch $(CUDA_TORCH) with CUDA and its libraries, for inductor's code for GPUs:" \
		"about 5.5 GB in $(CUDA_VENV); no GPU is needed"
	$(PYTHON) -m venv $(CUDA_VENV)
	@rm -f $(CUDA_VENV)/.installed-*
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(CUDA_VENV)/constraints.txt
	printf 'torch==%s\ntriton==%s\n' $(CUDA_TORCH) $(CUDA_TRITON) >> $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/pip install --disable-pip-version-check $(CUDA_PIP_FLAGS) -c $(CUDA_VENV)/constraints.txt -e '.[dev]'
	@$(CUDA_VENV)/bin/python -c 'import sys, torch; sys.exit(None if torch.version.cuda else f"torch {torch.__version__} is built without CUDA: set CUDA_PIP_FLAGS to an index that has it")'
	@touch $@

# What `torch.compile` makes for GPUs, which the CPU build of torch cannot say. Versions other than those that are
# usual on GPU machines: make test-cuda-build CUDA_TORCH=... CUDA_TRITON=..., the pair that torch asks for.
# Without AMD's target: no CUDA build runs there, and Triton 3.6 does not compile the convolutions for it.
test-cuda-build: $(CUDA_INSTALLED)
	$(CUDA_VENV)/bin/pytest $(WORKERS) -k 'not gfx942' $(CUDA_TESTS)

# Hostile inputs, other ones every time; what came of them goes to docs/reliability.md.
MINUTES ?= 30
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --write docs/reliability.md

# Requests by the API's own page, and such as it forbids; what came of them goes to docs/serving.md.
REQUESTS ?= 10000
fuzz-api: $(VENV)/.installed
	$(BIN)/python -m tests.soak.requests --requests $(REQUESTS) --write docs/serving.md

# Jobs on a server that is killed, cut off, filled up and told the wrong time; the same as without comes of them, or it
# fails. The table goes to docs/serving.md. As root also on a disk that is full.
JOBS ?= 1000
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --jobs $(JOBS) --keep out/soak --write docs/serving.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --jobs $(JOBS) --in-peace --keep out/soak-in-peace --write docs/serving.md

# How long people wait, by how many of them come, beside a server written by hand: fifteen minutes, on a machine that
# does nothing else.
bench-serve: $(VENV)/.installed
	$(BIN)/cogvx-fast bench serve --baseline benchmarks/serving/baseline.py --load 0.2,0.5,0.65 --duration 110 --steps 10
	$(BIN)/cogvx-fast bench report

$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -r $(DOCS_VENV)/requirements.txt
	@touch $@

# The pages as a site, in out/site; what is wrong with a link, an anchor or the navigation is an error.
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "open out/site/index.html"

docs-serve: $(DOCS_VENV)/.installed
	$(DOCS_VENV)/bin/mkdocs serve

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(DOCS_VENV) build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
