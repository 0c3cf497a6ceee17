"""Self-attention: heads are letters that the map cuts, so that attention itself is local unless the sequence is cut."""

from __future__ import annotations

from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers.attention import ring
from colossal_mpi.layers.attention.mask import Sight
from colossal_mpi.layers.attention.rotary import Rotary, Rotation
from colossal_mpi.layers.containers import Parallel, Sequential
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.linear import Linear, Linears
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


class Attention(Layer):
    """Softmax attention of packed queries, keys and values ``[b, s, 3, a, d]`` to ``[b, s, a, d]``.

    Batch, heads and the sequence may be cut, the head dim may not. Inside, the heads are cut by the axes of
    `Parallelism.attention`, and s by those of a ring at most. The keys that count are those where the context's `mask`
    is true; a query that sees no key gives zeros. The causal order is that of the context's `positions`. The backward
    pass makes the probabilities again from the peaks and sums of their scores, tile by tile: memory grows linearly in
    s, and falls with the ranks that cut it.

    Parameters
    ----------
    parallelism : Parallelism
    causal : bool
        Whether a query sees the keys of its own position and lower ones only.

    Notes
    -----
    **Communication** on each of c ranks that cut s, where blocks are equal. On axes that cut heads inside, all_to_alls,
    ``3 (c - 1) / c^2`` of ``b s a d`` words for x and ``(c - 1) / c^2`` for y, where the next layer asks for it, and as
    much backward. In a ring ``2 (c - 1) b (s/c) a d`` forward and ``(4 c - 2) b (s/c) a d`` backward. A mask is
    gathered over all of them, ``b s`` bytes; in another layout than `Parallelism.tokens` it is redistributed.

    References
    ----------
    Jacobs et al.: DeepSpeed Ulysses, 2023 (heads). Liu, Zaharia, Abbeel: Ring attention, 2023.
    """

    def __init__(self, parallelism: Parallelism, *, causal: bool = True) -> None:
        self.layout, self.causal = parallelism.attention("bstad", "a", "a"), causal

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the attention of each head, cut as it is inside.

        Raises
        ------
        ShapeError
            If the context's mask is not ``[b, s]``, or its positions are neither ``[s]`` nor ``[b, s]``.
        DTypeError
            If the mask is not bool, or the positions are no integers.
        """
        packed, (b, s, _, a, d) = x.redistribute(self.layout), x.shape
        if ctx.kv_cache is not None:
            return ctx.kv_cache.attend(self, packed[:, :, 0], packed[:, :, 1:], ctx), None
        sight = Sight(packed, self.causal, ctx)
        q, k, v = (_own(packed.local[:, :, t, ...], sight) for t in range(3))
        out, statistics = ring.attend(q, (k, v), sight)
        dims, saved = self.layout.dims, (q, (k, v), out, statistics, sight)
        return DistArray(out, (b, s, a, d), Layout(*dims[:2], *dims[3:]), x.grid), (saved, x.layout.with_partial())

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> Any:
        """Return the cotangent of the packed queries, keys and values."""
        saved, layout = cache
        dims, (b, s, a, d) = self.layout.dims, dy.shape
        do = dy.redistribute(Layout(*dims[:2], *dims[3:])).local
        block = backend.namespace(do).stack(ring.attend_backward(do, *saved), axis=2)
        return DistArray(block, (b, s, 3, a, d), self.layout, dy.grid).redistribute(layout)


def _own(block: Any, sight: Sight) -> Any:
    """Return a part of an array on its own: as it lies, unless it is to be sent."""
    return block if sight.ranks == 1 else backend.contiguous(block)


class GroupedAttention(Layer):
    """Attention of queries ``[b, s, g, r, d]`` and keys and values ``[b, s, 2, g, d]`` to ``[b, s, g, r, d]``.

    The r queries of a group share its keys and values. Where r is cut, each rank has keys and values of every group,
    and their cotangents are partial sums over the axes that cut r; they are handed on as such, unless these axes cut s
    outside.

    Parameters
    ----------
    parallelism : Parallelism
    inner : {"g", "r"}
        Which of the two letters is cut.
    spread : {"g", "r"}
        Which is cut by the axes that cut s outside and are no ring.
    causal : bool

    Notes
    -----
    **Communication:** as `Attention`, of queries and of keys and values; in a ring those of the g groups alone travel.
    """

    def __init__(self, parallelism: Parallelism, inner: str, spread: str, *, causal: bool = True) -> None:
        self.q, self.kv = (parallelism.attention(letters, inner, spread) for letters in ("bsgrd", "bstgd"))
        self.causal = causal

    def forward(self, x: tuple[DistArray, DistArray], ctx: Context) -> tuple[DistArray, Any]:
        """Return the attention of each head, for queries, and keys and values."""
        q, kv = (part.redistribute(layout) for part, layout in zip(x, (self.q, self.kv), strict=True))
        if ctx.kv_cache is not None:
            return ctx.kv_cache.attend(self, q, kv, ctx), None
        sight, (b, s, g, r, d) = Sight(q, self.causal, ctx), q.local.shape
        xp = backend.namespace(q.local)
        heads, (k, v) = xp.reshape(q.local, (b, s, g * r, d)), (_own(kv.local[:, :, t, ...], sight) for t in range(2))
        out, statistics = ring.attend(heads, (k, v), sight)
        saved, layouts = (heads, (k, v), out, statistics, sight), [part.layout.with_partial() for part in x]
        return q.like(xp.reshape(out, (b, s, g, r, d))), (saved, kv.shape, layouts)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> Any:
        """Return the cotangents of queries, and of keys and values."""
        saved, shape, (of_q, of_kv) = cache
        dy = dy.redistribute(self.q)
        b, s, g, r, d = dy.local.shape
        xp = backend.namespace(dy.local)
        dq, *dkv = ring.attend_backward(xp.reshape(dy.local, (b, s, g * r, d)), *saved)
        shared = [axis for axis in dy.layout.cut if axis not in self.kv.cut]
        summed = DistArray(xp.stack(dkv, axis=2), shape, self.kv.with_partial(*shared), dy.grid)
        kept = of_kv.with_partial(*[axis for axis in shared if axis not in of_kv.cut])
        return dy.like(xp.reshape(dq, (b, s, g, r, d))).redistribute(of_q), summed.redistribute(kept)


class SelfAttention(Sequential):
    """Self-attention of the residual stream, multi-head or grouped-query, with its input and output products.

    Parameters
    ----------
    hidden, heads : int
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters: ``qkv.weight [h, 3, a, d]`` and ``out.weight [a, d, h]``, with biases
        ``qkv.bias [3, a, d]`` and ``out.bias [h]``. With groups g of r heads each ``q.weight [h, g, r, d]``,
        ``kv.weight [h, 2, g, d]``, ``out.weight [g, r, d, h]``, and biases ``q.bias [g, r, d]``, ``kv.bias [2, g, d]``,
        ``out.bias [h]``. Names and shapes are the same on every grid.
    groups : int, optional
        Groups of heads that share keys and values; as many as heads by default, which is multi-head attention. Head i
        belongs to group ``i // (heads / groups)``.
    rotary : Rotary, optional
        Turns queries and keys by their positions.
    causal : bool
        Whether a query sees the keys of its own position and lower ones only.
    bias, out_bias : bool
        Whether the input products have biases, and the output product; `out_bias` is as `bias` by default.
    width : int, optional
        Width d of a head; hidden / heads by default.
    std, out_std : float
        Standard deviations of the initial weights of the input and the output product.
    seed, dtype

    Raises
    ------
    ShapeError
        If `heads` does not divide `hidden` and no width is given, `groups` does not divide `heads`, or the width is odd
        and to be turned.

    Notes
    -----
    Heads are cut. Of grouped ones it is the groups, or, if there are fewer than ranks that cut them, the queries of a
    group: keys and values are then replicated over those ranks, and so is the work of their product. Axes that cut the
    sequence outside attention and heads inside it choose one of the two anew.

    **Communication:** that of the products (`Linear`); grouped, the stream is gathered once for both, and its
    cotangent reduced once. With n = bs tokens and c ranks that cut the r queries of a group, the cotangents of keys and
    values are summed for ``2 (c - 1) 2 n g d`` words.

    References
    ----------
    Vaswani et al.: Attention is all you need, 2017. Shazeer: Fast transformer decoding, 2019. Ainslie et al.: GQA:
    training generalized multi-query transformer models, 2023.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        parallelism: Parallelism,
        name: str,
        *,
        groups: int | None = None,
        rotary: Rotary | None = None,
        causal: bool = True,
        bias: bool = True,
        out_bias: bool | None = None,
        width: int | None = None,
        std: float = 0.02,
        out_std: float = 0.02,
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        groups = heads if groups is None else groups
        width = head_width(hidden, heads, groups, width)
        if rotary is not None:
            rotary.frequencies(width)  # refuses an odd width
        sizes = {"h": hidden, "a": heads, "g": groups, "r": heads // groups, "d": width}
        common = {"bias": bias, "std": std, "seed": seed, "dtype": dtype}
        parts = _multi_head if groups == heads else _grouped
        heads_of, subscripts, inner = parts(sizes, parallelism, name, rotary, causal, common)
        common |= {"bias": bias if out_bias is None else out_bias, "std": out_std}
        super().__init__(*heads_of, Linear(subscripts, sizes, inner, parallelism, f"{name}.out", **common))


def _multi_head(
    sizes: dict[str, int], p: Parallelism, name: str, rotary: Rotary | None, causal: bool, common: dict[str, Any]
) -> tuple[list[Layer], str, str]:
    """Return the layers to the heads' outputs, and the subscripts and the inner letter of the output product."""
    turn = [] if rotary is None else [Rotation(rotary, 2)]
    qkv = Linear("bsh,htad->bstad", {**sizes, "t": 3}, "a", p, f"{name}.qkv", **common)
    return [qkv, *turn, Attention(p, causal=causal)], "bsad,adh->bsh", "a"


def _grouped(
    sizes: dict[str, int], p: Parallelism, name: str, rotary: Rotary | None, causal: bool, common: dict[str, Any]
) -> tuple[list[Layer], str, str]:
    """Return the layers to the heads' outputs, and the subscripts and the inner letter of the output product."""
    heads = {letter: sizes[letter] for letter in "gr"}
    spread = p.spread(heads, inner := p.inner(heads))
    turn = [] if rotary is None else [Parallel(Rotation(rotary), Rotation(rotary, 1))]
    products = Linears(
        Linear("bsh,hgrd->bsgrd", sizes, inner, p, f"{name}.q", **common),
        Linear("bsh,htgd->bstgd", {**sizes, "t": 2}, inner, p, f"{name}.kv", replicate="r", **common),
    )
    return [products, *turn, GroupedAttention(p, inner, spread, causal=causal)], "bsgrd,grdh->bsh", inner


def head_width(hidden: int, heads: int, groups: int, width: int | None = None) -> int:
    """Return the width of a head, ``hidden / heads`` unless it is given.

    Raises
    ------
    ShapeError
        If the heads do not divide hidden, or the groups the heads.
    """
    if width is None and hidden % heads:
        fitting = [str(n) for n in range(1, min(hidden, 4 * heads) + 1) if hidden % n == 0]
        raise ShapeError(f"{heads} heads do not divide hidden={hidden}: use heads in {{{', '.join(fitting)}}}")
    if groups < 1 or heads % groups:
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ShapeError(f"{groups} groups do not divide {heads} heads: use groups in {{{', '.join(fitting)}}}")
    return width or hidden // heads
