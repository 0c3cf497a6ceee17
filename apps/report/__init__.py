"""``colossal-mpi report``: pictures and one page of a run, or of several side by side."""

from colossal_mpi.apps.report.write import write

__all__ = ["write"]
