"""Dense linear algebra on distributed arrays: numpy.linalg for arrays that live on many ranks."""

from colossal_mpi.distarray import register_matmul
from colossal_mpi.linalg.auto import Machine, calibrate, explain, options
from colossal_mpi.linalg.bounds import lower_bound, memory_bound
from colossal_mpi.linalg.contract import contract
from colossal_mpi.linalg.cost import price
from colossal_mpi.linalg.grids import best_grid
from colossal_mpi.linalg.matmul import ALGORITHMS, matmul, preset
from colossal_mpi.linalg.norms import diagonal, dot, matvec, norm, trace, tril, triu
from colossal_mpi.linalg.subscripts import adjoints

register_matmul(matmul)

__all__ = [
    "ALGORITHMS",
    "Machine",
    "adjoints",
    "best_grid",
    "calibrate",
    "contract",
    "diagonal",
    "dot",
    "explain",
    "lower_bound",
    "matmul",
    "matvec",
    "memory_bound",
    "norm",
    "options",
    "preset",
    "price",
    "trace",
    "tril",
    "triu",
]
