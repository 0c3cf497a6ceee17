"""Benchmarks of the library beside other libraries: one module for each command ``colossal-mpi bench NAME``.

The command line imports the class of a benchmark when it is called. `harness` lets competitors take turns on ranks that
it starts; the competitors call linalg, layers and checkpoint, and NumPy, ScaLAPACK and PyTorch.
"""
