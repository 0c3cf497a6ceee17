"""Recomputation: layers whose cache, or whose output, is recomputed in the backward pass instead of being kept.

`recompute` wraps the layers of a finished model; the trainer and plans call it. The wrappers rely on `Layer.replay`,
`Layer.save` and `Layer.load`, so that every layer takes part without knowing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.activation import Activation, Gated
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Arrays, Cache, Later, Layer, Replay, Replayable
from colossal_mpi.layers.mlp import MLP
from colossal_mpi.layers.moe import MoE
from colossal_mpi.layers.norm import RMSNorm

AnyLayer = TypeVar("AnyLayer", bound=Layer)


class Recompute(Layer):
    """A layer that keeps its input alone and repeats its forward pass in the backward pass.

    Parameters
    ----------
    layer : Layer
        The layer, as a rule a whole block.
    defer : bool
        Whether products of weight gradients may be put off, as zero-bubble schedules do to fill the bubble: the arrays
        that they need are then kept until they are done. By default they are done at once.

    Notes
    -----
    The gradients have the same bits as without it. Everything is repeated except the last product of a sequence,
    because the backward pass needs only its operands. For a block of width h with an MLP of 4 h, ``16 h^2`` flop a
    token are added to the ``72 h^2`` of a step, 2/9, and attention itself repeats its forward pass, a third of its
    step. Where dropout follows the last product, this product is repeated, too: 1/3 of the step in all.

    **Communication:** once more the words of the forward pass, except for the result of the last product.

    References
    ----------
    Chen et al.: Training deep nets with sublinear memory cost, 2016. Korthikanti et al.: Reducing activation
    recomputation in large transformer models, 2022.
    """

    def __init__(self, layer: Layer, defer: bool = False) -> None:
        self.layer, self.defer = layer, defer

    def forward(self, x: Arrays, ctx: Context) -> tuple[Arrays, Cache]:
        return self.layer.forward(x, ctx)[0], Replay.of(self.layer, x, ctx)

    def replay(self, x: Arrays, ctx: Context) -> Cache:
        return Replay.of(self.layer, x, ctx)

    def backward(self, dy: Arrays, cache: Cache, later: Later = None) -> Arrays:
        return self.layer.backward(dy, cache.cache(), later if self.defer else None)


class Discard(Layer):
    """A layer whose output the next layer does not keep: it is recomputed when that layer's backward pass loads it.

    It suits cheap layers that keep their input anyway, such as norms and activations: selective recomputation.

    Parameters
    ----------
    layer : Layer
        The layer, which returns one array.

    Notes
    -----
    **Communication:** once more the words of the layer's forward pass; and, where gathered operands are kept, the next
    product gathers the output a second time, ``mk(P_n - 1)`` words.

    References
    ----------
    Korthikanti et al.: Reducing activation recomputation in large transformer models, 2022.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, x: Arrays, ctx: Context) -> tuple[DistArray, Cache]:
        y, cache = self.layer.forward(x, ctx)
        return Replayable(y.local, y.shape, y.layout, y.grid, Replay.of(self.layer, x, ctx)), cache

    def replay(self, x: Arrays, ctx: Context) -> Cache:
        return self.layer.replay(x, ctx)

    def backward(self, dy: Arrays, cache: Cache, later: Later = None) -> Arrays:
        return self.layer.backward(dy, cache, later)


Wrapper = Callable[[Layer], Layer]

KINDS: dict[str, tuple[type[Layer], tuple[type[Layer], ...]]] = {
    "block": (Recompute, (TransformerBlock,)),
    "attention": (Recompute, (SelfAttention,)),
    "mlp": (Recompute, (MLP, MoE)),
    "norm": (Discard, (RMSNorm,)),
    "activation": (Discard, (Activation, Gated)),
}
"""The layers that may be recomputed: whole layers from their inputs (`Recompute`), or outputs alone (`Discard`)."""

MODES: dict[str, tuple[str, ...]] = {"none": (), "selective": ("norm", "activation"), "full": ("block",)}
"""The kinds that each name in a configuration stands for."""


def recompute(model: AnyLayer, kinds: str | Sequence[str], defer: bool = False) -> AnyLayer:
    """Let a model recompute, in the backward pass, the arrays that layers of some kinds would keep.

    Names of parameters, pipeline stages, checkpoints and descriptions of the model stay what they are.

    Parameters
    ----------
    model : Layer
        The model, whose parts are wrapped in place.
    kinds : {"none", "selective", "full"} or sequence of str
        With ``"full"`` each transformer block keeps its input alone. With ``"selective"`` the outputs of norms and
        activations are not kept, for less than a hundredth of the flop more. A sequence chooses among ``"block"``,
        ``"attention"`` and ``"mlp"`` (or experts), which keep their input alone, and ``"norm"`` and ``"activation"``,
        whose outputs are not kept.
    defer : bool
        Whether `Recompute` layers may put off their products of weight gradients.

    Returns
    -------
    Layer
        The model itself.

    Raises
    ------
    OptionError
        If there is no such mode or kind.

    Examples
    --------
    >>> model = recompute(GPT(config, parallelism), "full")
    """
    chosen = MODES.get(kinds) if isinstance(kinds, str) else tuple(kinds)
    if chosen is None or not set(chosen) <= set(KINDS):
        raise OptionError(
            f"recompute {kinds!r}: use one of {', '.join(map(repr, MODES))}, or some of the kinds {', '.join(KINDS)}"
        )
    wrappers: dict[type, Wrapper] = {Recompute: partial(Recompute, defer=defer), Discard: Discard}
    _wrap_parts(model, [(wrappers[wrapper], classes) for wrapper, classes in (KINDS[kind] for kind in chosen)])
    return model


def _wrap_parts(layer: Layer, chosen: Sequence[tuple[Wrapper, tuple[type[Layer], ...]]]) -> None:
    """Wrap the parts of a layer that are of a chosen kind.

    A part is not wrapped inside a layer of its own kind: a gated activation has an activation whose function it calls
    itself.
    """
    inside = [kind for kind in chosen if not isinstance(layer, kind[1])]

    def wrapped(part: object) -> object:
        if not isinstance(part, Layer):
            return part
        _wrap_parts(part, inside)
        if isinstance(layer, Recompute | Discard):
            return part
        return next((wrapper(part) for wrapper, kinds in inside if isinstance(part, kinds)), part)

    for name, value in vars(layer).items():
        setattr(layer, name, [wrapped(item) for item in value] if isinstance(value, list) else wrapped(value))
