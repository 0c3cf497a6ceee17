"""The one distributed matrix product, `contract`, for every map of grid axes to the letters of a two-operand einsum.

``linalg.matmul``, the factorizations and every layer call `contract`; ``linalg.model`` prices it. It plans from which
ranks the panels of each operand come, multiplies them by the local gemm of ``platform.blas``, and moves panels and
partial sums by ``comm`` and ``redistribution``.
"""

from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.contraction.subscripts import (
    Subscripts,
    adjoints,
    extents_of,
    layout_map,
    map_layout,
    parse,
)

__all__ = ["Subscripts", "adjoints", "contract", "extents_of", "layout_map", "map_layout", "parse"]
