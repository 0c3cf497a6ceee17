"""An import loads only the packages that it needs, and every public name exists."""

import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def loaded(names):
    """Return the packages that are loaded after some modules are imported, without the standard library."""
    code = f"import sys, {names}; print(*{{name.partition('.')[0] for name in sys.modules}} - sys.stdlib_module_names)"
    return set(run(code).split())


@pytest.mark.smoke
def test_the_package_loads_only_what_it_needs():
    """h5py, PyTorch, CuPy and the packages of the command line take seconds, and are loaded when first used."""
    assert loaded("colossal_mpi") - loaded("array_api_compat.numpy, mpi4py.MPI") == {"colossal_mpi"}


def test_every_public_name_exists():
    code = "import colossal_mpi; print([n for n in colossal_mpi.__all__ if not hasattr(colossal_mpi, n)])"
    assert run(code).strip() == "[]"
