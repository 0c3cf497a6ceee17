"""Layers made of PyTorch's own modules, with copies of their weights.

User programs call `from_module`. It constructs a layer of ``layers`` with the sizes and options of the module, and
copies each rank's block of every weight by ``dlpack``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from colossal_mpi import dlpack
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.embedding import Embedding
from colossal_mpi.layers.layer import Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import LayerNorm, RMSNorm
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout, index_of
from colossal_mpi.platform import backend

Weights = Mapping[str, torch.Tensor]
"""Whole weights in the shapes of our parameters, by their names without the prefix: views of torch's weights."""


def from_module(
    module: nn.Module, parallelism: Parallelism, name: str | None = None, *, into: str = "inside", causal: bool = False
) -> Layer:
    """Return a layer that computes the same as a PyTorch module, in any tensor mode, with a copy of its weights.

    Parameters
    ----------
    module : torch.nn.Module
        A ``Linear``, ``LayerNorm``, ``RMSNorm``, ``Embedding``, ``MultiheadAttention`` (as self-attention) or
        ``TransformerEncoderLayer``, the same on every rank, on any device. Each rank copies only its blocks.
    parallelism : Parallelism
        The grid and the tensor mode of the layer.
    name : str, optional
        Prefix of the names of the parameters, unique in the model; by default the class in lower case.
    into : {"inside", "stream"}
        Where the output of a ``Linear`` goes: to the inside of a block, ``[b, s, h]`` to ``[b, s, f]``, or back to the
        residual stream. If two follow each other, the first goes inside and the second to the stream.
    causal : bool
        Whether attention is causal; torch modules get this as an argument of each call.

    Returns
    -------
    Layer
        A layer on arrays ``[b, s, h]``, or ``[s, b, h]`` if the module has ``batch_first=False``. Attention returns its
        output without the attention weights; keys are masked by `Context.mask`.

    Raises
    ------
    OptionError
        If the module is of another class, overrides the forward pass, or has options that our layers lack; the error
        names them.

    See Also
    --------
    colossal_mpi.layers.torch.as_module : The way back.

    Notes
    -----
    **Communication:** none.

    Examples
    --------
    >>> block = from_module(torch.nn.TransformerEncoderLayer(512, 8, dropout=0.0), Parallelism(grid, "2d"))
    """
    if into not in ("inside", "stream"):
        raise OptionError(f"from_module: into={into!r}: use 'inside' or 'stream'")
    if any(weight.is_meta for weight in module.parameters()):
        raise OptionError(f"from_module: {type(module).__name__} has weights on 'meta', which have no values to copy")
    for kind, convert in _CONVERSIONS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            source = _Source(module, parallelism, name or kind.__name__.lower(), into, causal)
            layer, weights = convert(source)
            _fill(layer, source.name, weights)
            first = getattr(getattr(module, "self_attn", module), "batch_first", True)
            return layer if first else SequenceFirst(layer)
    known = ", ".join(kind.__name__ for kind in _CONVERSIONS)
    raise OptionError(f"from_module: {type(module).__name__} with a forward pass of its own is none of {known}")


class SequenceFirst(Layer):
    """A layer on arrays ``[b, s, h]``, called with arrays ``[s, b, h]``. The context's mask stays ``[b, s]``."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        # X[s, b, h] -> X[b, s, h]; the layer; Y[b, s, h] -> Y[s, b, h]: views, nothing moves
        y, cache = self.layer.forward(_swapped(x), ctx)
        return _swapped(y), cache

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        return _swapped(self.layer.backward(_swapped(dy), cache, later))


def _swapped(x: DistArray) -> DistArray:
    b, s, *rest = range(x.ndim)
    order = (s, b, *rest)
    layout = Layout(*[x.layout.dims[d] for d in order], partial=x.layout.partial)
    return DistArray(
        backend.namespace(x.local).permute_dims(x.local, order), [x.shape[d] for d in order], layout, x.grid
    )


class _Source(NamedTuple):
    """The arguments of `from_module`."""

    module: Any
    parallelism: Parallelism
    name: str
    into: str
    causal: bool

    def refuse(self, *reasons: tuple[bool, str]) -> None:
        """Raise the error that names all options that are set and that our layers lack."""
        found = [reason for refused, reason in reasons if refused]
        if found:
            raise OptionError(
                f"from_module: {type(self.module).__name__} with {', '.join(found)}: there is no such layer"
            )

    def dtype(self, tensor: torch.Tensor) -> Any:
        """Return the dtype of a tensor as our layers take it."""
        return dlpack.from_torch(tensor.detach()[:0].cpu()).dtype


def _fill(layer: Layer, name: str, weights: Weights) -> None:
    """Copy this rank's block of each weight into its parameter."""
    parameters = {p.name.removeprefix(f"{name}."): p for p in layer.parameters()}
    assert parameters.keys() == weights.keys(), (parameters.keys(), weights.keys())
    for key, parameter in parameters.items():
        block = weights[key].detach()[index_of(parameter.value.box)].cpu()
        parameter.value = parameter.value.like(parameter.value.grid.to_block(dlpack.from_torch(block)))


Converted = tuple[Layer, Weights]
"""A layer and the weights to copy into it."""


def _linear(source: _Source) -> Converted:
    linear = source.module
    subscripts, sizes = "bsh,hf->bsf", {"h": linear.in_features, "f": linear.out_features}
    if source.into == "stream":
        subscripts, sizes = "bsf,fh->bsh", {"f": linear.in_features, "h": linear.out_features}
    layer = Linear(
        subscripts,
        sizes,
        "f",
        source.parallelism,
        source.name,
        bias=linear.bias is not None,
        dtype=source.dtype(linear.weight),
    )
    return layer, _of_linear(linear)


def _of_linear(linear: nn.Linear) -> Weights:
    bias = {} if linear.bias is None else {"bias": linear.bias}
    return {"weight": linear.weight.T, **bias}


def _norm(source: _Source) -> Converted:
    norm, centred = source.module, isinstance(source.module, nn.LayerNorm)
    source.refuse(
        (len(norm.normalized_shape) > 1, f"normalized_shape={tuple(norm.normalized_shape)} of more than one dim"),
        (norm.weight is None, "elementwise_affine=False"),
        (centred and norm.weight is not None and norm.bias is None, "bias=False"),
    )
    eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
    kind = LayerNorm if centred else RMSNorm
    layer = kind(norm.normalized_shape[0], source.parallelism, source.name, eps=eps, dtype=source.dtype(norm.weight))
    return layer, _of_norm(norm)


def _of_norm(norm: nn.LayerNorm | nn.RMSNorm) -> Weights:
    return {"gain": norm.weight, **({"bias": norm.bias} if isinstance(norm, nn.LayerNorm) else {})}


def _embedding(source: _Source) -> Converted:
    table = source.module
    source.refuse(
        (table.padding_idx is not None, f"padding_idx={table.padding_idx}"),
        (table.max_norm is not None, f"max_norm={table.max_norm}"),
        (table.scale_grad_by_freq, "scale_grad_by_freq=True"),
        (table.sparse, "sparse=True"),
    )
    sizes = table.num_embeddings, table.embedding_dim
    layer = Embedding(*sizes, source.parallelism, source.name, dtype=source.dtype(table.weight))
    return layer, {"weight": table.weight}


def _multihead(source: _Source) -> Converted:
    attention = source.module
    source.refuse(*_refused_of_attention(attention))
    layer = SelfAttention(
        attention.embed_dim,
        attention.num_heads,
        source.parallelism,
        source.name,
        causal=source.causal,
        bias=attention.in_proj_bias is not None,
        dtype=source.dtype(attention.in_proj_weight),
    )
    return layer, _of_attention(attention)


def _refused_of_attention(attention: nn.MultiheadAttention) -> list[tuple[bool, str]]:
    h = attention.embed_dim
    return [
        ((attention.kdim, attention.vdim) != (h, h), f"kdim={attention.kdim} and vdim={attention.vdim} beside {h}"),
        (attention.bias_k is not None, "add_bias_kv=True"),
        (attention.add_zero_attn, "add_zero_attn=True"),
        (attention.training and attention.dropout > 0, f"dropout={attention.dropout} in attention (eval() has none)"),
    ]


def _of_attention(attention: nn.MultiheadAttention) -> Weights:
    h, a = attention.embed_dim, attention.num_heads
    weights = {
        "qkv.weight": attention.in_proj_weight.view(3, a, h // a, h).permute(3, 0, 1, 2),
        "out.weight": attention.out_proj.weight.view(h, a, h // a).permute(1, 2, 0),
    }
    if attention.in_proj_bias is not None:
        weights |= {"qkv.bias": attention.in_proj_bias.view(3, a, h // a), "out.bias": attention.out_proj.bias}
    return weights


def _encoder(source: _Source) -> Converted:
    block = source.module
    attention, norms = block.self_attn, (block.norm1, block.norm2)
    rates = {d.p for d in (block.dropout, block.dropout1, block.dropout2)}
    source.refuse(
        *_refused_of_attention(attention),
        (block.training and rates != {0.0}, f"dropout={max(rates)} (eval() has none)"),
        (_activation(block.activation) is None, f"activation={block.activation}"),
        (any(norm.bias is None for norm in norms), "bias=False"),
        (norms[0].eps != norms[1].eps, "norms of two eps"),
    )
    layer = TransformerBlock(
        attention.embed_dim,
        attention.num_heads,
        block.linear1.out_features,
        source.parallelism,
        source.name,
        order="pre" if block.norm_first else "post",
        eps=norms[0].eps,
        activation=_activation(block.activation) or "",
        attention={"causal": source.causal},
        dtype=source.dtype(attention.in_proj_weight),
    )
    parts = {
        "attention": _of_attention(attention),
        "norm1": _of_norm(block.norm1),
        "norm2": _of_norm(block.norm2),
        "mlp.up": _of_linear(block.linear1),
        "mlp.down": _of_linear(block.linear2),
    }
    return layer, {f"{part}.{key}": w for part, weights in parts.items() for key, w in weights.items()}


def _activation(function: object) -> str | None:
    """Return our name for an activation of torch, None if we lack it."""
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu-tanh"
    if isinstance(function, nn.ReLU) or function in (nn.functional.relu, torch.relu):
        return "relu"
    return "gelu" if function is nn.functional.gelu else None


_CONVERSIONS: dict[Any, Callable[[_Source], Converted]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    nn.Embedding: _embedding,
    nn.MultiheadAttention: _multihead,
    nn.TransformerEncoderLayer: _encoder,
}
