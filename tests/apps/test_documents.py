"""The programs of the README and the guides print what is shown beside them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_mpi.launcher import mpiexec_command

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
_BLOCK = re.compile(r"(?:::|code-block:: \w+)\n\n((?:    .*\n|\n)+)")


def blocks(text):
    """Return the indented blocks after ``::`` and ``.. code-block::`` lines, without their indentation."""
    return [re.sub("^    ", "", block, flags=re.M).strip("\n") for block in _BLOCK.findall(text)]


def programs():
    """Return code, number of ranks and output of each program that a document runs."""
    cases = []
    for path in DOCUMENTS:
        found = blocks(path.read_text())
        files = {block.split("\n")[0][2:]: block for block in found if re.match(r"# \w+\.py\n", block)}
        runs = [re.match(r"\$ mpiexec -n (\d+) python (\w+\.py)\n(.*)", block, re.S) for block in found]
        for ranks, name, output in [run.groups() for run in runs if run]:
            code = files.pop(name)
            cases.append(pytest.param(code, int(ranks), output, id=f"{path.stem}-{name}"))
        assert not files, f"{path}: {', '.join(files)} not run"
    return cases


@pytest.mark.parametrize(("code", "ranks", "output"), programs())
def test_prints_what_is_shown(tmp_path, code, ranks, output):
    (tmp_path / "program.py").write_text(code)
    command, env = mpiexec_command(ranks, [sys.executable, "program.py"])
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == output.strip()
