"""Linear layers: one distributed product forward and its two adjoint products backward, on one map, in every mode.

Attention, MLPs, experts and heads are made of them. They ask `Parallelism` for the map and the layouts of their
product, and call `contract` of `colossal_mpi.linalg.contraction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Protocol, TypeAlias

from numpy.typing import DTypeLike

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism, Product
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction import adjoints, contract, parse
from colossal_mpi.platform import backend

Operands: TypeAlias = tuple[DistArray | None, DistArray | None]
"""What a product keeps for its backward pass: its gathered weight, and the input of low rank of its adapter."""


class Adapter(Protocol):
    """A product of low rank beside that of a `Linear`; `colossal_mpi.layers.lora` implements it."""

    def reduced(self, x: DistArray) -> DistArray:
        """Return x, in the layout of the map, times the first factor."""

    def expanded(self, low: DistArray) -> DistArray:
        """Return what `reduced` returned times the second factor, in the layout of the product's result."""

    def adjoint(self, dy: DistArray, low: DistArray, out: Layout) -> tuple[DistArray, Callable[[DistArray], None]]:
        """Return the cotangent of x in a layout, and the function of x that adds the gradients of both factors."""


class Linear(Layer):
    """The product ``y = x w + bias`` between the residual stream and the inside of a block.

    Parameters
    ----------
    subscripts : str
        The product as an einsum: ``"bsh,hf->bsf"`` goes into a block, ``"bsf,fh->bsh"`` comes back. Heads are letters,
        too: ``"bsh,htad->bstad"``.
    sizes : mapping of str to int
        The global size of each letter of the weight.
    inner : str, optional
        The letter that the inside of the block is cut on; None where the result stays in the stream, as in
        ``"bsh,he->bse"``.
    parallelism : Parallelism
        The mode, which chooses the map and the layouts.
    name : str
        Prefix of the names of the parameters ``weight`` and ``bias``.
    replicate : str
        Letters that the product lacks on purpose, so that all ranks of the axes that cut them do the same product: for
        example ``"s"`` for ``"bh,hv->bv"``, the classes of whole samples.
    bias : bool
        Whether there is a bias, of the letters that x lacks and y has.
    std : float
        Standard deviation of the initial weight; the initial bias is zero.
    weight : Parameter, optional
        A weight to share instead of making one (tied weights).
    seed : int, optional
        Seed of the initial weight; None leaves it zero, for a weight that is to be loaded.
    dtype : dtype
        Dtype of the parameters.
    product : Product, optional
        Map and layouts; by default those that the mode chooses for `inner` and `replicate`.

    Attributes
    ----------
    adapter : Adapter or None
        A product of low rank that is added to this one (`colossal_mpi.layers.lora`).

    Raises
    ------
    GridError
        If an axis of the grid cuts a letter that the product lacks and `replicate` does not name.

    Notes
    -----
    The backward pass computes ``dx = dy w^T`` and ``dw = x^T dy``; the gradient of the bias is the sum of dy over the
    dims that w lacks.

    **Communication:** summed over ranks, ``V = mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1)`` words forward and V backward
    for a product of m x k and k x n, where P_m, P_n and P_k ranks cut these dims, the gathered operands are kept and
    the weight is stored once. A weight that is replicated over an axis is gathered in each replica, and its gradients
    are reduced over the axis. The design notes have the words of a block in every mode.

    **Adjoint:** the two products of the backward pass run on the map of the forward pass.

    Examples
    --------
    >>> up = Linear("bsh,hf->bsf", {"h": 256, "f": 1024}, "f", Parallelism(Grid(col=2), "1d"), "up")
    """

    def __init__(
        self,
        subscripts: str,
        sizes: Mapping[str, int],
        inner: str | None,
        parallelism: Parallelism,
        name: str,
        *,
        replicate: str = "",
        bias: bool = True,
        std: float = 0.02,
        weight: Parameter | None = None,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
        product: Product | None = None,
    ) -> None:
        self.name, self.sizes, self.parallelism = name, dict(sizes), parallelism
        self.product = parallelism.product(subscripts, inner, replicate=replicate) if product is None else product
        self.adapter: Adapter | None = None
        self.keep_gathered, self.keep_weight = parallelism.keep_gathered, parallelism.keep_weights
        x, w, y = parse(subscripts).a, parse(subscripts).b, parse(subscripts).c
        batch = len(list(takewhile(lambda letter: letter in x and letter in y, w)))
        self.weight = weight or Parameter(
            f"{name}.weight",
            [sizes[letter] for letter in w],
            self.product.w,
            parallelism,
            std=std,
            seed=seed,
            dtype=dtype,
            inputs=max(1, len(list(takewhile(lambda letter: letter in x and letter not in y, w[batch:])))),
            batch=batch,
        )
        self.batch_dims = [d for d, letter in enumerate(y) if letter not in w]
        bias_dims = [d for d, letter in enumerate(y) if letter in w]
        self.bias_layout = Layout(*[self.product.y.dims[d] for d in bias_dims])
        self.bias = None
        if bias:
            shape = [sizes[y[d]] for d in bias_dims]
            self.bias = Parameter(f"{name}.bias", shape, self.bias_layout, parallelism, dtype=dtype)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        # 1d: X[B, S_col, H] -> X[B, S, H]; 2d: X[B_row, S, H_col] -> X[B_row, S, H]
        gathered = x.redistribute(self.product.x)
        y, kept = self._apply(gathered)
        return y, (self._saved(x, gathered), kept, x.layout.with_partial())

    @property
    def trains(self) -> bool:
        """True if the backward pass needs the input: for the weight's gradient, or for the adapter's."""
        return self.adapter is not None or not self.weight.frozen

    def _saved(self, x: DistArray, gathered: DistArray) -> object:
        return self.save(x, gathered if self.keep_gathered else x) if self.trains else None

    def replay(self, x: DistArray, ctx: Context) -> Cache:
        # The product itself is left out: the backward pass needs its operands alone, gathered if they are kept so.
        gathered = x.redistribute(self.product.x) if self.trains and (self.keep_gathered or self.adapter) else x
        w = self.weight.use(self.product.w) if self.keep_weight else None
        low = None if self.adapter is None else self.adapter.reduced(gathered)
        return self._saved(x, gathered), (w, low), x.layout.with_partial()

    def _apply(self, x: DistArray) -> tuple[DistArray, Operands]:
        """Return ``x w + bias`` for an x in the layout of the map, and the operands that are to be kept."""
        p, w = self.product, self.weight.use(self.product.w)
        # 1d up:   X[B, S, H] . W[H, F_col] -> Y[B, S, F_col]
        # 1d down: X[B, S, F_col] . W[F_col, H] -> Y[B, S, H] {U_col} -> Y[B, S_col, H]: reduce_scatter over col
        # 2d up:   X[B_row, S, H] . W[H, F_col] -> Y[B_row, S, F_col]
        # 3d up:   X[B_row, S, H_depth] . W[H_depth, F_col] -> Y[B_row, S, F_col] {U_depth}
        #          -> Y[B_(row,depth), S, F_col]: reduce_scatter over depth
        y = contract(p.subscripts, x, w, p.axes, out=p.y)
        if self.bias is not None:
            # Y[B, S, F_col] + bias[F_col]
            bias = self.bias.use(self.bias_layout)
            shape = [1 if d in self.batch_dims else n for d, n in enumerate(y.local.shape)]
            y.local += backend.namespace(y.local).reshape(bias.local, tuple(shape))
        low = None
        if self.adapter is not None:
            low = self.adapter.reduced(x)
            y = y + self.adapter.expanded(low)
        return y, (w if self.keep_weight else None, low)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        x, kept, layout = cache
        dx, add_weight_gradient = self._adjoint(dy, kept, layout)
        if self.trains:
            _do(lambda: add_weight_gradient(self.load(x)), later)
        return dx

    def _adjoint(
        self, dy: DistArray, kept: Operands, out: Layout | None = None
    ) -> tuple[DistArray, Callable[[DistArray], None]]:
        """Return ``dy w^T``, and the function of x that adds ``x^T dy`` to the gradient of the weight.

        `kept` is what `_apply` returned. The result is in the layout `out`, or by default as the map leaves it: with
        partial sums over the axes that cut the summed letter.
        """
        p, (w, low) = self.product, kept
        dx_subscripts, dw_subscripts = adjoints(p.subscripts)
        if self.adapter is not None or self.bias is not None:
            dy = dy.redistribute(p.y)
        if self.bias is not None and not self.bias.frozen:
            # dY[B_row, S, F_col] summed over b and s -> dbias[F_col] {U_row}
            self.bias.accumulate(dy.sum_over(self.batch_dims))
        # The cotangent of what the forward pass reduce-scattered is gathered: dY[B, S_col, H] -> dY[B, S, H]
        gathered = dy.redistribute(p.dy)
        w = self.weight.use(p.w) if w is None else w
        # 1d up: dY[B, S, F_col] . W[H, F_col]^T -> dX[B, S, H] {U_col} -> dX[B, S_col, H]: reduce_scatter over col
        dx = contract(dx_subscripts, gathered, w, p.axes, out)
        add_low = None
        if self.adapter is not None:
            assert low is not None
            more, add_low = self.adapter.adjoint(dy, low, dx.layout.with_partial())
            dx = dx + more
        # 2d: X[B_row, S, H]^T . dY[B_row, S, F_col] -> dW[H, F_col] {U_row}; the parameter reduces it to where W lies
        return dx, lambda x: self._add_gradients(x, gathered, dw_subscripts, add_low)

    def _add_gradients(
        self, x: DistArray, dy: DistArray, subscripts: str, add_low: Callable[[DistArray], None] | None
    ) -> None:
        """Add ``x^T dy`` to the gradient of the weight, and to those of the adapter its own products."""
        if not self.weight.frozen:
            self.weight.accumulate(contract(subscripts, x, dy, self.product.axes, wide=True))
        if add_low is not None:
            # X as it was kept -> X in the layout of the map
            add_low(x.redistribute(self.product.x))


class Linears(Layer):
    """Several products of one input, which is gathered once; the sum of its cotangents is reduced once.

    Parameters
    ----------
    *linears : Linear
        Layers whose maps take the input in the same layout, as all products from the stream do. The output is the tuple
        of their outputs.

    Notes
    -----
    **Communication:** the collectives of the layers, with the words of gathering x and of reducing dx counted once.
    """

    def __init__(self, *linears: Linear) -> None:
        self.linears = list(linears)

    def forward(self, x: DistArray, ctx: Context) -> tuple[tuple[DistArray, ...], Cache]:
        first = self.linears[0]
        # X[B_row, S, H_col] -> X[B_row, S, H], once for all products
        gathered = x.redistribute(first.product.x)
        ys, kept = zip(*[linear._apply(gathered) for linear in self.linears], strict=True)
        trains = any(linear.trains for linear in self.linears)
        saved = self.save(x, gathered if first.keep_gathered else x) if trains else None
        return ys, (saved, kept, x.layout.with_partial())

    def backward(self, dy: Sequence[DistArray], cache: Cache, later: Later = None) -> DistArray:
        x, kept, layout = cache
        # dY_i[B, S, F_col] . W_i[H, F_col]^T -> dX_i[B, S, H] {U_col} for each product i
        terms = [linear._adjoint(*pair) for linear, *pair in zip(self.linears, dy, kept, strict=True)]
        # Adding a complete term to one with partial sums is free; the other way round the partial sums are reduced.
        parts = sorted((dx for dx, _ in terms), key=lambda dx: -len(dx.layout.partial))
        # sum_i dX_i[B, S, H] {U_col} -> dX[B, S_col, H]: one reduce_scatter over col
        total = sum(parts[1:], start=parts[0]).redistribute(layout)

        def add_weight_gradients() -> None:
            # where x was not kept gathered: X[B_row, S, H_col] -> X[B_row, S, H]
            gathered = self.load(x).redistribute(self.linears[0].product.x)
            for _, add_weight_gradient in terms:
                add_weight_gradient(gathered)

        if any(linear.trains for linear in self.linears):
            _do(add_weight_gradients, later)
        return total


def _do(work: Callable[[], None], later: Later) -> None:
    """Do the product of a weight gradient now, or put it off."""
    work() if later is None else later.append(work)
