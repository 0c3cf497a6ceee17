"""Recompute: what the backward pass needs is made again instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.activation import Activation, Gated
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.mlp import MLP
from colossal_mpi.layers.moe import MoE
from colossal_mpi.layers.norm import RMSNorm
from colossal_mpi.layers.replay import Replay, Replayable

AnyLayer = TypeVar("AnyLayer", bound=Layer)


class Recompute(Layer):
    """A layer that keeps its input alone, and does its forward pass again in the backward pass.

    The gradients have the same bits as without.

    Parameters
    ----------
    layer : Layer
    defer : bool
        Whether weight products may be put off, as zero-bubble does to fill the bubble: what they need is then kept
        until they are done. By default they are done at once.

    Notes
    -----
    All is done again but the last product of a chain, of which only the operands are needed. For a block of width h and
    4 h inside, ``16 h^2`` flop a token come to the ``72 h^2`` of a step, 2/9, and to attention itself the third of it
    that its forward pass is. Where dropout follows the last product that is done again, too, 1/3 in all.

    **Communication:** once more that of the forward pass, but for the last product's result.

    References
    ----------
    Chen et al.: Training deep nets with sublinear memory cost, 2016. Korthikanti et al.: Reducing activation
    recomputation in large transformer models, 2022.
    """

    def __init__(self, layer: Layer, defer: bool = False) -> None:
        self.layer, self.defer = layer, defer

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        """Return the layer's output."""
        return self.layer.forward(x, ctx)[0], Replay.of(self.layer, x, ctx)

    def replay(self, x: Any, ctx: Context) -> Any:
        """Return what makes the layer's cache again."""
        return Replay.of(self.layer, x, ctx)

    def backward(self, dy: Any, cache: Any, later: Later = None) -> Any:
        """Return the layer's cotangent of the input."""
        return self.layer.backward(dy, cache.cache(), later if self.defer else None)


class Discard(Layer):
    """A layer whose output the next product does not keep: it is made again for the product's weight gradient.

    For layers that are cheap and keep their input anyway, such as norms and activations.

    Parameters
    ----------
    layer : Layer

    Notes
    -----
    **Communication:** that of the layer's forward pass once more, and, where gathered operands are kept, another gather
    of the output, ``mk(P_n - 1)`` words of the product that takes it.

    References
    ----------
    Korthikanti et al.: Reducing activation recomputation in large transformer models, 2022.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        """Return the layer's output."""
        y, cache = self.layer.forward(x, ctx)
        return Replayable(y.local, y.shape, y.layout, y.grid, Replay.of(self.layer, x, ctx)), cache

    def replay(self, x: Any, ctx: Context) -> Any:
        """Return the layer's cache."""
        return self.layer.replay(x, ctx)

    def backward(self, dy: Any, cache: Any, later: Later = None) -> Any:
        """Return the layer's cotangent of the input."""
        return self.layer.backward(dy, cache, later)


Wrapper = Callable[[Layer], Layer]

KINDS: dict[str, tuple[type[Layer], tuple[type[Layer], ...]]] = {
    "block": (Recompute, (TransformerBlock,)),
    "attention": (Recompute, (SelfAttention,)),
    "mlp": (Recompute, (MLP, MoE)),
    "norm": (Discard, (RMSNorm,)),
    "activation": (Discard, (Activation, Gated)),
}
"""What may be made again: whole layers from their inputs, or outputs alone."""

MODES: dict[str, tuple[str, ...]] = {"none": (), "selective": ("norm", "activation"), "full": ("block",)}
"""Kinds by the names of configurations."""


def recompute(model: AnyLayer, kinds: str | Sequence[str], defer: bool = False) -> AnyLayer:
    """Let a model make again, in the backward pass, what layers of some kinds would keep; return the model itself.

    Names of parameters, stages, checkpoints and descriptions of the model are what they were.

    Parameters
    ----------
    model : Layer
        Whose parts are changed in place.
    kinds : {"none", "selective", "full"} or sequence of str
        ``"full"``: each transformer block keeps its input alone. ``"selective"``: the outputs of norms and activations
        are not kept, for less than a hundredth of the flops. Or any of the `KINDS`: ``"block"``, ``"attention"`` and
        ``"mlp"`` (or experts), of which only the input is kept, ``"norm"`` and ``"activation"``, whose outputs are not.
    defer : bool
        As `Recompute` takes it.

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
    """Put the parts of a layer that are of a chosen kind into their wrappers, none into one of its own kind.

    A gated activation has an activation that it does not call as a layer.
    """
    inside = [kind for kind in chosen if not isinstance(layer, kind[1])]

    def wrapped(part: Any) -> Any:
        if not isinstance(part, Layer):
            return part
        _wrap_parts(part, inside)
        if isinstance(layer, Recompute | Discard):
            return part
        return next((wrapper(part) for wrapper, kinds in inside if isinstance(part, kinds)), part)

    for name, value in vars(layer).items():
        setattr(layer, name, [wrapped(item) for item in value] if isinstance(value, list) else wrapped(value))
