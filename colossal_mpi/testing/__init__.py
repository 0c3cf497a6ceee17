"""Run the multi-rank tests of a plain ``pytest``.

Loaded by ``pytest_plugins = ["colossal_mpi.testing.plugin"]`` in the top ``conftest.py``.  All tests of one
directory on one number of ranks share one ``mpiexec``; the ranks' reports become one report per test.

``--device=fake`` makes the grids of tests on a pretended device, ``--device=cuda`` on GPUs.

Markers
-------
ranks(n) or ranks([n, ...])
    Run the test on n ranks; a list parametrizes it (``test_x[4ranks]``).
grids({"row": 2, "col": 2}, ...)
    Parametrize the fixture ``grid`` (``test_x[row2-col2]``), one rank per cell.
deadline(seconds)
    Limit of one multi-rank test; the ini option ``mpi_deadline`` holds the default.
prepare(func)
    ``func(path)`` writes reference files in the parent, once per session; see the fixture ``prepared``.
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
plugin : markers, parameters and fixtures, on both sides
runner : parent; runs an item and reports it
watch : parent; when to give up waiting
merge : parent; one report of many
job : parent; one ``mpiexec`` and its files
ranklog : parent; what one rank has written
worker : rank; runs pytest in process
fake, fake_array : a device without a GPU, whose blocks refuse to reach MPI or NumPy raw
store : the directories that both sides know
"""
