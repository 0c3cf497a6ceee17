"""A build from any source has all four folders, the data files, and nothing else.

A zip archive of the repository has no symlinks, an sdist leaves them out, and ``pip install git+...`` makes a checkout.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
BUILD = ["--no-deps", "--no-build-isolation"]
CHECK = """
import pathlib, colossal_mpi
from colossal_mpi import linalg
from colossal_mpi.apps import cli
from colossal_mpi.apps import report
from colossal_mpi.apps.config import load
from colossal_mpi.layers.models import GPT
here = pathlib.Path(colossal_mpi.__file__).parent
assert (here / "py.typed").exists()
assert (here / "apps/report/page.html").exists()
assert not (here / "linalg").is_symlink()
print(here, load("demo").model.hidden)
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def repository(folder):
    """Make a new repository whose only commit holds the files of this source tree that git does not ignore."""
    where = folder / "repository"
    env = os.environ | {"GIT_DIR": str(where), "GIT_WORK_TREE": str(ROOT), "GIT_CONFIG_NOSYSTEM": "1"}
    run("git", "init", "-q", env=env)
    run("git", "add", "-A", env=env)
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "all", env=env)
    return where


@pytest.fixture(scope="module")
def tracked(repository):
    """Return the names of the files of the commit, without the three symlinks."""
    lines = run("git", "--git-dir", str(repository), "ls-tree", "-r", "HEAD").splitlines()
    return {line.partition("\t")[2] for line in lines if not line.startswith("120000")}


@pytest.fixture(scope="module")
def archive(folder, repository):
    path = folder / "archive.zip"
    run("git", "--git-dir", str(repository), "archive", "--format=zip", "-o", str(path), "HEAD")
    return path


@pytest.fixture(scope="module")
def sdist(folder, archive):
    """Build an sdist where the symlinks are text files."""
    source = folder / "source"
    with zipfile.ZipFile(archive) as unpacked:
        unpacked.extractall(source)
    assert (source / "colossal_mpi/linalg").read_text() == "../linalg"
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, str(folder), cwd=source)
    return next(folder.glob("*.tar.gz"))


def installed(folder, source):
    """Build a wheel from a source, unpack it as pip does, and return the directory."""
    run(*PIP, "wheel", *BUILD, "-w", str(folder / "wheels"), str(source))
    with zipfile.ZipFile(next((folder / "wheels").iterdir())) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def require_complete(site, tracked):
    """Compare the installed files with the commit, then import them where no checkout is on the path."""
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    files = {name for name in files if ".dist-info/" not in name and not name.startswith("bin/")}
    prefixes = {"linalg": "colossal_mpi/", "layers": "colossal_mpi/", "apps": "colossal_mpi/", "colossal_mpi": ""}
    parts = {name: name.partition("/")[0] for name in tracked}
    assert files == {prefixes[part] + name for name, part in parts.items() if part in prefixes}
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "colossal-mpi = colossal_mpi.apps.cli:main" in entry_points.read_text()
    check = f"import sys; sys.path.insert(0, {str(site)!r}); sys.dont_write_bytecode = True\n{CHECK}"
    assert run(sys.executable, "-I", "-c", check, cwd=site.parent).split() == [str(site / "colossal_mpi"), "128"]


def test_a_wheel_from_a_zip_is_complete(tmp_path, archive, tracked):
    require_complete(installed(tmp_path, archive), tracked)


def test_a_wheel_from_the_sdist_is_complete(tmp_path, sdist, tracked):
    require_complete(installed(tmp_path, sdist), tracked)


def test_an_installation_from_git_is_complete(tmp_path, repository, tracked):
    run(*PIP, "install", *BUILD, "--no-compile", "--target", str(tmp_path / "site"), f"git+file://{repository}")
    require_complete(tmp_path / "site", tracked)


def test_the_sdist_holds_tests_and_documentation(sdist, tracked):
    with tarfile.open(sdist) as packed:
        names = {member.name.partition("/")[2] for member in packed if member.isfile()}
    assert tracked - names == {".gitignore"}
    assert {name for name in names - tracked if not name.startswith("colossal_mpi.egg-info/")} == {
        "PKG-INFO",
        "setup.cfg",
    }


@pytest.mark.parametrize("lost", ["linalg/__init__.py", "apps/configs/*.toml"])
def test_an_incomplete_source_tree_is_refused(tmp_path, archive, lost):
    with zipfile.ZipFile(archive) as unpacked:
        unpacked.extractall(tmp_path)
    for path in tmp_path.glob(lost):
        path.unlink()
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"this source tree is incomplete, it lacks {lost}" in done.stderr
