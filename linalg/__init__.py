"""Dense linear algebra on distributed arrays, as numpy.linalg is for arrays of one process.

User programs call it, ``A @ B`` calls `matmul`, and the layers call `contract` and its subscripts. It calls `DistArray`
and the collectives of ``comm`` and ``redistribution``.
"""

from colossal_mpi.checkpoint.hdf5 import load, save
from colossal_mpi.distarray import register_matmul
from colossal_mpi.linalg.contraction import adjoints, contract
from colossal_mpi.linalg.factor import QR, gram, herk, lstsq, newton_schulz, qr, syrk
from colossal_mpi.linalg.matmul import ALGORITHMS, matmul, preset
from colossal_mpi.linalg.model import best_grid, explain, lower_bound, memory_bound, options, price
from colossal_mpi.linalg.norms import diagonal, dot, matvec, norm, trace, transpose, tril, triu

register_matmul(matmul)

__all__ = [
    "ALGORITHMS",
    "QR",
    "adjoints",
    "best_grid",
    "contract",
    "diagonal",
    "dot",
    "explain",
    "gram",
    "herk",
    "load",
    "lower_bound",
    "lstsq",
    "matmul",
    "matvec",
    "memory_bound",
    "newton_schulz",
    "norm",
    "options",
    "preset",
    "price",
    "qr",
    "save",
    "syrk",
    "trace",
    "transpose",
    "tril",
    "triu",
]
