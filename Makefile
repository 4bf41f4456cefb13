# make help lists the targets. Each creates the environment first if it is missing.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= gmm
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TESTS ?= tests

.PHONY: help demo test lint format clean env
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

env: $(STAMP)  ## Create the environment only

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Use: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## Distil a small Qwen-Image teacher on this machine (DEMO=gmm, dx or datafree; QUICK=true for a trial)
	$(BIN)/python tools/demo.py variant=$(DEMO) $(if $(QUICK),quick=$(QUICK) out=outputs/demo_quick)

test: $(STAMP)  ## Run all tests (TESTS=tests/unit for a part)
ifeq ($(TESTS),tests)
	@log=$$(mktemp); $(BIN)/python -m pytest tests/unit tests/numerics > $$log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest tests/dist tests/slurm; failed=$$?; wait $$beside || failed=$$?; \
	cat $$log; rm $$log; exit $$failed
else
	$(BIN)/python -m pytest $(TESTS)
endif

lint: $(STAMP)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and everything that runs wrote (outputs/)
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
