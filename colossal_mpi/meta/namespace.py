"""The array API on meta arrays: each function returns the shape and the dtype that its result would have.

`Grid.xp` of a meta grid is this module, so that layers and ``linalg`` run on it unchanged. Names and arguments are the
standard's (https://data-apis.org/array-api).
"""

from __future__ import annotations

import builtins
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import (
    bool_ as bool,
)
from numpy import (
    complex64,
    complex128,
    finfo,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)
from numpy.typing import DTypeLike

from colossal_mpi.meta.array import MetaArray, elementwise
from colossal_mpi.meta.array import empty as _empty
from colossal_mpi.meta.array import result as _result

__all__ = [
    "bool",
    "complex64",
    "complex128",
    "finfo",
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]

Shape = int | Sequence[int]


def _tuple(shape: Shape) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def empty(shape: Shape, *, dtype: DTypeLike | None = None, device: object = None) -> MetaArray:
    return _empty(_tuple(shape), dtype or float64)


def zeros(shape: Shape, *, dtype: DTypeLike | None = None, device: object = None) -> MetaArray:
    return _result(_tuple(shape), dtype or float64)


ones = zeros


def full(shape: Shape, fill_value: Any, *, dtype: DTypeLike | None = None, device: object = None) -> MetaArray:
    return _result(_tuple(shape), dtype or np.result_type(fill_value))


def empty_like(x: MetaArray, *, dtype: DTypeLike | None = None, device: object = None) -> MetaArray:
    return _empty(x.shape, dtype or x.dtype)


def zeros_like(x: MetaArray, *, dtype: DTypeLike | None = None, device: object = None) -> MetaArray:
    return _result(x.shape, dtype or x.dtype)


ones_like = zeros_like


def full_like(x: MetaArray, fill_value: Any, *, dtype: DTypeLike | None = None, device: object = None) -> MetaArray:
    return _result(x.shape, dtype or x.dtype)


def arange(
    start: float, stop: float | None = None, step: float = 1, *, dtype: DTypeLike | None = None, device: object = None
) -> MetaArray:
    first, last = (0, start) if stop is None else (start, stop)
    return _empty((builtins.max(0, math.ceil((last - first) / step)),), dtype or np.result_type(first, last, step))


def asarray(
    value: Any, /, *, dtype: DTypeLike | None = None, copy: builtins.bool | None = None, device: object = None
) -> MetaArray:
    if isinstance(value, MetaArray):
        return astype(value, dtype or value.dtype, copy=builtins.bool(copy))
    host = np.asarray(value)
    return _empty(host.shape, dtype or host.dtype)


def astype(x: MetaArray, dtype: DTypeLike, /, *, copy: builtins.bool = True, device: object = None) -> MetaArray:
    return x if not copy and x.dtype == np.dtype(dtype) else _result(x.shape, dtype, x)


def reshape(x: MetaArray, shape: Shape, /, *, copy: builtins.bool | None = None) -> MetaArray:
    return x.reshape(shape, copy)


def permute_dims(x: MetaArray, axes: Sequence[int]) -> MetaArray:
    return x.transpose(axes)


def matrix_transpose(x: MetaArray) -> MetaArray:
    *rest, row, column = range(x.ndim)
    return x.transpose((*rest, column, row))


def broadcast_to(x: MetaArray, shape: Sequence[int]) -> MetaArray:
    return x.broadcast(shape)


def broadcast_arrays(*arrays: MetaArray) -> list[MetaArray]:
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    return [x.broadcast(shape) for x in arrays]


def stack(arrays: Sequence[MetaArray], *, axis: int = 0) -> MetaArray:
    shape = list(arrays[0].shape)
    shape.insert(axis % (len(shape) + 1), len(arrays))
    return _result(shape, np.result_type(*(x.dtype for x in arrays)), *arrays)


def concat(arrays: Sequence[MetaArray], *, axis: int = 0) -> MetaArray:
    shape = list(arrays[0].shape)
    shape[axis] = builtins.sum(x.shape[axis] for x in arrays)
    return _result(shape, np.result_type(*(x.dtype for x in arrays)), *arrays)


def take(x: MetaArray, indices: MetaArray, *, axis: int = 0) -> MetaArray:
    axis %= x.ndim
    return _result((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype, indices)


def take_along_axis(x: MetaArray, indices: MetaArray, *, axis: int = -1) -> MetaArray:
    return _result(indices.shape, x.dtype, indices)


def where(condition: MetaArray, x: Any, y: Any, /) -> MetaArray:
    return elementwise(condition, x, y, dtype=elementwise(*(z for z in (x, y) if isinstance(z, MetaArray))).dtype)


def clip(x: MetaArray, min: Any = None, max: Any = None) -> MetaArray:
    return elementwise(*(z for z in (x, min, max) if z is not None))


def searchsorted(x: MetaArray, values: MetaArray, **_: object) -> MetaArray:
    return _empty(values.shape, int64)


def argsort(x: MetaArray, /, **_: object) -> MetaArray:
    return _result(x.shape, int64, x)


class Unique(NamedTuple):
    """The result of `unique_inverse`, with as many distinct values as there can be."""

    values: MetaArray
    inverse_indices: MetaArray


def unique_inverse(x: MetaArray) -> Unique:
    return Unique(_empty((x.size,), x.dtype), _empty(x.shape, int64))


def matmul(a: MetaArray, b: MetaArray, /) -> MetaArray:
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows, columns = a.shape[-2:-1], b.shape[-1:] if b.ndim > 1 else ()
    return _empty((*batch, *rows, *columns), np.result_type(a.dtype, b.dtype))


def vecdot(a: MetaArray, b: MetaArray, /, *, axis: int = -1) -> MetaArray:
    return _reduced(a, axis, False, np.result_type(a.dtype, b.dtype))


def _reduced(x: MetaArray, axis: Shape | None, keepdims: builtins.bool, dtype: DTypeLike) -> MetaArray:
    dims = {d % x.ndim for d in (range(x.ndim) if axis is None else _tuple(axis))} if x.ndim else set()
    kept = (1 if d in dims else n for d, n in enumerate(x.shape) if keepdims or d not in dims)
    return _result(tuple(kept), dtype, x)


def _reduction(dtype_of: Callable[[np.dtype], DTypeLike]) -> Callable[..., MetaArray]:
    def reduction(
        x: MetaArray, /, *, axis: Shape | None = None, dtype: DTypeLike | None = None, keepdims: builtins.bool = False
    ) -> MetaArray:
        return _reduced(x, axis, keepdims, dtype or dtype_of(x.dtype))

    return reduction


sum = prod = _reduction(lambda dtype: np.dtype(int64) if dtype.kind in "ib" else dtype)
max = min = mean = _reduction(lambda dtype: dtype)
any = all = _reduction(lambda dtype: bool)
argmax = argmin = _reduction(lambda dtype: int64)


def _same(*values: Any) -> MetaArray:
    return elementwise(*values)


exp = log = log1p = sqrt = tanh = sin = cos = conj = maximum = minimum = subtract = add = multiply = divide = _same
square = sign = _same


def abs(x: MetaArray, /) -> MetaArray:
    return elementwise(x, dtype=float64 if x.dtype == complex128 else float32 if x.dtype == complex64 else x.dtype)


def isfinite(x: MetaArray, /) -> MetaArray:
    return elementwise(x, dtype=bool)


isnan = isinf = isfinite


MetaArray.namespace = sys.modules[__name__]
