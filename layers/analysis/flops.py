"""Floating-point operations of a training step, in the two conventions of utilisation.

*Model flop* are the operations that the mathematics asks for, whatever a program does: PaLM's ``6 N + 12 L s a d`` for
a token, where N is the number of weights that the token is multiplied with and L s a d are the scores of a heads of
width d in L layers; with a window of w positions they are L w a d. Other scores that a mask hides count as well.
*Hardware flop* are the operations that the ranks do: they include hidden scores only where these share a tile with a
visible one, and they include the probabilities that the backward pass recomputes and everything that `recompute`
repeats.

In both conventions a product of m x k and k x n counts 2 m k n, and only products count: biases, norms, activations,
softmax, losses and the optimizer are left out. A product that several ranks do redundantly counts once.

The meter of a training run divides these numbers by its seconds (MFU and HFU). This module has one rule for each kind
of layer; `flop_of` finds it.

References
----------
Chowdhery et al.: PaLM, 2022, appendix B. Korthikanti et al.: Reducing activation recomputation in large transformer
models, 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.activation import Activation, Softmax
from colossal_mpi.layers.attention.rotary import Rotation
from colossal_mpi.layers.attention.self_attention import Attention, GroupedAttention, SelfAttention
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.conv import Convolution, PatchEmbedding
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding, SegmentEmbedding
from colossal_mpi.layers.kernels import attention_scores
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.lora import LowRank, linears
from colossal_mpi.layers.moe import MoE
from colossal_mpi.layers.norm import RMSNorm
from colossal_mpi.layers.pooling import FirstPool, MeanPool, Pool2d
from colossal_mpi.layers.recompute import Discard, Recompute
from colossal_mpi.linalg.contraction import parse


@dataclass(frozen=True)
class StreamShape:
    """The shape of the residual stream that a layer is applied to, without its width.

    Parameters
    ----------
    samples : int
        Samples of a step, over all ranks and microbatches.
    length : int
        Positions of each sample.
    """

    samples: int
    length: int


@dataclass(frozen=True)
class Flop:
    """The operations of the passes through a layer, in flop.

    Parameters
    ----------
    forward : int
        Operations of the forward pass.
    backward : int
        Operations of the backward pass.
    replay : int
        Operations of `Layer.replay`, which recomputes the cache of the backward pass.
    """

    forward: int = 0
    backward: int = 0
    replay: int = 0

    def __add__(self, other: Flop) -> Flop:
        return Flop(self.forward + other.forward, self.backward + other.backward, self.replay + other.replay)


def model_flop(model: Layer, samples: int, length: int) -> int:
    """Return the operations of forward and backward pass that the mathematics asks for.

    Parameters
    ----------
    model : Layer
        A model of transformer blocks or a part of one. Its weights need not exist yet.
    samples : int
        Samples of a step, over all ranks and microbatches.
    length : int
        Positions of the residual stream in each sample.

    Returns
    -------
    int
        Operations of all ranks together, in flop. The gradient of a frozen weight is none of them.

    Raises
    ------
    OptionError
        If the model has a layer without a rule (see `flop_of`), or a convolution that is no `PatchEmbedding`: its
        windows are not the positions of a stream.
    """
    shape = StreamShape(samples, length)
    frozen = (flop_of(linear, shape, False) for linear in linears(model) if linear.weight.frozen)
    return 3 * flop_of(model, shape, False).forward - sum(2 * flop.forward - flop.backward for flop in frozen)


def hardware_flop(model: Layer, samples: int, length: int) -> int:
    """Return the operations of forward and backward pass that the ranks do, with the reference's tiles of attention.

    Parameters
    ----------
    model : Layer
        A model of transformer blocks or a part of one. Its weights need not exist yet.
    samples : int
        Samples of a step, over all ranks and microbatches.
    length : int
        Positions of the residual stream in each sample.

    Returns
    -------
    int
        Operations of all ranks together, in flop.

    Raises
    ------
    OptionError
        In the cases of `model_flop`.
    """
    done = flop_of(model, StreamShape(samples, length), True)
    return done.forward + done.backward


@singledispatch
def flop_of(layer: Layer, shape: StreamShape, hardware: bool) -> Flop:
    """Return the operations of a layer, by the rule of its class or as the sum over its parts.

    A layer that has no parts needs a rule: register one for a class of your own. A layer that has parts and does
    products itself needs one, too, because the sum over its parts leaves those products out.

    Parameters
    ----------
    layer : Layer
        Any layer.
    shape : StreamShape
        Samples and positions that go through it.
    hardware : bool
        Whether to count hardware flop; otherwise model flop.

    Returns
    -------
    Flop
        Operations of all ranks together.

    Raises
    ------
    OptionError
        If the layer has neither a rule nor parts.

    Examples
    --------
    >>> @flop_of.register
    ... def _(layer: Outer, shape: StreamShape, hardware: bool) -> Flop:
    ...     forward = 2 * shape.samples * shape.length**2 * layer.width
    ...     return Flop(forward, 2 * forward, forward)
    """
    parts = list(_parts(layer))
    if not parts:
        kind = type(layer).__name__
        raise OptionError(
            f"{layer.label}: there is no rule for the flop of {kind}: register one, "
            f"colossal_mpi.layers.analysis.flop_of.register({kind}, rule)"
        )
    return _replayed_in_full(sum((flop_of(part, shape, hardware) for part in parts), Flop()))


def _replayed_in_full(flop: Flop) -> Flop:
    """Return the operations of a layer whose replay is its whole forward pass."""
    return replace(flop, replay=flop.forward)


def _parts(layer: Layer) -> Iterator[Layer]:
    """Yield the layers that are attributes of a layer, or items of its lists."""
    for value in vars(layer).values():
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Layer))


def _product(rows: int, weight: tuple[int, ...]) -> Flop:
    """Return the operations of a product whose replay does nothing: its backward pass needs the operands alone."""
    forward = 2 * rows * math.prod(weight)  # X[rows, K] . W[K, N]: dX = dY . W^T and dW = X^T . dY take as much each
    return Flop(forward, 2 * forward)


def _no_products(layer: Layer, shape: StreamShape, hardware: bool) -> Flop:
    """Return zero flop: elementwise layers, norms, look-ups and pooling have no products."""
    return Flop()


for _kind in (
    Activation,
    Dropout,
    Embedding,
    FirstPool,
    MeanPool,
    Pool2d,
    PositionEmbedding,
    RMSNorm,
    Rotation,
    SegmentEmbedding,
    Softmax,
):
    flop_of.register(_kind, _no_products)


@flop_of.register
def _(layer: Sequential, shape: StreamShape, hardware: bool) -> Flop:
    *parts, last = [flop_of(part, shape, hardware) for part in layer.layers] or [Flop()]
    return sum(map(_replayed_in_full, parts), last)


@flop_of.register
def _(layer: Recompute, shape: StreamShape, hardware: bool) -> Flop:
    inside = flop_of(layer.layer, shape, hardware)
    return Flop(inside.forward, inside.backward + inside.replay)


@flop_of.register
def _(layer: Discard, shape: StreamShape, hardware: bool) -> Flop:
    inside = flop_of(layer.layer, shape, hardware)
    return replace(inside, backward=inside.backward + inside.forward)


@flop_of.register
def _(layer: Linear, shape: StreamShape, hardware: bool) -> Flop:
    letters = parse(layer.product.subscripts).a
    rows = shape.samples * (shape.length if "s" in letters else 1)
    flop = _product(rows, layer.weight.shape)
    if layer.weight.frozen:
        flop = replace(flop, backward=flop.forward)  # the cotangent of the input alone
    return flop + flop_of(layer.adapter, shape, hardware) if isinstance(layer.adapter, LowRank) else flop


@flop_of.register
def _(layer: LowRank, shape: StreamShape, hardware: bool) -> Flop:
    return flop_of(layer.a, shape, hardware) + flop_of(layer.b, shape, hardware)


@flop_of.register
def _(layer: Convolution, shape: StreamShape, hardware: bool) -> Flop:
    if not isinstance(layer, PatchEmbedding):
        raise OptionError(
            f"{layer.name}: the flop of a convolution are known for the patches of a transformer only, because the "
            "windows of an image are not the positions of a stream"
        )
    lead = 0 if hardware else layer.lead  # the positions before the patches have windows of zeros
    return _replayed_in_full(_product(shape.samples * (shape.length - lead), layer.weight.shape))


@flop_of.register
def _(layer: MoE, shape: StreamShape, hardware: bool) -> Flop:
    """Count the slots that tokens fill; how many others there are depends on the balance of the router."""
    rows = shape.samples * shape.length * layer.top_k
    weights = [part.weight.shape for part in layer.experts.layers if isinstance(part, Linear)]
    experts = (_product(rows, weight[1:]) for weight in weights)  # W[E, H, F]: each row meets one expert
    return _replayed_in_full(sum(experts, flop_of(layer.router, shape, hardware)))


@flop_of.register
def _(layer: SelfAttention, shape: StreamShape, hardware: bool) -> Flop:
    *before, out = layer.layers
    assert isinstance(out, Linear)
    *heads, width, _ = out.weight.shape
    causal = any(getattr(part, "causal", False) for part in before)
    count, s = shape.samples * math.prod(heads) * width, shape.length
    window = next((part.window for part in before if isinstance(part, Attention | GroupedAttention)), None)
    seen = s if window is None else min(s, window)
    pairs = attention_scores(s, s, heads[-1] if len(heads) > 1 else 1, causal, window) if hardware else s * seen
    # Forward Q . K^T and P . V; backward dQ, dK, dV, dP and, since P is not kept, the scores once more.
    core = Flop(2 * 2 * pairs * count, 2 * (5 if hardware else 4) * pairs * count)
    products = [part for part in before if not isinstance(part, Attention | GroupedAttention)]
    parts = [core, *(flop_of(part, shape, hardware) for part in products)]
    return sum(map(_replayed_in_full, parts), flop_of(out, shape, hardware))
