"""A pytest plugin that runs multi-rank tests, and a fake device for tests of staging without a GPU.

The top ``conftest.py`` of a project loads the plugin with ``pytest_plugins = ["colossal_mpi.testing.plugin"]``; nothing
else of colossal_mpi imports this package. It calls ``runtime`` to start ``mpiexec`` and ``platform`` to register the
fake device. All tests of one directory on one number of ranks share one ``mpiexec``, and the ranks' reports become
one report for each test.

``--device=fake`` makes the grids of tests on the fake device, ``--device=cuda`` on GPUs.

Markers
-------
ranks(n) or ranks([n, ...])
    Run the test on n ranks; a list parametrizes it (``test_x[4ranks]``).
grids({"row": 2, "col": 2}, ...)
    Parametrize the fixture ``grid`` (``test_x[row2-col2]``), with one rank for each cell.
deadline(seconds)
    The limit of one multi-rank test; the ini option ``mpi_deadline`` holds the default.
prepare(func)
    ``func(path)`` writes reference files in the parent process, once per session; see the fixture ``prepared``.
smoke
    The few tests that every MPI library has to pass.

Fixtures
--------
ranks : int
    The number of ranks of the test.
grid : colossal_mpi.Grid
    The grid of the test, made once per process.
prepared : pathlib.Path
    The directory that the test's ``prepare`` function has filled.
shared_path : pathlib.Path
    An empty directory, the same one on all ranks (``tmp_path`` differs from rank to rank).

Modules
-------
plugin
    Markers, parameters and fixtures, in the parent and in the ranks.
runner
    The plugin of the parent, which runs multi-rank items and reports them.
watch
    The parent's wait for a test, and the decision when to stop it.
merge
    The parent's merging of the ranks' reports into one report.
job
    One ``mpiexec``, which the parent starts, and the files that its ranks write.
worker
    The program of a rank, which runs pytest in process.
store
    The directories that the parent and its ranks share.
fake
    The fake device, whose blocks never reach MPI or NumPy by mistake.
"""

__all__: list[str] = []
