"""The README's example does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from colossal_mpi.launcher import mpiexec_command

README = Path(__file__).parents[2] / "README.rst"


def blocks(text):
    """Return the indented blocks after ``::`` and ``.. code-block::`` lines, without their indentation."""
    found = re.findall(r"(?:::|code-block:: python)\n\n((?:    .*\n|\n)+)", text)
    return [re.sub("^    ", "", block, flags=re.M).strip("\n") for block in found]


def test_the_library_example_prints_what_the_readme_shows(tmp_path):
    code = next(block for block in blocks(README.read_text()) if block.startswith("# product.py"))
    shown = next(block for block in blocks(README.read_text()) if block.startswith("$ mpiexec -n 4 python product.py"))
    (tmp_path / "product.py").write_text(code)
    command, env = mpiexec_command(4, [sys.executable, "product.py"])
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == shown.splitlines()[1]
