# make demo: a first real result. make test: the fast suite. Both start from nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 2
# one process a core, each with one thread; whoever is done takes over tests from the others
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist worksteal

.PHONY: demo test test-all lint format clean

demo: $(VENV)/.demo
	$(VENV)/bin/undersong demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.test
	$(PYTEST)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "undersong needs Python >= 3.11; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install -q -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) undersong-demo
