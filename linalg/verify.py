"""The check of a product without a reference: thin products with random vectors find any wrong block.

``matmul(..., verify=True)`` and the tests call it. It calls `contract` on the operands and on the result, where they
are.

References
----------
Freivalds: Probabilistic machines can use less running time, 1977.
"""

from __future__ import annotations

import numpy as np

from colossal_mpi import random
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import VerificationError
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.contraction.subscripts import layout_map, parse
from colossal_mpi.platform import backend

COLUMNS, FACTOR = 10, 20
"""The number of random vectors, and the greatest difference that passes, in units of rounding.

Correct products of zero-mean matrices have 4 to 11 units.
"""


class Check:
    """The product of ``C = alpha op(A) op(B) + beta C0`` with random vectors of -1 and 1, computed before C is written.

    Parameters
    ----------
    subscripts : str
        The product, as `contract` takes it.
    a, b : DistArray
        The operands in any layout.
    alpha, beta : number
        Factors, as in `contract`.
    out : DistArray or Layout, optional
        The array C0 that beta multiplies, before it is overwritten.
    conj : {"", "a", "b", "ab"}
        The operands that enter as their complex conjugates.

    Notes
    -----
    ``Y = alpha op(A) (op(B) X) + beta C0 X`` is computed with X of 10 columns. A wrong C passes with a probability of
    at most 2**-10.

    **Communication:** two thin products, and a third if beta is not 0: each an allreduce of O(m), O(n) or O(k) words.
    """

    def __init__(
        self,
        subscripts: str,
        a: DistArray,
        b: DistArray,
        alpha: complex = 1,
        beta: complex = 0,
        out: DistArray | Layout | None = None,
        conj: str = "",
    ) -> None:
        sub = parse(subscripts)
        r = next(chr(x) for x in range(ord("A"), ord("Z")) if chr(x) not in sub.a + sub.b)
        thin, shared = sub.n + r, "".join(x for x in sub.b if x not in sub.n) + r
        self._spec = f"{sub.c},{thin}->{sub.batch}{sub.m}{r}"
        extents = dict(zip(sub.b, b.shape, strict=True)) | {r: COLUMNS}
        self._x = _signs([extents[x] for x in thin], b)
        # B[K, N] . X[N, R] -> BX[K, R];  A[M, K] . BX[K, R] -> Y[M, R]
        bx = _thin(f"{sub.b},{thin}->{shared}", b, self._x, "a" if "b" in conj else "")
        self._y = alpha * _thin(f"{sub.a},{shared}->{sub.batch}{sub.m}{r}", a, bx, "a" if "a" in conj else "")
        if beta != 0 and isinstance(out, DistArray):
            # C0[M, N] . X[N, R] -> Y[M, R]
            self._y = self._y + beta * _thin(self._spec, out, self._x)

    def passes(self, c: DistArray) -> float:
        """Return ``||C X - Y|| / ||Y||`` in the Frobenius norm, the same on every rank.

        Parameters
        ----------
        c : DistArray
            The product to be checked.

        Returns
        -------
        float
            The relative difference.

        Raises
        ------
        VerificationError
            If the difference is above 20 units of rounding, not a number, or, for integers, above zero.
        """
        # C[M, N] . X[N, R] -> CX[M, R]
        difference, size = (_thin(self._spec, c, self._x) - self._y).norm(), self._y.norm()
        error = difference / size if size else difference
        allowed = FACTOR * _rounding(backend.numpy_dtype(c.dtype))
        if not error <= allowed:
            raise VerificationError(
                f"the product {c} is wrong: C X differs from A (B X) by {error:.2e} of its norm, and {allowed:.2e} is "
                f"allowed, for {COLUMNS} random vectors X"
            )
        return error


def _rounding(dtype: np.dtype) -> float:
    """Return the unit of rounding of a dtype; 0 for integers, whose products are exact or wrap around equally."""
    if backend.is_half(dtype):
        return 2.0**-10 if dtype.name == "float16" else 2.0**-7
    return float(np.finfo(dtype).eps) if dtype.kind in "fc" else 0.0


def _wide(a: DistArray) -> DistArray:
    """Return an array of 16-bit floats as float32, so that thin products neither overflow nor round to 16 bits."""
    return a.astype("float32") if backend.is_half(backend.numpy_dtype(a.dtype)) else a


def _signs(shape: list[int], beside: DistArray) -> DistArray:
    grid = beside.grid
    half = random.uniform(shape, grid, Layout(*[None] * len(shape)), seed=1, stream="linalg.verify")
    xp = backend.namespace(half.local)
    return half.like(xp.where(half.local < 0.5, -1.0, 1.0)).astype(_wide(beside).dtype)


def _thin(subscripts: str, a: DistArray, x: DistArray, conj: str = "") -> DistArray:
    """Return a thin product, computed where the blocks of `a` are, and replicated."""
    sub = parse(subscripts)
    whole = _wide(a.reduced())
    # A[M_row, K_col] . X[K_col, R] -> Y[M_row, R] {U_col} -> Y[M, R]
    return contract(subscripts, whole, x, layout_map(sub.a, whole.layout), Layout(*[None] * len(sub.c)), conj=conj)
