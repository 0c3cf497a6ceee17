"""Floating-point operations of a training step, in the two conventions of utilisation.

*Model flop* are those that the mathematics asks for, whatever a program does: PaLM's ``6 N + 12 L s a d`` of a token, N
the weights that it is multiplied with and L s a d the scores of its a heads of width d in L layers, those that a mask
hides counted as well. *Hardware flop* are those that are done: hidden scores only where they share a tile with one that
is seen, probabilities once more in the backward pass, and what `recompute` makes again. In both a product of m x k and
k x n counts 2 m k n, and only products count: biases, norms, activations, softmax, losses and the optimizer are left
out. A product that ranks do redundantly counts once.

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
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.conv import Convolution, PatchEmbedding
from colossal_mpi.layers.kernels.reference.tiles import scores
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.moe import MoE
from colossal_mpi.layers.recompute import Discard, Recompute
from colossal_mpi.linalg.contraction.subscripts import parse


@dataclass(frozen=True)
class Shape:
    """What goes through a layer: samples, each of so many positions of the residual stream."""

    samples: int
    length: int


@dataclass(frozen=True)
class Flop:
    """Operations of the two passes through a layer."""

    forward: int = 0
    backward: int = 0
    replay: int = 0
    """Those of `Layer.replay`."""

    def __add__(self, other: Flop) -> Flop:
        return Flop(self.forward + other.forward, self.backward + other.backward, self.replay + other.replay)


def model_flop(model: Layer, samples: int, length: int) -> int:
    """Return the operations of forward and backward that the mathematics asks for.

    Parameters
    ----------
    model : Layer
        Of transformer blocks or parts of them; its weights need not be made.
    samples : int
        All of a step, over all ranks and microbatches.
    length : int
        Positions of the residual stream of a sample.

    Raises
    ------
    OptionError
        If the model has a convolution other than that of patches: its windows are not the positions of a stream.
    """
    return 3 * _flop(model, Shape(samples, length), False).forward


def hardware_flop(model: Layer, samples: int, length: int) -> int:
    """Return the operations of forward and backward that the ranks do, as the reference's kernels tile attention.

    Takes and raises what `model_flop` does.
    """
    done = _flop(model, Shape(samples, length), True)
    return done.forward + done.backward


@singledispatch
def _flop(layer: Layer, shape: Shape, hardware: bool) -> Flop:
    """Return the operations of a layer; those of its parts, unless it is of a kind with a rule of its own."""
    return _in_full(sum((_flop(part, shape, hardware) for part in _parts(layer)), Flop()))


def _in_full(flop: Flop) -> Flop:
    """Return operations of a layer that does its whole forward pass again."""
    return replace(flop, replay=flop.forward)


def _parts(layer: Layer) -> Iterator[Layer]:
    for value in vars(layer).values():
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Layer))


def _product(rows: int, weight: tuple[int, ...]) -> Flop:
    """Return the operations of a product, of which the backward pass needs the operands alone."""
    forward = 2 * rows * math.prod(weight)
    return Flop(forward, 2 * forward)


@_flop.register
def _(layer: Sequential, shape: Shape, hardware: bool) -> Flop:
    *parts, last = [_flop(part, shape, hardware) for part in layer.layers] or [Flop()]
    return sum(map(_in_full, parts), last)


@_flop.register
def _(layer: Recompute, shape: Shape, hardware: bool) -> Flop:
    inside = _flop(layer.layer, shape, hardware)
    return Flop(inside.forward, inside.backward + inside.replay)


@_flop.register
def _(layer: Discard, shape: Shape, hardware: bool) -> Flop:
    inside = _flop(layer.layer, shape, hardware)
    return replace(inside, backward=inside.backward + inside.forward)


@_flop.register
def _(layer: Linear, shape: Shape, hardware: bool) -> Flop:
    letters = parse(layer.product.subscripts).a
    return _product(shape.samples * (shape.length if "s" in letters else 1), layer.weight.shape)


@_flop.register
def _(layer: Convolution, shape: Shape, hardware: bool) -> Flop:
    if not isinstance(layer, PatchEmbedding):
        raise OptionError(f"{layer.name}: only of transformers, whose images come as patches, are the flop known")
    lead = 0 if hardware else layer.lead  # the positions before the patches have windows of zeros
    return _in_full(_product(shape.samples * (shape.length - lead), layer.weight.shape))


@_flop.register
def _(layer: MoE, shape: Shape, hardware: bool) -> Flop:
    """Count the slots that tokens fill; the others depend on how the router balances."""
    rows = shape.samples * shape.length * layer.top_k
    weights = [part.weight.shape for part in layer.experts.layers if isinstance(part, Linear)]
    return _in_full(sum((_product(rows, weight[1:]) for weight in weights), _flop(layer.router, shape, hardware)))


@_flop.register
def _(layer: SelfAttention, shape: Shape, hardware: bool) -> Flop:
    *before, out = layer.layers
    assert isinstance(out, Linear)
    *heads, width, _ = out.weight.shape
    causal = any(getattr(part, "causal", False) for part in before)
    count, s = shape.samples * math.prod(heads) * width, shape.length
    made = scores(s, s, heads[-1] if len(heads) > 1 else 1, causal) if hardware else s * s
    # Scores and output; backward dq, dk, dv, the cotangent of the probabilities and, as they are not kept, the scores.
    own = Flop(2 * 2 * made * count, 2 * (5 if hardware else 4) * made * count)
    parts = [own, *(_flop(part, shape, hardware) for part in before)]
    return sum(map(_in_full, parts), _flop(out, shape, hardware))
