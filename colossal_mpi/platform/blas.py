"""The local matrix product, added into an existing array: ``c = alpha op(a) op(b) + beta c``.

``linalg`` multiplies all blocks with `gemm` and `product`. NumPy's ``matmul`` cannot add to its result, and a separate
addition costs a temporary and three passes through memory. `gemm` therefore calls the gemm of the BLAS library that
NumPy has loaded. A block of another library goes to the gemm of its device, which is cuBLAS's for CuPy. If its strides
or its dtype do not fit a gemm, a block goes through ``matmul`` of its own library.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array

from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

_LETTERS = {"float32": "s", "float64": "d", "complex64": "c", "complex128": "z"}
_ROW_MAJOR, _COLUMN_MAJOR = 101, 102
_PLAIN, _TRANSPOSED, _ADJOINT, _CONJUGATE = 111, 112, 113, 114


def gemm(
    a: Block, b: Block, c: Block, alpha: complex = 1, beta: complex = 0, conj: tuple[bool, bool] = (False, False)
) -> None:
    """Compute ``c = alpha op(a) op(b) + beta c`` in place.

    Parameters
    ----------
    a : Block
        A matrix ``[m, k]``.
    b : Block
        A matrix ``[k, n]`` of the same library.
    c : Block
        A matrix ``[m, n]`` of the same library, with any strides. If its dtype differs, the sum is made in it.
    alpha, beta : complex
        The factors. If beta is 0, the old values of c are not read, so that NaN among them does no harm.
    conj : (bool, bool)
        Whether op is the complex conjugate, for a and for b.
    """
    if 0 in c.shape:
        return
    conj = conj if backend.numpy_dtype(c.dtype).kind == "c" else (False, False)
    fits = a.shape[1] and a.dtype == b.dtype == c.dtype
    if fits and type(c) is np.ndarray and _cblas(a, b, c, alpha, beta, conj):
        return
    device = backend.device_of(c)
    if fits and device is not None and device.gemm(a, b, c, alpha, beta, conj):
        return
    blend(c, product(a, b, c.dtype, conj), alpha, beta)


def product(a: Block, b: Block, dtype: Any, conj: tuple[bool, bool] = (False, False)) -> Block:
    """Return ``op(a) op(b)`` for stacks of matrices, in a new array.

    Parameters
    ----------
    a, b : Block
        Stacks of matrices ``[..., m, k]`` and ``[..., k, n]`` of one library and dtype.
    dtype : dtype
        The dtype of the result. Products of 16-bit floats are summed in float32: cuBLAS does so by itself, and operands
        of other libraries are converted.
    conj : (bool, bool)
        Whether op is the complex conjugate, for a and for b.

    Returns
    -------
    Block
        The products, ``[..., m, n]``.
    """
    xp = backend.namespace(a, b)
    if backend.numpy_dtype(dtype) != backend.numpy_dtype(a.dtype) and not is_cupy_array(a):
        a, b = xp.astype(a, dtype), xp.astype(b, dtype)
    if backend.numpy_dtype(dtype).kind == "c":
        a, b = (xp.conj(x) if flip else x for x, flip in zip((a, b), conj, strict=True))
    device = backend.device_of(a)
    return xp.matmul(a, b) if device is None else device.matmul(a, b)


def scale(c: Block, beta: complex) -> None:
    """Compute ``c = beta c`` in place; if beta is 0, the old values of c are not read."""
    c[...] = backend.zeros_like(c, c.shape) if beta == 0 else beta * c


def blend(c: Block, product: Block, alpha: complex = 1, beta: complex = 0) -> None:
    """Compute ``c = alpha product + beta c`` in place; if beta is 0, the old values of c are not read."""
    scaled = product if alpha == 1 else alpha * product
    if beta != 0:
        scaled = scaled + (c if beta == 1 else beta * c)
    xp = backend.namespace(c)
    c[...] = scaled if scaled.dtype == c.dtype else xp.astype(scaled, c.dtype)


def _cblas(a: np.ndarray, b: np.ndarray, c: np.ndarray, alpha: complex, beta: complex, conj: tuple[bool, bool]) -> bool:
    """Compute the product with BLAS and return True; return False if BLAS does not take these arrays."""
    routine = _routine(c.dtype)
    order = _order(c)
    if order is None or not c.dtype.isnative or (routine is None and c.dtype.kind in "fc"):
        return False
    if alpha == 1 and beta == 0 and not any(conj):
        np.matmul(a, b, out=c)
        return True
    if routine is None:
        return False
    ops = [_operand(x, order, flip, routine.conjugates) for x, flip in zip((a, b), conj, strict=True)]
    (a, op_a), (b, op_b) = ops
    (m, k), n = a.shape, b.shape[1]
    leads = [_lead(x, order if op in (_PLAIN, _CONJUGATE) else _other(order)) for x, op in ((a, op_a), (b, op_b))]
    scalars = [routine.scalar(x) for x in (alpha, beta)]
    data = [x.__array_interface__["data"][0] for x in (a, b, c)]
    routine.call(
        order,
        op_a,
        op_b,
        m,
        n,
        k,
        scalars[0],
        data[0],
        leads[0],
        data[1],
        leads[1],
        scalars[1],
        data[2],
        _lead(c, order),
    )
    return True


def _other(order: int) -> int:
    return _ROW_MAJOR + _COLUMN_MAJOR - order


def _order(x: np.ndarray) -> int | None:
    """Return the order in which BLAS can read a matrix, None if it can read it in neither."""
    if _lead(x, _ROW_MAJOR):
        return _ROW_MAJOR
    return _COLUMN_MAJOR if _lead(x, _COLUMN_MAJOR) else None


def _lead(x: np.ndarray, order: int) -> int:
    """Return the leading dim of a matrix in an order, 0 if BLAS cannot read it in that order."""
    (rows, columns), (down, right) = (x.shape, x.strides) if order == _ROW_MAJOR else (x.shape[::-1], x.strides[::-1])
    size = x.itemsize
    if columns > 1 and right != size:
        return 0
    if rows <= 1:
        return int(max(1, columns))
    return int(down // size) if down % size == 0 and down >= max(1, columns) * size else 0


def _operand(x: np.ndarray, order: int, flip: bool, conjugates: bool) -> tuple[np.ndarray, int]:
    """Return a matrix that BLAS can read, copied only if necessary, and the operation that BLAS applies to it."""
    found = _order(x)
    if found is None or not x.flags.aligned:
        x, found = np.array(x, order="C"), _ROW_MAJOR
    plain = bool(_lead(x, order))
    if flip and plain and not conjugates:
        x, flip = x.conj(), False
        plain = bool(_lead(x, order))
    return x, (_CONJUGATE if flip else _PLAIN) if plain else (_ADJOINT if flip else _TRANSPOSED)


class _Routine:
    """A gemm of the BLAS library that NumPy has loaded, for one dtype."""

    def __init__(self, function: Any, index: Any, dtype: np.dtype, conjugates: bool) -> None:
        self.conjugates = conjugates
        """True if the library can conjugate without transposing, which is an extension of OpenBLAS."""
        real = {4: ctypes.c_float, 8: ctypes.c_double}.get(dtype.itemsize if dtype.kind == "f" else 0)
        self._dtype, value = dtype, real or ctypes.c_void_p
        function.argtypes = [ctypes.c_int] * 3 + [index] * 3
        function.argtypes += [value, *[ctypes.c_void_p, index] * 2, value, ctypes.c_void_p, index]
        function.restype = None
        self.call = function

    def scalar(self, x: complex) -> Any:
        """Return alpha or beta as BLAS takes it: a real number by value, a complex one by address."""
        if self._dtype.kind == "f":
            return float(np.real(x))
        number = np.array([x], self._dtype)
        return number.ctypes.data_as(ctypes.c_void_p)  # keeps the number alive


@functools.cache
def _routine(dtype: np.dtype) -> _Routine | None:
    """Return the gemm for a dtype, None if NumPy's BLAS library is not found."""
    letter = _LETTERS.get(dtype.name)
    for library, kind in _libraries() if letter else ():
        for pattern, index in (
            ("scipy_cblas_{}gemm64_", ctypes.c_int64),  # OpenBLAS of NumPy's wheels
            ("cblas_{}gemm64_", ctypes.c_int64),
            ("cblas_{}gemm", ctypes.c_int),
        ):
            function = getattr(library, pattern.format(letter), None)
            if function is not None:
                return _Routine(function, index, dtype, kind == "openblas")
    return None


@functools.cache
def _libraries() -> tuple[tuple[ctypes.CDLL, str], ...]:
    """Return the BLAS libraries of this process, NumPy's own first."""
    from threadpoolctl import threadpool_info

    found = [info for info in threadpool_info() if info["user_api"] == "blas"]
    found.sort(key=lambda info: "numpy" not in info["filepath"])
    return tuple((ctypes.CDLL(info["filepath"]), info["internal_api"]) for info in found)
