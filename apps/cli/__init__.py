"""The command line ``colossal-mpi``: one class in one file for each command.

The console script and ``python -m colossal_mpi.apps.cli`` call `main`, and nothing else in the library imports this
package. A command checks its options, starts ranks where it needs them, and calls the package of ``apps`` that does the
work.
"""

from colossal_mpi.apps.cli.program import main

__all__ = ["main"]
