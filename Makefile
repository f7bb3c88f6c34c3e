# Everything a developer runs. It needs Python 3.11 or later and make; `make` alone lists the targets.
# The environment is .venv, built anew whenever pyproject.toml changes.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .venv/bin/uv)
PY := .venv/bin/python
INSTALL := $(UV) pip install --quiet --python $(PY)
ARGS ?=

export UV_PYTHON_DOWNLOADS := never
.DEFAULT_GOAL := help
.PHONY: help env install test stress crowd fuzz coverage demo lint format types docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PYTHON=python3.12 picks the interpreter of .venv; ARGS="..." goes to pytest, the demo or the benchmarks.'

env: .venv/env.stamp ## build .venv with every tool

.venv/env.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo 'No Python 3.11 or later found: make PYTHON=/path/to/python3' >&2; exit 1; }
	@if [ "$(UV)" = uv ]; then uv venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv; \
	else $(PYTHON) -m venv --clear .venv && $(PY) -m pip install --quiet --disable-pip-version-check uv; fi
	$(INSTALL) -r pyproject.toml --group dev
	@touch $@

.venv/demo.stamp .venv/bench.stamp: .venv/%.stamp: .venv/env.stamp
	$(INSTALL) --group $*
	@touch $@

install: .venv/env.stamp
	@rm -rf dist
	$(UV) build --quiet --python $(PY) --out-dir dist
	$(INSTALL) --reinstall-package modelcache --no-deps dist/modelcache-*.whl

test: install ## build the wheel, test it here, then its quick part on every other Python 3.11 to 3.13
	$(PY) tests/run.py --uv $(UV) --marks 'not slow and not fuzz' --others -- $(ARGS)

stress: install ## the slow tests: minutes
	$(PY) tests/run.py --uv $(UV) --marks slow -- --timeout=600 $(ARGS)

fuzz: install ## a hundred thousand damaged archives: minutes
	$(PY) tests/run.py --uv $(UV) --marks fuzz -- --capture=no $(ARGS)

crowd: install ## eight processes on one disk folder, killed and stopped for a minute; prints its figures
	$(PY) tests/run.py --uv $(UV) --marks slow -- --timeout=600 -s tests/stress/test_crowd.py $(ARGS)

coverage: .venv/env.stamp ## test the tree and print the lines and branches that were missed
	$(PY) -m pytest -m 'not slow and not fuzz' --cov --cov-report=term-missing $(ARGS)

demo: install .venv/demo.stamp ## 30 models, a server and its threshold, in a terminal
	$(PY) docs/examples/demo/run.py $(ARGS)

lint: .venv/env.stamp ## ruff, every rule
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/env.stamp ## let ruff fix and format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: .venv/env.stamp ## mypy, strict
	.venv/bin/mypy

docs: .venv/env.stamp ## the pages, to build/docs; a warning is an error
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet -b html -d build/doctrees docs build/docs
	@echo 'file://$(CURDIR)/build/docs/index.html'

bench: install .venv/bench.stamp ## the benchmarks
	$(PY) -m benchmarks $(ARGS)

clean: ## remove what was made here
	rm -rf .venv build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find modelcache tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
