import subprocess
import sys

import pytest

LIMIT = 0.4
HEAVY = ["cupy", "h5py", "matplotlib", "pandas", "pydantic", "rich", "scipy", "torch", "typer"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.smoke
def test_the_package_loads_nothing_heavy():
    loaded = run(f"import sys, colossal_mpi; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_package_is_imported_fast():
    # processor time: that of the wall would measure what else the machine is doing
    code = """
import time
begun = time.process_time()
import colossal_mpi
print(time.process_time() - begun)
"""
    assert min(float(run(code)) for _ in range(5)) < LIMIT


def test_every_public_name_exists():
    code = "import colossal_mpi; print([n for n in colossal_mpi.__all__ if not hasattr(colossal_mpi, n)])"
    assert run(code).strip() == "[]"
