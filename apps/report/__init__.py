"""``colossal-mpi report``: PNG pictures and one HTML page of a run, or of several runs on the same axes.

The command, and training at its end, call `write`. `runs` reads the files of the runs, `curves`, `bars` and `timeline`
draw them in the look of `style`, `tables` has the figures, and `page` is the HTML.
"""

from colossal_mpi.apps.report.write import write

__all__ = ["write"]
