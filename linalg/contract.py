"""The one matrix product.

``C[m,n] = sum_k A[m,k] B[k,n]`` is an m x n x k box of work. An algorithm is a map from grid axes to the edges of the
box, together with how the operands are stored: SUMMA, 2.5D, 3D and the 1D products differ in nothing else.

Along an axis mapped to m and k, A is cut; along one mapped to n it is gathered. B likewise. C comes out as partial
sums over the k-axes and is reduce-scattered into its layout. Every word moves once:
summed over ranks, ``mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1)`` words, with P_m the product of the sizes of the axes
mapped to m, if each operand is stored once, cut further along the axes on which it is gathered (innermost).

References
----------
van de Geijn, Watts: SUMMA, 1997. Agarwal et al.: A three-dimensional approach to parallel matrix multiplication, 1995.
Solomonik, Demmel: Communication-optimal parallel 2.5D matrix multiplication, 2011. Al Daas et al.: Tight memory-
independent parallel matrix multiplication communication lower bounds, SPAA 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from colossal_mpi import backend
from colossal_mpi.backend import Block
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, GridError, LayoutError, ShapeError
from colossal_mpi.layout import Layout


@dataclass(frozen=True)
class Subscripts:
    """A parsed two-operand einsum and the kind of each of its letters."""

    a: str
    b: str
    c: str

    @property
    def batch(self) -> str:
        """Letters of both operands and the result."""
        return "".join(x for x in self.c if x in self.a and x in self.b)

    @property
    def m(self) -> str:
        """Letters of `a` and the result."""
        return "".join(x for x in self.a if x in self.c and x not in self.b)

    @property
    def n(self) -> str:
        """Letters of `b` and the result."""
        return "".join(x for x in self.b if x in self.c and x not in self.a)

    @property
    def k(self) -> str:
        """Letters of both operands that are summed."""
        return "".join(x for x in self.a if x in self.b and x not in self.c)

    def __str__(self) -> str:
        return f"{self.a},{self.b}->{self.c}"


@lru_cache(maxsize=1024)
def parse(subscripts: str) -> Subscripts:
    """Return the letters of ``"mk,kn->mn"``.

    Raises
    ------
    ShapeError
        If it is not a product of two operands, repeats a letter within one, or sums a letter of one alone.
    """
    operands, arrow, c = subscripts.replace(" ", "").partition("->")
    a, comma, b = operands.partition(",")
    if not arrow or not comma or "," in b:
        raise ShapeError(f"contract({subscripts!r}): write two operands and a result, as 'mk,kn->mn'")
    for letters in (a, b, c):
        if len(set(letters)) < len(letters) or not all(x.isalpha() for x in letters):
            raise ShapeError(f"contract({subscripts!r}): {letters!r} must be distinct letters, one per dim")
    alone = (set(a) ^ set(b)) - set(c)
    if alone or set(c) - set(a) - set(b):
        raise ShapeError(
            f"contract({subscripts!r}): every letter must stand in two of the three arrays; "
            f"not so {', '.join(sorted(alone | (set(c) - set(a) - set(b))))}"
        )
    return Subscripts(a, b, c)


def extents_of(sub: Subscripts, a: Sequence[int], b: Sequence[int]) -> dict[str, int]:
    """Return the size of each letter of operands of these shapes."""
    return {**dict(zip(sub.a, a, strict=True)), **dict(zip(sub.b, b, strict=True))}


def adjoints(subscripts: str) -> tuple[str, str]:
    """Return the subscripts of the two adjoints, which run on the same map as the product: the box is the same.

    ``dA = contract(first, dC, conj(B), axes)`` and ``dB = contract(second, conj(A), dC, axes)``.

    Examples
    --------
    >>> adjoints("mk,kn->mn")
    ('mn,kn->mk', 'mk,mn->kn')
    """
    sub = parse(subscripts)
    return f"{sub.c},{sub.b}->{sub.a}", f"{sub.a},{sub.c}->{sub.b}"


def map_layout(letters: str, axes: Mapping[str, str], partial: str = "") -> Layout:
    """Return the layout of an array of `letters` that a map asks for: cut along the axes mapped to its letters.

    Axes mapped to letters of `partial` hold partial sums. Several axes on one letter nest in the map's order.
    """
    dims = [[axis for axis, letter in axes.items() if letter == x] for x in letters]
    return Layout(*dims, partial=[axis for axis, letter in axes.items() if letter in partial])


def contract(
    subscripts: str, a: DistArray, b: DistArray, axes: Mapping[str, str], out: Layout | None = None
) -> DistArray:
    """Return the product of two distributed arrays by the algorithm that a map of grid axes describes.

    Parameters
    ----------
    subscripts : str
        A two-operand einsum such as ``"mk,kn->mn"`` or ``"bsk,kn->bsn"``; letters of both operands and the result are
        batch letters.
    a, b : DistArray
        In any layout on one grid, same dtype; redistributed to the map first.
    axes : mapping of str to str
        Grid axis to letter. Axes that are not mapped do the product redundantly.
    out : Layout, optional
        Of the result. By default the result stays as the product leaves it: cut along the m- and n-axes, partial over
        the k-axes.

    Returns
    -------
    DistArray
        The product in layout `out`.

    Raises
    ------
    ShapeError, LayoutError, GridError, DTypeError
        If letters and shapes, the map and the grid, the two grids or the dtypes do not fit.

    Notes
    -----
    **Communication:** one redistribution of each operand to the map and one of the result; see the module for words.
    **Adjoint:** two contracts with the same map, see `adjoints`.
    """
    sub = parse(subscripts)
    _check(sub, a, b, axes)
    left = a.redistribute(map_layout(sub.a, axes))
    right = b.redistribute(map_layout(sub.b, axes))
    extents = extents_of(sub, a.shape, b.shape)
    block = multiply(sub, left.local, right.local)
    product = DistArray(block, [extents[x] for x in sub.c], map_layout(sub.c, axes, sub.k), a.grid)
    return product if out is None else product.redistribute(out)


def _check(sub: Subscripts, a: DistArray, b: DistArray, axes: Mapping[str, str]) -> None:
    if not (isinstance(a, DistArray) and isinstance(b, DistArray)):
        raise DTypeError(
            f"contract({sub}): operands are {type(a).__name__} and {type(b).__name__}: make DistArrays of them"
        )
    if a.grid is not b.grid:
        raise GridError(f"contract({sub}): a lies on {a.grid} and b on {b.grid}: make both on the same Grid object")
    for letters, array, name in ((sub.a, a, "a"), (sub.b, b, "b")):
        if len(letters) != array.ndim:
            raise ShapeError(f"contract({sub}): {name} has {array.ndim} dims {array.shape} for letters {letters!r}")
    for x in sub.batch + sub.k:
        left, right = a.shape[sub.a.index(x)], b.shape[sub.b.index(x)]
        if left != right:
            raise ShapeError(f"contract({sub}): {x} of a ({left}) and {x} of b ({right}) must be equal, on {a.grid}")
    if a.dtype != b.dtype:
        raise DTypeError(f"contract({sub}): a is {a.dtype} and b is {b.dtype}: cast one with .astype")
    for axis, letter in axes.items():
        if axis not in a.grid.axes:
            raise GridError(f"contract({sub}): no axis {axis!r} on {a.grid}")
        if letter not in {*sub.a, *sub.b}:
            raise LayoutError(f"contract({sub}): axis {axis!r} is mapped to {letter!r}, which is no letter of it")


def multiply(sub: Subscripts, a: Block, b: Block) -> Block:
    """Return the local product, by one (batched) matrix product of the blocks' own library."""
    xp = backend.namespace(a, b)
    size = extents_of(sub, a.shape, b.shape)
    left = _matrix(xp, a, sub.a, (sub.batch, sub.m, sub.k), size)
    right = _matrix(xp, b, sub.b, (sub.batch, sub.k, sub.n), size)
    made = sub.batch + sub.m + sub.n
    product = xp.reshape(xp.matmul(left, right), tuple(size[x] for x in made))
    return product if made == sub.c else xp.permute_dims(product, tuple(made.index(x) for x in sub.c))


def _matrix(xp: Any, block: Block, letters: str, groups: tuple[str, str, str], size: Mapping[str, int]) -> Block:
    """Return `block` as one matrix per batch index: each group of letters becomes one dim."""
    order = "".join(groups)
    if order != letters:
        block = xp.permute_dims(block, tuple(letters.index(x) for x in order))
    shape = tuple(math.prod(size[x] for x in group) for group in groups)
    return xp.reshape(block, shape if groups[0] else shape[1:])
