"""The pytest plugin: markers, parameters and fixtures of multi-rank tests, in the parent and in its ranks.

pytest loads it in the parent, where it registers `colossal_mpi.testing.runner.Runner`, and in each rank, which
`colossal_mpi.testing.worker` has marked as such by a store.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

from colossal_mpi.platform import backend

from .runner import Runner, group, rank_count
from .store import STORE, Store

MARKERS = [
    "ranks(n): run on n ranks; a list parametrizes the test",
    "grids(axes, ...): parametrize the fixture grid; the sizes of the axes multiply to the number of ranks",
    "deadline(seconds): limit of this multi-rank test",
    "prepare(func): func(path) writes reference files once per session, for the fixture prepared",
    "smoke: one of the few tests that every MPI library has to pass",
]
_grids: dict[tuple[tuple[str, int], ...], Any] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the ini option ``mpi_deadline`` and the option ``--device``."""
    parser.addini("mpi_deadline", "seconds that a multi-rank test may take", default="60")
    parser.addoption(
        "--device",
        choices=["cpu", "fake", "cuda"],
        default="cpu",
        help="where grids make their blocks; other than cpu, only the tests that have a grid are run",
    )
    parser.addoption("--ranks", type=int, default=None, help="run only the tests of that many ranks")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device, register the markers and, in the parent, the runner of multi-rank tests."""
    if config.option.device == "fake":
        from . import fake

        fake.install()
    backend.prefer(config.option.device)
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # mark.prepare(func) alone would mark func instead of returning a decorator
    pytest.mark.prepare = pytest.mark.__getattr__("prepare").with_args  # type: ignore[attr-defined]
    if STORE in config.stash:
        return  # this is a rank: the worker has put its store there
    root = Path(tempfile.mkdtemp(prefix="colossal-mpi-"))
    config.stash[STORE] = Store(root / "prepared", root / "shared", writes=True)
    config.pluginmanager.register(Runner(config, root), "colossal-mpi-runner")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Turn the markers ``grids`` and ``ranks([...])`` into parameters."""
    grids = metafunc.definition.get_closest_marker("grids")
    ranks = metafunc.definition.get_closest_marker("ranks")
    if grids and ranks:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: grids says how many ranks, drop ranks")
    if grids:
        metafunc.parametrize("grid", grids.args, indirect=True, ids=_grid_id)
    elif ranks and not isinstance(ranks.args[0], int):
        if "ranks" not in metafunc.fixturenames:
            metafunc.fixturenames.append("ranks")  # parametrize refuses a fixture that the test does not use
        metafunc.parametrize("ranks", ranks.args[0], indirect=True, ids=_ranks_id)


def _grid_id(axes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in axes.items()) or _ranks_id(1)


def _ranks_id(n: int) -> str:
    return f"{n}rank" if n == 1 else f"{n}ranks"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that the options exclude; put multi-rank tests of one directory and number of ranks together."""
    wanted = [item for item in items if _is_wanted(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
    items[:] = wanted
    places: dict[tuple[Path, int], int] = {}
    order = {
        item: places.setdefault(group(item), place) if rank_count(item) > 1 else place
        for place, item in enumerate(items)
    }
    items.sort(key=order.__getitem__)


def _is_wanted(config: pytest.Config, item: pytest.Item) -> bool:
    on_device = config.option.device == "cpu" or "grid" in getattr(item, "fixturenames", ())
    return on_device and config.option.ranks in (None, rank_count(item))


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> int:
    """Return the number of ranks of the test."""
    return rank_count(request.node)


@pytest.fixture
def grid(request: pytest.FixtureRequest) -> Any:
    """Return the ``colossal_mpi.Grid`` of the test. Each grid is made once, because communicators are limited."""
    if not hasattr(request, "param"):
        raise pytest.UsageError("the fixture grid needs @pytest.mark.grids({axis: size, ...}, ...)")
    from colossal_mpi.grid import Grid

    axes = tuple(request.param.items())
    if axes not in _grids:
        _grids[axes] = Grid(**request.param)
    assert math.prod(request.param.values()) == rank_count(request.node)
    return _grids[axes]


@pytest.fixture
def prepared(request: pytest.FixtureRequest) -> Path:
    """Return the directory that the test's ``prepare`` function has filled."""
    path = request.config.stash[STORE].prepare(request.node)
    if path is None:
        raise pytest.UsageError("the fixture prepared needs @pytest.mark.prepare(func)")
    return path


@pytest.fixture
def shared_path(request: pytest.FixtureRequest) -> Path:
    """Return an empty directory, the same one on all ranks."""
    return request.config.stash[STORE].shared(request.node)
