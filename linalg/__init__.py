"""Dense linear algebra on distributed arrays: numpy.linalg for arrays that live on many ranks."""

from colossal_mpi.distarray import register_matmul
from colossal_mpi.hdf5 import load, save
from colossal_mpi.linalg.auto import Machine, calibrate, explain, options
from colossal_mpi.linalg.bounds import lower_bound, memory_bound
from colossal_mpi.linalg.contract import contract
from colossal_mpi.linalg.cost import price
from colossal_mpi.linalg.grids import best_grid
from colossal_mpi.linalg.lstsq import lstsq
from colossal_mpi.linalg.matmul import ALGORITHMS, matmul, preset
from colossal_mpi.linalg.newton_schulz import newton_schulz
from colossal_mpi.linalg.norms import diagonal, dot, matvec, norm, trace, transpose, tril, triu
from colossal_mpi.linalg.qr import QR, qr
from colossal_mpi.linalg.subscripts import adjoints
from colossal_mpi.linalg.symmetric import gram, herk, syrk

register_matmul(matmul)

__all__ = [
    "ALGORITHMS",
    "QR",
    "Machine",
    "adjoints",
    "best_grid",
    "calibrate",
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
