"""Meta arrays: a shape, a dtype and strides without memory, so that a program that runs on them is a dry run.

`Grid.meta` makes grids of such arrays, and the predictions of ``layers.analysis`` and ``apps.planning`` run the real
layers on them. The package has an array namespace, a communicator whose other ranks do not exist, and the clock of a
machine model.
"""

from colossal_mpi.meta import namespace
from colossal_mpi.meta.array import Memory, MetaArray, Tally, elsewhere, empty, made, tally, work
from colossal_mpi.meta.machine import Clock, Link, Machine

__all__ = [
    "Clock",
    "Link",
    "Machine",
    "Memory",
    "MetaArray",
    "Tally",
    "elsewhere",
    "empty",
    "made",
    "namespace",
    "tally",
    "work",
]
