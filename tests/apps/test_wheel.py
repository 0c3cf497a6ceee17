"""The wheel is whole: installed in another folder it has the configurations and py.typed, and only colossal_mpi."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("colossal_mpi", "linalg", "layers", "apps", "setup.py", "pyproject.toml", "README.rst", "LICENSE")
CHECK = """
import pathlib, colossal_mpi
from colossal_mpi.apps import config, tasks
from colossal_mpi.layers.models import GPT
here = pathlib.Path(colossal_mpi.__file__).parent
assert (here / "py.typed").exists()
assert not (here / "linalg").is_symlink()
print(here, config.load("demo").model.hidden)
"""


def test_an_installed_wheel_is_whole(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=240)
    assert {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} - {"bin"} == {
        "colossal_mpi"
    }
    # -I: neither this checkout nor the current folder is on the path.
    start = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{CHECK}"]
    result = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(target / "colossal_mpi"), "128"]
