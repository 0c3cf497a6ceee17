"""Dense linear algebra on distributed arrays: numpy.linalg for arrays that live on many ranks."""

from colossal_mpi.checkpoint.hdf5 import load, save
from colossal_mpi.distarray import register_matmul
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.contraction.subscripts import adjoints
from colossal_mpi.linalg.factor.lstsq import lstsq
from colossal_mpi.linalg.factor.polar import newton_schulz
from colossal_mpi.linalg.factor.qr import QR, qr
from colossal_mpi.linalg.factor.syrk import gram, herk, syrk
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
