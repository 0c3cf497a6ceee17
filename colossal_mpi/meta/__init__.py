"""Meta arrays: a shape, a dtype and strides without memory, so that a program that runs on them is a dry run.

The package has the arrays and their tally, their array namespace, and a communicator whose other ranks do not exist.
`Grid.meta` makes grids of such arrays, and dry runs (``layers.analysis``, ``apps.planning``) run the real layers on
them. It calls nothing but ``platform``, where it registers the device ``meta``.
"""

from colossal_mpi.meta import namespace
from colossal_mpi.meta.array import Memory, MetaArray, Tally, empty, on_host, result, tally, work

__all__ = [
    "Memory",
    "MetaArray",
    "Tally",
    "empty",
    "namespace",
    "on_host",
    "result",
    "tally",
    "work",
]
