"""Map the packages to the four top-level folders; everything else about the project is in pyproject.toml.

The code of ``colossal_mpi.linalg`` lies in ``linalg/``, and likewise for ``layers`` and ``apps``. The repository has
symlinks ``colossal_mpi/{linalg,layers,apps}`` for work in a checkout. A zip archive or a checkout on Windows turns them
into text files of nine bytes, and the sdist leaves them out, so no build may rely on them.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {f"colossal_mpi.{name}": name for name in ("linalg", "layers", "apps")}
REQUIRED = (
    "colossal_mpi/__init__.py",
    "colossal_mpi/py.typed",
    *(f"{folder}/__init__.py" for folder in FOLDERS.values()),
    "apps/configs/*.toml",
    "apps/report/*.html",
)


def require_complete() -> None:
    """Refuse to build from a source tree that lacks one of the four folders or a data file."""
    missing = [pattern for pattern in REQUIRED if not any(ROOT.glob(pattern))]
    if missing:
        raise SystemExit(
            f"colossal_mpi: this source tree is incomplete, it lacks {', '.join(missing)}: unpack it again"
        )


def packages() -> list[str]:
    """Return the names of all packages, each once, whether or not the symlinks exist."""
    names = {"colossal_mpi", *find_packages(include=["colossal_mpi.*"])}
    for package, folder in FOLDERS.items():
        names |= {package, *(f"{package}.{name}" for name in find_packages(folder))}
    return sorted(names)


require_complete()
setup(packages=packages(), package_dir=FOLDERS)
