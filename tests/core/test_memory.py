"""Freed blocks are kept: a new array of the same size costs no page faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import resource
import colossal_mpi
import numpy as np
np.ones(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**more):
    root = str(Path(__file__).parents[2])
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", COUNT]
    out = subprocess.run(
        run, env=env | {"PYTHONPATH": root} | more, capture_output=True, text=True, timeout=60, check=True
    )
    return int(out.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_blocks_are_reused_unless_the_user_has_tuned_malloc():
    assert faults() < 20
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") >= 20
