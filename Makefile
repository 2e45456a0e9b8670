# The course from a fresh clone. Every target makes .venv and installs into it first, if that has not been done.
PROFILE := cpu
ARGS :=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# torch 2.13.0 has wheels for these.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
endif

# torch, MKL and OpenBLAS all read OMP_NUM_THREADS. More than eight threads slow models of this size down.
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(shell test $(CORES) -gt 8 && echo 8 || echo $(CORES))
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help course test check lint lab bench lock clean

help: ## this list
	@echo "make course [PROFILE=smoke|cpu|gpu-12gb|gpu-12gb-1b] [ARGS='--only 08 --set ppo.kl_coef=0.1']"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

course: $(STAMP) ## install, run every notebook on PROFILE into runs/PROFILE/, print where the report is
	$(PY) -m rlhf_nb_utils.course run --profile $(PROFILE) $(ARGS)

test: $(STAMP) lint ## install, ruff, all tests, every cell of every notebook on the smoke profile
	$(PY) -m pytest

check: $(STAMP) lint ## the two-minute loop: ruff and the quick tests
	$(PY) -m pytest -m "not slow and not notebooks"

lint: $(STAMP) ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks/00_overview.ipynb

bench: $(STAMP) ## how fast, against TRL and torch's own: a table, and runs/bench.json
	$(PY) -m rlhf_nb_utils.bench $(ARGS)

lock: ## remake constraints.txt after a change of dependencies (needs uv)
	uv pip compile -q --universal --python-version 3.11 --all-extras --no-header pyproject.toml -o constraints.txt

clean: ## remove .venv and caches; runs/ (your results) stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build rlhf_nb_utils.egg-info
	find rlhf_nb_utils tests data notebooks -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "Python 3.11 to 3.14 is needed, and python3 here is: $$(python3 --version 2>&1 || true)."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PY) -c '$(SUPPORTED)' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@echo "Installing into $(VENV): on Linux more than 2 GB to download (CUDA comes with torch), some minutes the first time."
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
