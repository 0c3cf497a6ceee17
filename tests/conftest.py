"""Options and the selection of tests: one case of each test on some large grids, or with ``--all`` every case.

A test on six ranks or more takes far longer than one on four where ranks share cores. By default a test function
therefore runs on the first three of its grids of that size, one case on each, another one on each, and all its cases
on the smaller grids. A test marked ``every_grid`` runs on all of them: so do the compatible pairs of parallel modes,
which are the crosses of this suite. Tests marked ``long`` do not run. Tests that are named on the command line run as
they are named.
"""

import os
from collections import defaultdict

# before NumPy is loaded; the ranks of a job have one thread each, and so do programs that tests start
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from colossal_mpi.testing.runner import rank_count
from tests.generated import EXAMPLES

pytest_plugins = ["colossal_mpi.testing.plugin"]
LARGE = 6
"""Number of ranks from which on a test function runs one case on a grid."""
_GRIDS = 3
"""Number of such grids on which it runs."""


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run every case on grids of six ranks and more, too")


def pytest_configure(config):
    if config.option.all:
        os.environ.setdefault(EXAMPLES, "1000")  # the ranks inherit it
    config.addinivalue_line("markers", "every_grid: run on every grid, of any number of ranks")
    config.addinivalue_line("markers", "long: run with --all only; another test proves nearly the same in less time")


def pytest_collection_modifyitems(config, items):
    is_rank = not config.pluginmanager.has_plugin("colossal-mpi-runner")  # a rank runs what its parent has chosen
    if is_rank or config.option.all or any("::" in argument for argument in config.args):
        return
    chosen = set(_chosen(items))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _chosen(items):
    """Yield the tests to run: on the first large grids of a function one case each, the k-th case on the k-th grid."""
    cases = defaultdict(lambda: defaultdict(list))
    for item in items:
        if item.get_closest_marker("long"):
            continue
        if rank_count(item) < LARGE:
            yield item
        else:
            grid = getattr(item, "callspec", None) and item.callspec.params.get("grid")
            cases[item.path, item.originalname][rank_count(item), str(grid)].append(item)
    for grids in cases.values():
        for k, alike in enumerate(grids.values()):
            if k < _GRIDS or alike[0].get_closest_marker("every_grid"):
                yield alike[k % len(alike)]
