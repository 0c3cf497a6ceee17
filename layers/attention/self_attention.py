"""Self-attention: the core on queries, keys and values, multi-head or grouped, and the layer with its products.

Transformer blocks build `SelfAttention`. Heads are letters of its products, so that the map of the mode cuts them and
the core needs no communication, unless an axis cuts the sequence: then the core calls the ring. In generation it calls
the KV cache of the context.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers.attention import ring
from colossal_mpi.layers.attention.head_norm import HeadNorm
from colossal_mpi.layers.attention.mask import AttentionMask
from colossal_mpi.layers.attention.rotary import Rotary, Rotation
from colossal_mpi.layers.containers import Parallel, Sequential
from colossal_mpi.layers.context import Context, KeyValueCache
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layers.linear import Linear, Linears
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class Attention(Layer):
    """Softmax attention of packed queries, keys and values ``[b, s, 3, a, d]`` to ``[b, s, a, d]``.

    Parameters
    ----------
    parallelism : Parallelism
        The mode, which chooses the layout.
    causal : bool
        Whether a query sees only the keys of its own position and lower ones.
    window : int, optional
        Number of positions, up to its own, whose keys a causal query sees (sliding-window attention); None: all.

    Raises
    ------
    OptionError
        If the window is below 1, or given without `causal`.
    ShapeError
        From `forward`, if the mask of the context is not ``[b, s]``, or its positions are neither ``[s]`` nor
        ``[b, s]``.
    DTypeError
        From `forward`, if the mask is not bool, or the positions are not integers.

    Notes
    -----
    Batch, heads and sequence may be cut, the head dim d may not. Keys count where `Context.mask` is true; a query that
    sees no key gives zeros. The causal order and the window compare `Context.positions`. With `Context.documents`
    they compare places in the sequence, and a query sees keys of its own document only.

    The probabilities are not kept: the backward pass recomputes them, tile by tile, from the peaks and sums of the
    scores. Memory grows linearly with s and falls with the ranks that cut it.

    **Communication:** words received on each of c ranks that cut s in equal blocks. Over axes that cut heads inside,
    all_to_alls of ``3 (c - 1) / c^2`` of ``b s a d`` words for x, of ``(c - 1) / c^2`` for y where the next layer asks
    for it, and as many backward. In a ring ``2 a d`` for each key of another rank that some query of this rank sees,
    forward and again backward, and ``2 a d`` backward for each key of this rank and each other rank that sees it:
    without a causal order ``2 (c - 1) b (s/c) a d`` and ``4 (c - 1) b (s/c) a d``. A mask is gathered over all of these
    axes, ``b s`` bytes; in another layout than `Parallelism.tokens` it is redistributed first.

    References
    ----------
    Jacobs et al.: DeepSpeed Ulysses, 2023 (heads). Liu, Zaharia, Abbeel: Ring attention, 2023. Beltagy, Peters, Cohan:
    Longformer, 2020 (windows).
    """

    def __init__(self, parallelism: Parallelism, *, causal: bool = True, window: int | None = None) -> None:
        self.layout, self.causal = parallelism.attention("bstad", "a", "a"), causal
        self.window = _checked_window(window, causal)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        # X[B, S_(seq,ulysses), 3, A_col, D] -> X[B, S_seq, 3, A_(col,ulysses), D]: all_to_all over ulysses
        packed, (b, s, _, a, d) = x.redistribute(self.layout), x.shape
        cache = _kv_cache(ctx)
        if cache is not None:
            return cache.attend(self, packed[:, :, 0], packed[:, :, 1:], ctx), None
        mask, (q, k, v) = AttentionMask(packed, self.causal, ctx, self.window), self._heads(packed)
        out, statistics = ring.attend(q, (k, v), mask)
        dims, saved = self.layout.dims, (self.save(x, (q, k, v)), out, statistics, mask)
        return DistArray(out, (b, s, a, d), Layout(*dims[:2], *dims[3:]), x.grid), (saved, x.layout.with_partial())

    def _heads(self, packed: DistArray) -> tuple[Block, Block, Block]:
        """Return this rank's queries, keys and values."""
        q, k, v = (_own(packed, t) for t in range(3))
        return q, k, v

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        (saved, out, statistics, mask), layout = cache
        # where x is recomputed: X[B, S_(seq,ulysses), 3, A_col, D] -> X[B, S_seq, 3, A_(col,ulysses), D], all_to_all
        q, k, v = self.load(saved, lambda x: self._heads(x.redistribute(self.layout)))
        dims, (b, s, a, d) = self.layout.dims, dy.shape
        # dY[B, S_(seq,ulysses), A_col, D] -> dO[B, S_seq, A_(col,ulysses), D]: all_to_all over ulysses
        do = dy.redistribute(Layout(*dims[:2], *dims[3:])).local
        block = backend.namespace(do).stack(ring.attend_backward(do, q, (k, v), out, statistics, mask), axis=2)
        # dX[B, S_seq, 3, A_(col,ulysses), D] -> dX[B, S_(seq,ulysses), 3, A_col, D]: all_to_all over ulysses
        return DistArray(block, (b, s, 3, a, d), self.layout, dy.grid).redistribute(layout)


def _checked_window(window: int | None, causal: bool) -> int | None:
    """Return a window; raise OptionError if attention cannot have it."""
    if window is not None and (window < 1 or not causal):
        raise OptionError(f"window={window} with causal={causal}: use a window of 1 or more, with causal=True, or None")
    return window


def _kv_cache(ctx: Context) -> KeyValueCache | None:
    return None if ctx.decoding is None else ctx.decoding.kv_cache


def _own(x: DistArray, t: int) -> Block:
    """Return entry t of dim 2 of this rank's block: a view, or a contiguous copy where it is sent round a ring."""
    block = x.local[:, :, t, ...]
    return backend.contiguous(block) if x.grid.extent(x.layout.dims[1]) > 1 else block


class GroupedAttention(Layer):
    """Grouped-query attention of queries ``[b, s, g, r, d]`` and keys and values ``[b, s, 2, g, d]``.

    Parameters
    ----------
    parallelism : Parallelism
        The mode, which chooses the layouts.
    inner : {"g", "r"}
        The letter that the inside of the block is cut on.
    spread : {"g", "r"}
        The letter that is cut inside attention by the axes that cut s outside it and form no ring.
    causal : bool
        Whether a query sees only the keys of its own position and lower ones.
    window : int, optional
        Number of positions, up to its own, whose keys a causal query sees (sliding-window attention); None: all.

    Raises
    ------
    OptionError
        If the window is below 1, or given without `causal`.
    ShapeError
        From `forward`, if the mask of the context is not ``[b, s]``, or its positions are neither ``[s]`` nor
        ``[b, s]``.
    DTypeError
        From `forward`, if the mask is not bool, or the positions are not integers.

    Notes
    -----
    The input is a pair, the queries and the packed keys and values; the output is ``[b, s, g, r, d]``. The r queries of
    a group share its keys and values. Where r is cut, each rank has the keys and values of every group, and their
    cotangents are partial sums over the axes that cut r. They are handed on as partial sums, unless these axes cut s
    outside.

    **Communication:** as in `Attention`, for queries, and for keys and values; in a ring only the keys and values of
    the g groups travel.

    References
    ----------
    Ainslie et al.: GQA: training generalized multi-query transformer models, 2023.
    """

    def __init__(
        self, parallelism: Parallelism, inner: str, spread: str, *, causal: bool = True, window: int | None = None
    ) -> None:
        self.q, self.kv = (parallelism.attention(letters, inner, spread) for letters in ("bsgrd", "bstgd"))
        self.causal, self.window = causal, _checked_window(window, causal)

    def forward(self, x: tuple[DistArray, DistArray], ctx: Context) -> tuple[DistArray, Cache]:
        # Q[B, S_(seq,ulysses), G_col, R, D] -> Q[B, S_seq, G_col, R_ulysses, D]: all_to_all over ulysses, where it cuts
        # r; then KV[B, S_(seq,ulysses), 2, G_col, D] -> KV[B, S_seq, 2, G_col, D]: allgather over ulysses
        q, kv = (part.redistribute(layout) for part, layout in zip(x, (self.q, self.kv), strict=True))
        cache = _kv_cache(ctx)
        if cache is not None:
            return cache.attend(self, q, kv, ctx), None
        mask, heads, (k, v) = (
            AttentionMask(q, self.causal, ctx, self.window),
            _merged_heads(q),
            (_own(kv, 0), _own(kv, 1)),
        )
        out, statistics = ring.attend(heads, (k, v), mask)
        saved = self.save(x[0], heads), self.save(x[1], (k, v)), out, statistics, mask
        y = q.like(backend.namespace(out).reshape(out, q.local.shape))
        return y, (saved, kv.shape, [part.layout.with_partial() for part in x])

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> tuple[DistArray, DistArray]:
        (saved_q, saved_kv, out, statistics, mask), shape, (q_layout, kv_layout) = cache
        # where q is recomputed: Q[B, S_(seq,ulysses), G_col, R, D] -> Q[B, S_seq, G_col, R_ulysses, D], all_to_all
        heads = self.load(saved_q, lambda q: _merged_heads(q.redistribute(self.q)))
        kv = self.load(saved_kv, self._keys_and_values)
        # dY[B, S_(seq,ulysses), G_col, R, D] -> dO[B, S_seq, G_col, R_ulysses, D]: all_to_all over ulysses
        dy = dy.redistribute(self.q)
        dq, *dkv = ring.attend_backward(_merged_heads(dy), heads, kv, out, statistics, mask)
        xp = backend.namespace(dy.local)
        # each rank has the terms of its own queries: dKV[B, S_seq, 2, G, D] {U_r} over the axes that cut r
        shared = [axis for axis in dy.layout.cut if axis not in self.kv.cut]
        summed = DistArray(xp.stack(dkv, axis=2), shape, self.kv.with_partial(*shared), dy.grid)
        left = kv_layout.with_partial(*[axis for axis in shared if axis not in kv_layout.cut])
        # dQ -> dQ[B, S_(seq,ulysses), G_col, R, D]: all_to_all over ulysses, where it cuts r; then
        # dKV {U_ulysses} -> dKV[B, S_(seq,ulysses), 2, G_col, D]: reduce_scatter over ulysses
        return dy.like(xp.reshape(dq, dy.local.shape)).redistribute(q_layout), summed.redistribute(left)

    def _keys_and_values(self, kv: DistArray) -> tuple[Block, Block]:
        # KV[B, S_(seq,ulysses), 2, G_col, D] -> KV[B, S_seq, 2, G_col, D]: allgather over ulysses, where it cuts r
        kv = kv.redistribute(self.kv)
        return _own(kv, 0), _own(kv, 1)


def _merged_heads(q: DistArray) -> Block:
    """Return this rank's queries ``[b, s, g, r, d]`` as ``[b, s, g r, d]``."""
    b, s, g, r, d = q.local.shape
    block: Block = backend.namespace(q.local).reshape(q.local, (b, s, g * r, d))
    return block


class SelfAttention(Sequential):
    """Self-attention of the residual stream ``[b, s, h]``, multi-head or grouped-query, with its products.

    Parameters
    ----------
    hidden : int
        Width h of the stream.
    heads : int
        Number a of heads of queries.
    parallelism : Parallelism
        The mode, which chooses maps and layouts.
    name : str
        Prefix of the names of the parameters. Multi-head: ``qkv.weight [h, 3, a, d]``, ``qkv.bias [3, a, d]``,
        ``out.weight [a, d, h]`` and ``out.bias [h]``. With g groups of r heads: ``q.weight [h, g, r, d]``,
        ``kv.weight [h, 2, g, d]``, ``out.weight [g, r, d, h]``, and the biases ``q.bias [g, r, d]``,
        ``kv.bias [2, g, d]`` and ``out.bias [h]``. Names and shapes are the same on every grid.
    groups : int, optional
        Number g of groups of heads that share keys and values: head i belongs to group ``i // (heads / groups)``. By
        default as many as heads, which is multi-head attention.
    rotary : Rotary, optional
        Rotates queries and keys by their positions; None: attention does not depend on positions.
    causal : bool
        Whether a query sees only the keys of its own position and lower ones.
    window : int, optional
        Number of positions, up to its own, whose keys a causal query sees (sliding-window attention); None: all.
    qk_norm : float, optional
        Normalise the queries and the keys of each head by `RMSNorm` with this epsilon, before they are rotated; None:
        they are taken as they are. The gains are ``q_norm.gain [d]`` and ``k_norm.gain [d]``.
    bias : bool
        Whether the input products have biases.
    out_bias : bool, optional
        Whether the output product has a bias; by default as `bias`.
    width : int, optional
        Width d of a head; by default ``hidden / heads``.
    std : float
        Standard deviation of the initial weights of the input products.
    out_std : float
        Standard deviation of the initial weight of the output product.
    seed : int, optional
        Seed of the initial weights; None leaves them zero, for weights that are to be loaded.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    OptionError
        If the window is below 1, or given without `causal`.
    ShapeError
        If `heads` does not divide `hidden` and no width is given, if `groups` does not divide `heads`, or if the width
        is odd and `rotary` is given.

    Notes
    -----
    The inside is cut on the heads. Grouped heads are cut on the groups, or, where there are fewer groups than ranks, on
    the queries of each group; the ranks then have copies of the keys and values, and all compute them. Axes that cut
    the sequence outside attention and heads inside it choose between the two independently.

    **Communication:** the collectives of the products (`Linear`) and of `Attention`; with groups, the stream is
    gathered once for both input products, and its cotangent is reduced once. Where c ranks cut the r queries of a
    group, the cotangents of keys and values of n = b s tokens are summed for ``2 (c - 1) 2 n g d`` words.

    References
    ----------
    Vaswani et al.: Attention is all you need, 2017. Shazeer: Fast transformer decoding, 2019. Ainslie et al.: GQA:
    training generalized multi-query transformer models, 2023.

    Examples
    --------
    >>> SelfAttention(768, 12, Parallelism(Grid(col=4), "1d"), "attention", groups=4)
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
        window: int | None = None,
        qk_norm: float | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        width: int | None = None,
        std: float = 0.02,
        out_std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        groups = heads if groups is None else groups
        width = head_width(hidden, heads, groups, width)
        if rotary is not None:
            rotary.frequencies(width)  # refuses an odd width
        sizes = {"h": hidden, "a": heads, "g": groups, "r": heads // groups, "d": width}
        common: dict[str, Any] = {"bias": bias, "std": std, "seed": seed, "dtype": dtype}
        parts = _multi_head if groups == heads else _grouped
        order: dict[str, Any] = {"causal": causal, "window": window}
        norms: dict[str, Any] | None = None if qk_norm is None else {"eps": qk_norm, "dtype": dtype}
        heads_of, subscripts, inner = parts(sizes, parallelism, name, (norms, rotary, order), common)
        common |= {"bias": bias if out_bias is None else out_bias, "std": out_std}
        super().__init__(*heads_of, Linear(subscripts, sizes, inner, parallelism, f"{name}.out", **common))


_Core = tuple[dict[str, Any] | None, Rotary | None, dict[str, Any]]
"""Options of the norms of queries and keys, the rotation, and the options of attention."""


def _multi_head(
    sizes: dict[str, int],
    p: Parallelism,
    name: str,
    core: _Core,
    common: dict[str, Any],
) -> tuple[list[Layer], str, str]:
    """Return the layers before the output product, and the subscripts and the inner letter of that product."""
    norms, rotary, order = core
    turn: list[Layer] = [] if rotary is None else [Rotation(rotary, 2)]
    if norms is not None:
        turn = [HeadNorm(sizes["d"], p, f"{name}.{x}_norm", t, **norms) for t, x in enumerate("qk")] + turn
    qkv = Linear("bsh,htad->bstad", {**sizes, "t": 3}, "a", p, f"{name}.qkv", **common)
    return [qkv, *turn, Attention(p, **order)], "bsad,adh->bsh", "a"


def _grouped(
    sizes: dict[str, int],
    p: Parallelism,
    name: str,
    core: _Core,
    common: dict[str, Any],
) -> tuple[list[Layer], str, str]:
    """Return the layers before the output product, and the subscripts and the inner letter of that product."""
    heads = {letter: sizes[letter] for letter in "gr"}
    spread = p.spread(heads, inner := p.inner(heads))
    norms, rotary, order = core
    turn: list[Layer] = [] if rotary is None else [Parallel(Rotation(rotary), Rotation(rotary, 1))]
    if norms is not None:
        both = HeadNorm(sizes["d"], p, f"{name}.q_norm", **norms), HeadNorm(sizes["d"], p, f"{name}.k_norm", 0, **norms)
        turn = [Parallel(*both), *turn]
    products = Linears(
        Linear("bsh,hgrd->bsgrd", sizes, inner, p, f"{name}.q", **common),
        Linear("bsh,htgd->bstgd", {**sizes, "t": 2}, inner, p, f"{name}.kv", replicate="r", **common),
    )
    return [products, *turn, GroupedAttention(p, inner, spread, **order)], "bsgrd,grdh->bsh", inner


def head_width(hidden: int, heads: int, groups: int, width: int | None = None) -> int:
    """Return the width of a head.

    Parameters
    ----------
    hidden : int
        Width of the residual stream.
    heads : int
        Number of heads of queries.
    groups : int
        Number of groups of heads that share keys and values.
    width : int, optional
        The width, if it is given; by default ``hidden / heads``.

    Returns
    -------
    int
        The width.

    Raises
    ------
    ShapeError
        If the heads do not divide `hidden` and no width is given, or the groups do not divide the heads.
    """
    if width is None and hidden % heads:
        fitting = [str(n) for n in range(1, min(hidden, 4 * heads) + 1) if hidden % n == 0]
        raise ShapeError(f"{heads} heads do not divide hidden={hidden}: use heads in {{{', '.join(fitting)}}}")
    if groups < 1 or heads % groups:
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ShapeError(f"{groups} groups do not divide {heads} heads: use groups in {{{', '.join(fitting)}}}")
    return width or hidden // heads
