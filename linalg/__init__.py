"""Dense linear algebra on distributed arrays: numpy.linalg for arrays that live on many ranks."""

from colossal_mpi.distarray import register_matmul
from colossal_mpi.linalg.contract import adjoints, contract
from colossal_mpi.linalg.cost import best_grid, lower_bound, price
from colossal_mpi.linalg.matmul import ALGORITHMS, matmul, preset

register_matmul(matmul)

__all__ = ["ALGORITHMS", "adjoints", "best_grid", "contract", "lower_bound", "matmul", "preset", "price"]
