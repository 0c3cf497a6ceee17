"""Linear: one product forward and its two adjoints backward, on the same map, in every mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism, Product
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.replay import kept, taken
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction import adjoints, contract, parse
from colossal_mpi.platform import backend


class Linear(Layer):
    """``y = x w + bias`` between the residual stream and the inside of a block.

    Parameters
    ----------
    subscripts : str
        ``"bsh,hf->bsf"`` or ``"bsf,fh->bsh"``; heads are letters too, ``"bsh,htad->bstad"``.
    sizes : mapping of str to int
        Size of each letter of the weight.
    inner : str, optional
        The letter that the inside is cut on; None where the result stays in the stream, ``"bsh,he->bse"``.
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters ``weight`` and ``bias``.
    replicate : str
        Letters that the product lacks on purpose, so that all ranks of the axes that cut them do the same product: for
        example ``"s"`` for ``"bh,hv->bv"``, the classes of whole samples.
    bias : bool
    std : float
        Standard deviation of the initial weight.
    weight : Parameter, optional
        A weight to share instead of making one (tied weights).
    seed, dtype

    Notes
    -----
    **Communication**, summed over ranks: V = mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1) forward and V backward with
    gathered operands kept, where the weight is stored once; weights replicated over an axis are gathered in each
    replica and their gradients summed over it. See docs/design.rst for a block's words in every mode.
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
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        self.name = name
        self.product: Product = parallelism.product(subscripts, inner, replicate=replicate)
        self.keep, self.keep_weight = parallelism.keep_gathered, parallelism.keep_weights
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
        self.batch_dims = [d for d, x in enumerate(y) if x not in w]
        self.bias_dims = [d for d, x in enumerate(y) if x in w]
        self.bias_layout = Layout(*[self.product.y.dims[d] for d in self.bias_dims])
        self.bias = None
        if bias:
            shape = [sizes[y[d]] for d in self.bias_dims]
            self.bias = Parameter(f"{name}.bias", shape, self.bias_layout, parallelism, dtype=dtype)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``x w + bias`` in the layout of the next layer."""
        gathered = x.redistribute(self.product.x)
        y, w = self.apply(gathered)
        return y, (kept(x, gathered if self.keep else x), w, x.layout.with_partial())

    def replay(self, x: DistArray, ctx: Context) -> Any:
        """Return the operands that are kept. **Communication:** they are gathered, if they are kept so."""
        gathered = x.redistribute(self.product.x) if self.keep else x
        w = self.weight.use(self.product.w) if self.keep_weight else None
        return kept(x, gathered), w, x.layout.with_partial()

    def apply(self, x: DistArray) -> tuple[DistArray, DistArray | None]:
        """Return ``x w + bias`` of an input as the map takes it, and the weight if it is kept as the map takes it."""
        p, w = self.product, self.weight.use(self.product.w)
        y = contract(p.subscripts, x, w, p.axes, out=p.y)
        if self.bias is not None:
            bias = self.bias.use(self.bias_layout)
            shape = [1 if d in self.batch_dims else n for d, n in enumerate(y.local.shape)]
            y.local += backend.namespace(y.local).reshape(bias.local, tuple(shape))
        return y, w if self.keep_weight else None

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return ``dy w^T``; ``x^T dy`` and the sum of dy go to the gradients."""
        x, w, layout = cache
        dx, weight_product = self.adjoint(dy, w, layout)
        _defer(later, lambda: weight_product(taken(x)))
        return dx

    def adjoint(
        self, dy: DistArray, w: DistArray | None, out: Layout | None = None
    ) -> tuple[DistArray, Callable[[DistArray], None]]:
        """Return ``dy w^T``, by default as the map leaves it, and what adds ``x^T dy`` to the gradient, given x."""
        p = self.product
        dx_subscripts, dw_subscripts = adjoints(p.subscripts)
        if self.bias is not None:
            dy = dy.redistribute(p.y)
            self.bias.accumulate(dy.sum_over(self.batch_dims))
        gathered = dy.redistribute(p.dy)
        w = self.weight.use(p.w) if w is None else w
        dx = contract(dx_subscripts, gathered, w, p.axes, out)
        return dx, lambda x: self.weight.accumulate(contract(dw_subscripts, x, gathered, p.axes, wide=True))


class Linears(Layer):
    """Several products of one input, which is gathered once; their cotangents of it are added and reduced once.

    Parameters
    ----------
    *linears : Linear
        Whose maps take the input in the same way, as all do from the stream.
    """

    def __init__(self, *linears: Linear) -> None:
        self.linears = list(linears)

    def forward(self, x: DistArray, ctx: Context) -> tuple[tuple[DistArray, ...], Any]:
        """Return the products, in the order of the layers."""
        first = self.linears[0]
        gathered = x.redistribute(first.product.x)
        ys, ws = zip(*[linear.apply(gathered) for linear in self.linears], strict=True)
        return ys, (kept(x, gathered if first.keep else x), ws, x.layout.with_partial())

    def backward(self, dy: Sequence[DistArray], cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the input for those of the products."""
        x, ws, layout = cache
        terms = [linear.adjoint(*pair) for linear, *pair in zip(self.linears, dy, ws, strict=True)]
        # A term that holds partial sums takes the others in as such for free; the other way round it would be reduced.
        parts = sorted((dx for dx, _ in terms), key=lambda dx: -len(dx.layout.partial))
        total = sum(parts[1:], start=parts[0]).redistribute(layout)

        def weight_products() -> None:
            gathered = taken(x).redistribute(self.linears[0].product.x)
            for _, weight_product in terms:
                weight_product(gathered)

        _defer(later, weight_products)
        return total


def _defer(later: Later, work: Callable[[], None]) -> None:
    work() if later is None else later.append(work)
