"""The machine under one process: array libraries, BLAS, memory shared by the ranks of a node, CUDA-aware MPI.

Grids and arrays ask this package where blocks live and how two blocks are multiplied. It knows nothing of grids or of
layouts, and calls only NumPy, CuPy, the BLAS libraries that are loaded, and MPI for the probe of CUDA-awareness.
"""
