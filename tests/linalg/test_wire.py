"""On every rank, the bytes that MPI puts on the wire equal the bytes in the ledger, to the byte.

Open MPI's monitoring counts the payload of every message from rank to rank. Two jobs that differ in the number of
products alone differ by the bytes of those products: starting, grids and communicators take the same in both. Headers
and rendezvous control are not payload, so that nothing needs to be allowed for.
"""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from colossal_mpi import linalg
from colossal_mpi.runtime import launcher

ROOT = Path(__file__).parents[2]
SIZES = 611, 467, 530  # m, n, k: blocks of different sizes, the least of them above the 32 KiB of a large message
GRIDS = [{"col": 4}, {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 2, "col": 2, "depth": 2}]
CASES = [
    pytest.param(name, grid, id=f"{name}-{'x'.join(map(str, grid.values()))}")
    for name, preset in linalg.ALGORITHMS.items()
    for grid in GRIDS
    if set(preset.axes) == set(grid)
]
JOB = """
import json, sys
from colossal_mpi import Grid, comm, ledger, linalg, random
name, axes, (m, n, k), products, out = json.loads(sys.argv[1])
grid = Grid(**axes)
preset = linalg.preset(name, grid)
a = random.normal((m, k), grid, preset.a, stream="a")
b = random.normal((k, n), grid, preset.b, stream="b")
with ledger.record() as moved:
    for _ in range(products):
        linalg.matmul(a, b, name)
received = comm.collect(moved.bytes, grid)
if grid.rank == 0:
    open(out, "w").write(json.dumps(received))
"""


@functools.cache
def monitored():
    """Return whether the MPI in use is an Open MPI that can count its messages."""
    if MPI.get_vendor()[0] != "Open MPI":
        return False
    info = shutil.which("ompi_info", path=os.path.dirname(sys.executable)) or shutil.which("ompi_info")
    listed = subprocess.run([info], capture_output=True, text=True, timeout=60, check=False).stdout if info else ""
    return "pml: monitoring" in listed


def count(folder, name, grid, products):
    """Return the bytes that each rank received in a job of `products` products, by the ledger and on the wire."""
    folder.mkdir()
    task = json.dumps([name, grid, SIZES, products, str(folder / "ledger.json")])
    ranks = math.prod(grid.values())
    command, needed = launcher.mpiexec_command(ranks, [sys.executable, "-c", JOB, task])
    watched = {
        "COLOSSAL_MPI_SHARED": "0",  # panels in shared memory are no messages
        "PYTHONPATH": str(ROOT),
        "OMPI_MCA_btl": "self,sm",
        "OMPI_MCA_pml": "ob1,monitoring",
        "OMPI_MCA_pml_monitoring_enable": "1",
        "OMPI_MCA_pml_monitoring_enable_output": "3",
        "OMPI_MCA_pml_monitoring_filename": str(folder / "wire"),
    }
    env = launcher.child_environment(os.environ) | needed | watched
    subprocess.run(command, env=env, timeout=100, check=True, stdin=subprocess.DEVNULL)
    return json.loads((folder / "ledger.json").read_text()), received(folder, ranks)


def received(folder, ranks):
    """Return the bytes that each rank got from others: lines ``E  from  to  N bytes  M msgs sent ...``."""
    total = [0] * ranks
    for rank in range(ranks):
        for line in (folder / f"wire.{rank}.prof").read_text().splitlines():
            kind, *fields = line.split("\t")
            if kind in ("E", "I") and fields[0] != fields[1]:
                total[int(fields[1])] += int(fields[2].removesuffix(" bytes"))
    return total


@pytest.mark.smoke
@pytest.mark.skipif("not monitored()", reason="needs an Open MPI with the monitoring component")
@pytest.mark.parametrize(("name", "grid"), CASES)
def test_wire_and_ledger_agree_to_the_byte(tmp_path, name, grid):
    few, many = (count(tmp_path / str(products), name, grid, products) for products in (1, 3))
    by_ledger, on_wire = ([m - f for f, m in zip(*pair, strict=True)] for pair in zip(few, many, strict=True))
    assert min(by_ledger) > 2 * 32_768
    assert on_wire == by_ledger
