"""Layers as PyTorch modules on the same memory: torch's autograd calls the layer's own backward pass.

User programs call `as_module` and `clip_grad_norm_`. A call goes to ``autograd``, which runs the layer.

A tensor that a module takes or returns is the *global* array, the same on every rank, unless a layout says that each
rank has its block. A model with such modules is therefore the serial program, run on all ranks, and computes the same
numbers. Its parameters are blocks. A gradient in ``.grad`` is complete, so that the elementwise optimizers of
``torch.optim`` (SGD, Adam, AdamW, RMSprop, ...) are right as they are. Functions that take the norm of a whole tensor
(LAMB, Adafactor, clipping) would see the norm of a block: clip with `clip_grad_norm_`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from colossal_mpi import dlpack
from colossal_mpi.distarray import DistArray, factors_within, root_of_squares
from colossal_mpi.errors import LayoutError, OptionError, ShapeError, SharingError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.containers import Residual, Sequential
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.optim import gradient_norm
from colossal_mpi.layers.optim.base import require_clip
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.torch.autograd import Call, agree
from colossal_mpi.layers.torch.conversion import SequenceFirst
from colossal_mpi.layout import Layout, index_of

# A parameter is one tensor in all modules that have it: to an optimizer, tied weights are one.
_tensors: WeakKeyDictionary[Parameter, torch.nn.Parameter] = WeakKeyDictionary()
_IDS = ("torch.int64", "torch.int32")


def as_module(
    layer: Layer, parallelism: Parallelism | None = None, *, x: Layout | None = None, y: Layout | None = None
) -> LayerModule:
    """Return a layer as a PyTorch module.

    Parameters
    ----------
    layer : Layer
        The layer. Its parameters become ``torch.nn.Parameter`` under their own names: on each rank the block that it
        stores, in the same memory, so that the layer sees what an optimizer writes. A parameter is one tensor in all
        modules.
    parallelism : Parallelism, optional
        The parallelism of the layer; needed only if the layer has no parameters.
    x, y : Layout, optional
        The layouts of the tensors that the module takes and returns. By default both are the global array on every
        rank; with a layout, each rank gives and gets its block, as `Layout.box` cuts it.

    Returns
    -------
    LayerModule
        The module.

    Raises
    ------
    OptionError
        If there are no parameters and no parallelism, or torch does not allow the name of a parameter.
    LayoutError
        If a layout holds partial sums or does not fit the grid.

    Notes
    -----
    All ranks of the grid run the same program: every forward and every backward pass is a collective. If `y` is cut,
    each rank computes its own part of the loss, and the loss is the sum over the blocks. If not, all ranks compute the
    same loss. With a cut `x` or `y`, gradients of torch's own parameters before or after the module are partial sums,
    which your program must add. A loss that a layer adds itself (the balance of experts) enters the gradients as in its
    backward pass.

    **Communication:** the collectives of the layer; a redistribution of x, y and their cotangents where their layouts
    differ from the layer's (none for a global x); an allreduce of each gradient over all axes in every backward pass
    (data axes included, for which training by this package waits until the last microbatch); and an allgather of some
    bytes of shapes and dtypes in each forward pass.

    Examples
    --------
    >>> p = Parallelism(Grid(row=2, col=2), "2d")
    >>> up = as_module(Linear("bsh,hf->bsf", {"h": 256, "f": 1024}, "f", p, "up"))
    >>> model = torch.nn.Sequential(up, torch.nn.GELU(), torch.nn.Linear(1024, 10))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    """
    if parallelism is None:
        first = next(layer.parameters(), None)
        if first is None:
            raise OptionError(f"as_module: {type(layer).__name__} has no parameters: give it its parallelism")
        parallelism = first.parallelism
    return LayerModule(layer, parallelism, x, y)


class _Slot(NamedTuple):
    """The place of a parameter's tensor in the tree of modules."""

    parameter: Parameter
    node: torch.nn.Module
    leaf: str

    @property
    def tensor(self) -> torch.nn.Parameter:
        found = self.node._parameters[self.leaf]
        assert found is not None
        return found


class LayerModule(torch.nn.Module):
    """A layer as a ``torch.nn.Module``; `as_module` returns it.

    ``train()`` and ``eval()`` set the layer's `Context.train`. Dropout masks depend on torch's generator on rank 0.
    ``state_dict`` and ``load_state_dict`` work on this rank's blocks, `gathered_state` and `load_gathered` on whole
    weights. A module may be called several times in a graph, change its floating-point dtype, and be deep-copied on the
    same grid. It can be differentiated once, not twice.

    Parameters
    ----------
    layer : Layer
        The layer.
    parallelism : Parallelism
        The parallelism of the layer.
    x, y : Layout or None
        The layouts of the tensors that the module takes and returns; None for global arrays.
    """

    def __init__(self, layer: Layer, parallelism: Parallelism, x: Layout | None, y: Layout | None) -> None:
        super().__init__()
        self.wrapped, self.parallelism, self.x_layout, self.y_layout = layer, parallelism, x, y
        for layout in (x, y):
            if layout is not None and layout.on(self.grid.axes, len(layout.dims)).partial:
                raise LayoutError(f"as_module: {layout}: torch cannot hold partial sums; leave `partial` out")
        self._drops = any(isinstance(part, Dropout) and part.rate for part in _parts(layer))
        self._slots = [self._slot(parameter) for parameter in layer.parameters()]
        self._bound: list[tuple[DistArray, int, torch.dtype] | None] = [None] * len(self._slots)
        self._bind()

    @property
    def grid(self) -> Grid:
        """The grid of the layer."""
        return self.parallelism.grid

    def _slot(self, parameter: Parameter) -> _Slot:
        tensor = _tensors.get(parameter)
        if tensor is None:
            tensor = _tensors[parameter] = torch.nn.Parameter(dlpack.to_torch(parameter.value))
        node: torch.nn.Module = self
        *path, leaf = parameter.name.split(".")
        try:
            for step in path:
                if step not in node._modules:
                    node.add_module(step, torch.nn.Module())
                node = node.get_submodule(step)
            node.register_parameter(leaf, tensor)
        except KeyError as error:
            raise OptionError(f"as_module: {parameter.name!r} cannot name a parameter of a module: {error}") from None
        return _Slot(parameter, node, leaf)

    def _bind(self) -> None:
        """Make parameters and tensors share memory again after one of them was given other memory."""
        for i, (slot, bound) in enumerate(zip(self._slots, self._bound, strict=True)):
            parameter, tensor = slot.parameter, slot.tensor
            now = tensor.data_ptr(), tensor.dtype
            if bound is not None and bound[0] is parameter.value and bound[1:] == now:
                continue
            if bound is not None and bound[0] is parameter.value:
                parameter.value = parameter.value.like(dlpack.from_torch(tensor))
            else:
                tensor.data = dlpack.to_torch(parameter.value)
            self._bound[i] = parameter.value, tensor.data_ptr(), tensor.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LayerModule:
        """Let the layer follow its tensors to another dtype; raise SharingError if they would leave the device."""
        for slot in self._slots:
            with torch.no_grad():
                moved = fn(slot.tensor)
            if moved.device != slot.tensor.device:
                raise SharingError(
                    f"as_module: the blocks are on {slot.tensor.device}, the device of {self.grid}, and cannot go to "
                    f"{moved.device}: make the grid there"
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._bind()
        return self

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output.

        Parameters
        ----------
        x : torch.Tensor
            The global array, or this rank's block in the module's layout of x, of the dtype of the weights, or int32 or
            int64 for token ids. If it or the result is changed in place before the backward pass, that pass raises
            torch's error.
        mask : torch.Tensor of bool, optional
            `Context.mask`, ``[b, s]``: the global array, or this rank's block, cut as the first dims of x are.

        Returns
        -------
        torch.Tensor
            The global array, or this rank's block in the module's layout of y.

        Raises
        ------
        DTypeError, ShapeError, SharingError
            On all ranks, if the tensor of any rank has another dtype or device than the weights, or the tensors are not
            the blocks of one global array.
        """
        # Once torch.compile is loaded, it traces every call that is not disabled.
        run: Callable[..., torch.Tensor] = self._run
        if "torch._dynamo" in sys.modules:
            run = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
        return run(x, mask)

    def _run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        self._bind()
        values: Sequence[torch.Tensor] = [x] if mask is None else [x, mask]
        # Draw from torch's generator, as torch's own dropout does: its checkpointing rewinds the generator's state.
        step = int(torch.randint(1 << 62, ())) if self._drops and self.training else 0
        layouts = [self.x_layout, self.x_layout and Layout(*self.x_layout.dims[:2])][: len(values)]
        dtypes = [self._dtypes(), ("torch.bool",)][: len(values)]
        step, (placement, *rest) = agree(self.grid, values, layouts, dtypes, step)
        context = Context(step=step, train=self.training, mask=rest[0].array(values[1]) if rest else None)
        call = Call(self.wrapped, context, placement, self._input_layout(x, placement.layout), self.y_layout)
        return call(x, [slot.tensor for slot in self._slots])

    def _dtypes(self) -> tuple[str, ...] | None:
        """Return the names of the dtypes that x may have."""
        if isinstance(_first(self.wrapped), Embedding):
            return _IDS
        if not self._slots:
            return None
        weights = str(self._slots[0].tensor.dtype)
        return (weights, *_IDS) if any(isinstance(part, Embedding) for part in _parts(self.wrapped)) else (weights,)

    def _input_layout(self, x: torch.Tensor, layout: Layout) -> Layout:
        """Return the layout in which the layer gets x: the given one for products and tables, else the stream's."""
        first = _first(self.wrapped)
        letters = {2: "bh", 3: "sbh" if isinstance(first, SequenceFirst) else "bsh"}.get(x.ndim)
        if letters is None or not x.is_floating_point() or isinstance(first, Linear | Embedding):
            return layout
        return self.parallelism.stream(letters)

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """Return the whole weights by name, on every rank, in host memory.

        Returns
        -------
        dict of str to torch.Tensor
            Each weight with its global shape.

        Notes
        -----
        **Communication:** an allgather of each weight.
        """
        self._bind()
        # W[its layout] -> W on every rank: allgather
        return {p.name: dlpack.to_torch(p.value.gather()) for p in self.wrapped.parameters()}

    def load_gathered(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's blocks out of whole weights.

        Parameters
        ----------
        state : mapping of str to torch.Tensor
            Whole weights by name, the same on every rank.

        Raises
        ------
        ShapeError
            If the layer has other names or shapes.

        Notes
        -----
        **Communication:** none.
        """
        self._bind()
        weights = {p.name: p.value for p in self.wrapped.parameters()}
        wanted, given = ({name: tuple(w.shape) for name, w in tensors.items()} for tensors in (weights, state))
        if wanted != given:
            raise ShapeError(f"load_gathered: the layer has {wanted}; the state has {given}")
        with torch.no_grad():
            for slot in self._slots:
                whole = state[slot.parameter.name]
                slot.tensor.copy_(whole[index_of(slot.parameter.value.box)])


def clip_grad_norm_(model: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients of a model in place so that their total norm is at most `max_norm`.

    ``torch.nn.utils.clip_grad_norm_`` sees on each rank only the blocks of that rank and would scale the ranks
    differently. Here each element of a layer's weights counts once, however many ranks store it, and each of torch's
    own parameters, which are the same on every rank, counts once.

    Parameters
    ----------
    model : torch.nn.Module
        A model with modules of `as_module`, with other modules or without.
    max_norm : float
        The greatest norm. The gradients are multiplied by ``max_norm / (norm + 1e-6)`` if that is less than 1, as torch
        does.

    Returns
    -------
    float
        The norm before scaling.

    Raises
    ------
    OptionError
        If `max_norm` is not above 0.

    Notes
    -----
    **Communication:** the allreduce of a single word in `gradient_norm` for each grid of the model's modules.

    Examples
    --------
    >>> loss.backward()
    >>> norm = clip_grad_norm_(model, 1.0)
    >>> optimizer.step()
    """
    require_clip("clip_grad_norm_: max_norm", max_norm)
    ours = {id(slot.tensor): slot for m in model.modules() if isinstance(m, LayerModule) for slot in m._slots}
    grads = {id(p): p.grad for p in model.parameters() if p.grad is not None}
    theirs = [g for key, g in grads.items() if key not in ours]
    blocks: dict[Grid, list[DistArray]] = {}
    for key, slot in ours.items():
        if key in grads:
            value = slot.parameter.value
            blocks.setdefault(value.grid, []).append(value.like(dlpack.from_torch(grads[key])))
    # squares of this rank's blocks -> their sum over each grid: allreduce of one word
    norms = [gradient_norm(arrays) for arrays in blocks.values()]
    norms.append(root_of_squares(lambda factor: sum(_squares(g, factor) for g in theirs)))
    # math.hypot is infinite where a norm is infinite and another one NaN
    norm = math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for grad in grads.values():
            for factor in factors_within(scale, str(grad.dtype).removeprefix("torch.")):
                grad.mul_(factor)
    return norm


def _squares(gradient: torch.Tensor, factor: float) -> float:
    """Return the sum of the squares of a tensor's elements times a factor, in float64."""
    parts = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    return float((parts.double() * factor).square().sum())


def _first(layer: Layer) -> Layer:
    """Return the layer of a chain that gets its input."""
    while isinstance(layer, Sequential) and not isinstance(layer, Residual):
        layer = layer.layers[0]
    return layer


def _parts(layer: Layer) -> Iterator[Layer]:
    """Yield a layer and all layers inside it."""
    yield layer
    for value in vars(layer).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Layer):
                yield from _parts(item)
