# make demo     set everything up and compare five methods on real data
# make test     set everything up and run the tests
# make install  the virtual environment .venv alone
# Others: lint, format, test-all (slow tests too), docs, bench, clean, help.

SHELL  := /bin/bash
VENV   := .venv
BIN    := $(VENV)/bin
OUT    := report
WORKERS := 2
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Two processes with one thread each beat one process with two on small matrices.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# The files that decide what is installed: a change in one of them installs again, nothing else does.
RECIPE := setup.cfg pyproject.toml constraints.txt

.PHONY: install demo test test-all lint format docs bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

install: $(VENV)/.installed

# PYTHON=/path/to/python make install  chooses another interpreter.
$(VENV)/.created:
	@python="$(PYTHON)"; \
	for candidate in $${python:-python3 python3.13 python3.12 python3.11}; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: bayesdl needs Python 3.11 or newer; found: $$($${python:-python3} --version 2>&1 || echo none)." >&2; \
	  echo "      On Debian or Ubuntu: sudo apt install python3 python3-venv.  Another one: make install PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	  echo "make: $$found cannot make virtual environments. On Debian or Ubuntu: sudo apt install python3-venv" >&2; \
	  exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$found" --version) ..."; \
	rm -rf $(VENV); "$$found" -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(RECIPE)
	@echo "Installing bayesdl and what it needs into $(VENV); the first time takes a few minutes ..."
	@echo "  1 of 2: torch, the largest part"
	@$(PIP) install -c constraints.txt torch
	@echo "  2 of 2: everything else"
	@$(PIP) install -c constraints.txt -e .
	@touch $@
	@echo "Installed: $(BIN)/bayesdl, or 'source $(BIN)/activate'."

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "Installing what the documentation needs ..."
	@$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "Installing what the benchmarks need ..."
	@$(PIP) install -c constraints.txt -e ".[bench]"
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/bayesdl compare --data diabetes --engines gp,nngp,student-t,hmc,ensemble --reference hmc --out $(OUT)/
	@echo; echo "The report: file://$(CURDIR)/$(OUT)/index.html"

test: $(VENV)/.installed-test
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" --timeout 300

test-all: $(VENV)/.installed-test
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) --timeout 1800

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The pages: file://$(CURDIR)/site/index.html"

bench: $(VENV)/.installed-bench
	@for script in import_time kernel_core; do \
	  echo "benchmarks/$$script.py"; $(ONE_THREAD) $(BIN)/python benchmarks/$$script.py || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
