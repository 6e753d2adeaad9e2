# quickstart: the main job on real input.  test: the whole suite.  style: lint, format, layering.
VENV   := .venv
PYTHON ?= python3
PIP    := $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet -c constraints.txt

.PHONY: quickstart test style

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m examples.quickstart

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest

style: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

# `--without-pip` because Debian ships venv without ensurepip; the system's pip installs into the venv.
$(VENV)/bin/python:
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	touch $@
