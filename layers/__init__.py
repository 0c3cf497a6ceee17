"""Neural-network layers with manual backward passes. A layer exists once; a parallel mode is a choice of layouts."""

from colossal_mpi.layers.layer import Context, Layer, Parameter
from colossal_mpi.layers.parallelism import MODES, Parallelism

__all__ = ["MODES", "Context", "Layer", "Parallelism", "Parameter"]
