"""The machine under one process: array libraries, BLAS, memory that the ranks of a node share, CUDA-aware MPI.

Grids and arrays ask this package where blocks live and how two blocks are multiplied; ``linalg`` and ``layers`` compute
with its functions. It knows neither grids nor layouts. It calls NumPy, CuPy and the BLAS libraries that are loaded, and
the probe of CUDA-awareness calls MPI.

Modules
-------
backend
    Blocks of all array libraries: namespaces, devices, copies between host and device.
blas
    The local matrix product ``c = alpha op(a) op(b) + beta c``.
shared_memory
    Memory of this process that the other ranks of its node can read.
cuda_aware
    The decision whether MPI may be given GPU memory.
"""

from colossal_mpi.platform import backend, blas, cuda_aware, shared_memory
from colossal_mpi.platform.backend import Block as Block

__all__ = ["backend", "blas", "cuda_aware", "shared_memory"]
