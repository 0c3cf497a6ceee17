"""Low-rank adapters (LoRA): products of low rank beside frozen weights, in the layouts of the products they adapt.

`add_adapters` puts them into a model, whose other weights are frozen; the trainer calls it, `merge_adapters` adds them
to the weights. Each factor is a `Linear`, whose map follows from the map of the product beside it, so that there is no
second formula and no mode is named.

References
----------
Hu et al.: LoRA: low-rank adaptation of large language models, 2021.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Product
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction import contract, layout_map, map_layout, parse

_RANK = "z"
"""The letter of the low rank, which no product of the layers has."""
_STACKED = "t"
"""The letter that counts products which share one weight, as queries, keys and values do: each has its own factors."""


class LowRank(Layer):
    """The product ``alpha / rank  x A B`` that is added to ``x W`` of a `Linear`.

    A has the letters of W that are summed, and the rank; B has the rank, and the letters of W that the result has.
    Letters that count separate matrices, of experts and of queries, keys and values, are in both.

    Parameters
    ----------
    base : Linear
        The layer that is adapted.
    rank : int
        The rank.
    alpha : float
        The factor is ``alpha / rank``.
    seed : int, optional
        Seed of A, which is normal with the variance ``1 / (3 n)`` for n summed elements, as that of the uniform values
        of peft; B is zero. None leaves both zero, for values that are to be loaded.

    Notes
    -----
    A is cut as the input of the product and B as its result, and both are replicated over the other axes. The letters
    of the rank are never cut.

    **Communication:** for n = b s tokens the partial sums of ``x A`` are reduced over the axes that cut the summed
    letters of x, n r words for the rank r, and those of ``dy B^T`` over the axes that cut the letters of the result;
    the gradients of A and B are reduced as those of any weight.

    Examples
    --------
    >>> LowRank(Linear("bsh,hf->bsf", {"h": 8, "f": 32}, "f", Parallelism(Grid(col=2), "1d"), "up"), 4, 8.0)
    """

    def __init__(self, base: Linear, rank: int, alpha: float, seed: int | None = 0) -> None:
        p, sub = base.product, parse(base.product.subscripts)
        x, w, y = sub.a, sub.b, sub.c
        self.scale, self.rank, self.alpha = alpha / rank, rank, alpha
        stacked = "".join(letter for letter in w if letter == _STACKED and letter not in x)
        batch = "".join(letter for letter in w if letter in x and letter in y)
        summed = "".join(letter for letter in w if letter in x and letter not in y)
        new = "".join(letter for letter in w if letter not in x and letter not in stacked)
        low = "".join(letter for letter in x if letter not in summed) + stacked + _RANK
        of_a, of_b = batch + summed + stacked + _RANK, batch + stacked + _RANK + new
        # the map of x A is that of x W without the axes that cut the result; that of (x A) B is the layout of Y
        axes_a = {axis: letter for axis, letter in p.axes.items() if letter in x}
        axes_b = dict(layout_map(y, p.y))
        to_b = map_layout(low, {axis: letter for axis, letter in axes_b.items() if letter in low})
        down = Product(
            f"{x},{of_a}->{low}",
            axes_a,
            p.x,
            map_layout(of_a, _of(of_a, axes_a)),
            to_b,
            map_layout(low, _of(low, axes_a)),
        )
        up = Product(f"{low},{of_b}->{y}", axes_b, to_b, map_layout(of_b, _of(of_b, axes_b)), p.y, p.y)
        sizes, inputs = {**base.sizes, _RANK: rank}, math.prod(base.sizes[letter] for letter in summed)
        dtype, parallelism = base.weight.dtype, base.parallelism
        std = 1 / math.sqrt(3 * max(1, inputs))
        common: dict[str, Any] = {"bias": False, "dtype": dtype}
        names = (f"{base.name}.lora_{factor}" for factor in "ab")
        self.a, self.b = (
            Linear(one.subscripts, sizes, None, parallelism, next(names), product=one, **initial, **common)
            for one, initial in ((down, {"std": std, "seed": seed}), (up, {"seed": None}))
        )
        self.joined = f"{of_a},{of_b}->{w}"

    def reduced(self, x: DistArray) -> DistArray:
        """Return ``alpha / rank  x A``.

        Parameters
        ----------
        x : DistArray
            The input of the product, in the layout of its map.

        Returns
        -------
        DistArray
            The result, in the layout that the product with B takes.
        """
        # X[B_row, S, F_col] . A[F_col, R] -> T[B_row, S, R] {U_col} -> T[B_row, S, R]: allreduce over col
        return self.scale * self.a._apply(x)[0]

    def expanded(self, low: DistArray) -> DistArray:
        """Return the product with B.

        Parameters
        ----------
        low : DistArray
            What `reduced` returned.

        Returns
        -------
        DistArray
            The term, in the layout of the adapted product's result.
        """
        # T[B_row, S, R] . B[R, F_col] -> Y[B_row, S, F_col]
        return self.b._apply(low)[0]

    def adjoint(self, dy: DistArray, low: DistArray, out: Layout) -> tuple[DistArray, Callable[[DistArray], None]]:
        """Return the cotangent of x, and the function of x that adds the gradients of A and B.

        Parameters
        ----------
        dy : DistArray
            The cotangent of the result, in its layout.
        low : DistArray
            What `reduced` returned in the forward pass.
        out : Layout
            The layout of the cotangent.

        Returns
        -------
        dx : DistArray
            The adapter's term of the cotangent of x.
        add : callable
            ``add(x)`` takes x in the layout of the map.
        """
        # dY[B_row, S, F_col] . B[R, F_col]^T -> dT[B_row, S, R] {U_col} -> dT[B_row, S, R]: allreduce over col
        dlow, add_b = self.b._adjoint(dy, (None, None), self.a.product.dy)
        dlow = self.scale * dlow
        # dT[B_row, S, R] . A[H, R]^T -> dX[B_row, S, H]
        dx, add_a = self.a._adjoint(dlow, (None, None), out)

        def add(x: DistArray) -> None:
            add_b(low)
            add_a(x)

        return dx, add

    def product(self) -> DistArray:
        """Return ``alpha / rank  A B``, which merging adds to the weight.

        Returns
        -------
        DistArray
            An array of the shape of the adapted weight.

        Notes
        -----
        **Communication:** both factors are gathered.
        """
        a, b = self.a.weight.value, self.b.weight.value
        # A[H, R] . B[R, F] -> dW[H, F], all of it on every rank
        return self.scale * contract(self.joined, a, b, {}, Layout(*[None] * len(parse(self.joined).c)))


def _of(letters: str, axes: dict[str, str]) -> dict[str, str]:
    """Return the part of a map whose letters an array has."""
    return {axis: letter for axis, letter in axes.items() if letter in letters}


def linears(layer: Layer) -> Iterator[Linear]:
    """Return an iterator over the products of a model, in the order of construction, without factors of adapters.

    Parameters
    ----------
    layer : Layer
        A model or a part of one.

    Yields
    ------
    Linear
        A product.
    """
    factors = {id(factor) for one in layer.walk() if isinstance(one, LowRank) for factor in (one.a, one.b)}
    yield from (one for one in layer.walk() if isinstance(one, Linear) and id(one) not in factors)


def add_adapters(
    model: Layer, rank: int, alpha: float, targets: Sequence[str] = ("*.attention.*",), seed: int | None = 0
) -> list[LowRank]:
    """Freeze the weights of a model, and add adapters to some of its products.

    Parameters
    ----------
    model : Layer
        A model, before it is cut into stages or its recomputation is chosen.
    rank : int
        The rank of all adapters.
    alpha : float
        Their factor is ``alpha / rank``.
    targets : sequence of str
        Patterns of the names of products, such as ``"*.attention.*"``, ``"*.mlp.up"`` or ``"*"``.
    seed : int, optional
        Seed of the initial values, which are the same bits on every grid; None leaves them zero.

    Returns
    -------
    list of LowRank
        The adapters.

    Raises
    ------
    OptionError
        If the rank is below 1 or a pattern fits no product.

    Examples
    --------
    >>> add_adapters(model, rank=8, alpha=16.0, targets=["*.attention.qkv"])
    """
    found = list(linears(model))
    names = list(dict.fromkeys(linear.name for linear in found))
    if rank < 1:
        raise OptionError(f"adapters of rank {rank}: use 1 or more")
    unfit = [pattern for pattern in targets if not any(fnmatchcase(name, pattern) for name in names)]
    if unfit or not targets:
        raise OptionError(
            f"adapters for {', '.join(unfit) or 'no product'}: no product of the {type(model).__name__} has such a "
            f"name; use patterns of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        )
    for parameter in model.parameters():
        parameter.frozen = True
    added = []
    for linear in found:
        if linear.adapter is None and any(fnmatchcase(linear.name, pattern) for pattern in targets):
            linear.adapter = LowRank(linear, rank, alpha, seed)
            added.append(linear.adapter)
    return added


def merge_adapters(model: Layer) -> None:
    """Add the adapters of a model to its weights, and remove them; all weights can be trained again.

    Parameters
    ----------
    model : Layer
        A model with adapters or without.

    Raises
    ------
    OptionError
        If another layer uses the weight of an adapted product, too: it would be changed there as well.

    Notes
    -----
    **Communication:** the factors of each adapter are gathered.
    """
    uses = Counter(id(parameter) for parameter in model.parameter_uses())
    adapted = [linear for linear in linears(model) if isinstance(linear.adapter, LowRank)]
    tied = [linear.name for linear in adapted if uses[id(linear.weight)] > 1]
    if tied:
        raise OptionError(f"the adapter of {', '.join(tied)} cannot be merged: another layer has the same weight")
    for linear in adapted:
        assert isinstance(linear.adapter, LowRank)
        value = linear.weight.value
        # dW[H, F] -> dW[H_row, F_col]: a part of this rank's block, nothing moves
        linear.weight.value = (value + linear.adapter.product().redistribute(value.layout)).astype(value.dtype)
        linear.adapter = None
    for parameter in model.parameters():
        parameter.frozen = False
