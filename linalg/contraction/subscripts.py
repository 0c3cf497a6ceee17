"""The letters of a two-operand einsum, and the layouts that a map of grid axes to these letters asks for.

`contract`, the cost model of ``linalg.model`` and the layers call it. It calls nothing but ``layout``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from colossal_mpi.errors import ShapeError
from colossal_mpi.layout import Layout


@dataclass(frozen=True)
class Subscripts:
    """A parsed two-operand einsum ``a,b->c``, whose letters are of four kinds: batch, m, n and k.

    Parameters
    ----------
    a, b : str
        A letter for each dim of the operands.
    c : str
        A letter for each dim of the result.
    """

    a: str
    b: str
    c: str

    @cached_property
    def batch(self) -> str:
        """The letters of both operands and the result."""
        return "".join(x for x in self.c if x in self.a and x in self.b)

    @cached_property
    def m(self) -> str:
        """The letters of `a` and the result."""
        return "".join(x for x in self.a if x in self.c and x not in self.b)

    @cached_property
    def n(self) -> str:
        """The letters of `b` and the result."""
        return "".join(x for x in self.b if x in self.c and x not in self.a)

    @cached_property
    def k(self) -> str:
        """The letters of both operands, over which the product sums."""
        return "".join(x for x in self.a if x in self.b and x not in self.c)

    def __str__(self) -> str:
        return f"{self.a},{self.b}->{self.c}"


@lru_cache(maxsize=1024)
def parse(subscripts: str) -> Subscripts:
    """Parse a two-operand einsum.

    Parameters
    ----------
    subscripts : str
        Two operands and a result, as ``"mk,kn->mn"``. Spaces are ignored.

    Returns
    -------
    Subscripts
        The letters of the three arrays.

    Raises
    ------
    ShapeError
        If it is no product of two operands, an array repeats a letter, or a letter stands in one array alone.

    Examples
    --------
    >>> parse("bsk,kn->bsn").m
    'bs'
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
    """Return the size of each letter.

    Parameters
    ----------
    sub : Subscripts
        The letters.
    a, b : sequence of int
        The shapes of the operands, global or local.

    Returns
    -------
    dict of str to int
        The size of each letter of `sub`.
    """
    return {**dict(zip(sub.a, a, strict=True)), **dict(zip(sub.b, b, strict=True))}


def adjoints(subscripts: str) -> tuple[str, str]:
    """Return the subscripts of the two adjoint products of a product.

    ``dA = contract(first, dC, conj(B), axes)`` and ``dB = contract(second, conj(A), dC, axes)``, with the map `axes` of
    the product itself: all three run on the same box m x n x k.

    Parameters
    ----------
    subscripts : str
        The product, as ``"mk,kn->mn"``.

    Returns
    -------
    tuple of (str, str)
        The products that give the cotangents of the first and the second operand.

    Raises
    ------
    ShapeError
        If `parse` refuses the subscripts.

    Examples
    --------
    >>> adjoints("mk,kn->mn")
    ('mn,kn->mk', 'mk,mn->kn')
    """
    sub = parse(subscripts)
    return f"{sub.c},{sub.b}->{sub.a}", f"{sub.a},{sub.c}->{sub.b}"


def map_layout(letters: str, axes: Mapping[str, str], partial: str = "") -> Layout:
    """Return the layout that a map asks for: each dim is cut over the axes that are mapped to its letter.

    Parameters
    ----------
    letters : str
        A letter for each dim of the array.
    axes : mapping of str to str
        Grid axis to letter. Several axes on one letter nest in this order, outer to inner.
    partial : str
        Letters that are summed: the layout is partial over the axes that are mapped to them.

    Returns
    -------
    Layout
        The layout of the array.

    Examples
    --------
    >>> map_layout("mn", {"row": "m", "col": "n", "depth": "k"}, partial="k")
    Layout('row', 'col', partial=('depth',))
    """
    return _map_layout(letters, tuple(axes.items()), partial)


@lru_cache(maxsize=4096)
def _map_layout(letters: str, axes: tuple[tuple[str, str], ...], partial: str) -> Layout:
    dims = [[axis for axis, letter in axes if letter == x] for x in letters]
    return Layout(*dims, partial=[axis for axis, letter in axes if letter in partial])


def layout_map(letters: str, layout: Layout) -> dict[str, str]:
    """Return the map for which an array in a layout is in place, the inverse of `map_layout`.

    Parameters
    ----------
    letters : str
        A letter for each dim of the array.
    layout : Layout
        The layout of the array; partial axes are ignored.

    Returns
    -------
    dict of str to str
        Grid axis to letter.
    """
    return {axis: letter for letter, dim in zip(letters, layout.dims, strict=True) for axis in dim}
