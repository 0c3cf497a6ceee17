"""The letters of a two-operand einsum, and the layouts that a map of grid axes to them asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from colossal_mpi.errors import ShapeError
from colossal_mpi.layout import Layout


@dataclass(frozen=True)
class Subscripts:
    """A parsed two-operand einsum and the kind of each of its letters."""

    a: str
    b: str
    c: str

    @cached_property
    def batch(self) -> str:
        """Letters of both operands and the result."""
        return "".join(x for x in self.c if x in self.a and x in self.b)

    @cached_property
    def m(self) -> str:
        """Letters of `a` and the result."""
        return "".join(x for x in self.a if x in self.c and x not in self.b)

    @cached_property
    def n(self) -> str:
        """Letters of `b` and the result."""
        return "".join(x for x in self.b if x in self.c and x not in self.a)

    @cached_property
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
    return _map_layout(letters, tuple(axes.items()), partial)


@lru_cache(maxsize=4096)
def _map_layout(letters: str, axes: tuple[tuple[str, str], ...], partial: str) -> Layout:
    dims = [[axis for axis, letter in axes if letter == x] for x in letters]
    return Layout(*dims, partial=[axis for axis, letter in axes if letter in partial])


def layout_map(letters: str, layout: Layout) -> dict[str, str]:
    """Return the map under which an array of `letters` in `layout` is in place: the inverse of `map_layout`."""
    return {axis: letter for letter, dim in zip(letters, layout.dims, strict=True) for axis in dim}
