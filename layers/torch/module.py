"""Layers as PyTorch modules, on the same memory: torch's autograd calls the layer's own backward pass.

A tensor that a module takes or gives is the *global* array, the same on every rank, unless a layout says that each rank
has its block. A model of which such modules are a part is then the serial program, run alike on all ranks, and
computes the same numbers. Its parameters are blocks; a gradient in ``.grad`` is complete, so that the elementwise
optimizers of ``torch.optim`` (SGD, Adam, AdamW, RMSprop, ...) are right as they stand. What takes the norm of a whole
tensor (LAMB, Adafactor, clipping) would see that of a block: clip with `clip_grad_norm_`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from colossal_mpi import dlpack
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import LayoutError, OptionError, ShapeError, SharingError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.containers import Residual, Sequential
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding
from colossal_mpi.layers.layer import Context, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.optim import gradient_norm
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.torch.call import Call, agree
from colossal_mpi.layers.torch.weights import SequenceFirst, from_module
from colossal_mpi.layout import Layout, index_of

__all__ = ["LayerModule", "as_module", "clip_grad_norm_", "from_module"]

# One tensor for each parameter, whichever modules it is in: tied weights are one to an optimizer.
_tensors: WeakKeyDictionary[Parameter, torch.nn.Parameter] = WeakKeyDictionary()
_IDS = ("torch.int64", "torch.int32")


def as_module(
    layer: Layer, parallelism: Parallelism | None = None, *, x: Layout | None = None, y: Layout | None = None
) -> LayerModule:
    """Return a layer as a PyTorch module.

    Parameters
    ----------
    layer : Layer
        Its parameters become ``torch.nn.Parameter``, each rank's the block that it stores, in the same memory and
        under their own names: what an optimizer writes, the layer has. A parameter is one tensor in all modules.
    parallelism : Parallelism, optional
        That of the layer; needed where the layer has no parameters.
    x, y : Layout, optional
        How the tensors that the module takes and gives lie. By default both are the global array on every rank; in a
        layout each rank gives and gets its block, as `Layout.box` cuts it.

    Returns
    -------
    LayerModule

    Notes
    -----
    All ranks of the grid run the same program: every forward and every backward pass is a collective. Where `y` is
    cut, each rank makes its own part of the loss, which is the sum over the blocks; where it is not, all make the same
    loss. Gradients of torch's own parameters before a cut `x` or behind a cut `y` are then partial sums, yours to add.
    A loss that a layer adds of its own (the balance of experts) enters the gradients as its backward pass has it.

    **Communication:** that of the layer, a redistribution of x, y and their cotangents where their layouts differ
    from the layer's (none for a global x), the reduction of each gradient over all axes in every backward pass (the
    data axes too, where training by this package waits for the last microbatch), and some bytes of shapes and dtypes
    in each forward pass.

    Raises
    ------
    OptionError
        If there are no parameters and no parallelism, or the name of a parameter cannot be that of a module's.
    LayoutError
        If a layout holds partial sums or does not fit the grid.

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
    """Where in the tree of modules the tensor of a parameter is."""

    parameter: Parameter
    node: torch.nn.Module
    leaf: str

    @property
    def tensor(self) -> torch.nn.Parameter:
        found = self.node._parameters[self.leaf]
        assert found is not None
        return found


class LayerModule(torch.nn.Module):
    """A layer whose tensors are torch's; made by `as_module`.

    ``train()`` and ``eval()`` are the layer's `Context.train`; masks of dropout follow from torch's generator on the
    first rank. ``state_dict`` and ``load_state_dict`` are those of this rank's blocks; `gathered_state` and
    `load_gathered` have the whole weights. A module may be used several times in a graph, change its floating-point
    dtype, and be deep-copied (on the same grid). It is differentiated once, not twice.
    """

    def __init__(self, layer: Layer, parallelism: Parallelism, x: Layout | None, y: Layout | None) -> None:
        super().__init__()
        self.wrapped, self.parallelism, self.x_layout, self.y_layout = layer, parallelism, x, y
        for layout in (x, y):
            if layout is not None and layout.on(self.grid.axes, len(layout.dims)).partial:
                raise LayoutError(f"as_module: {layout}: torch cannot hold partial sums; leave `partial` out")
        self._drops = any(isinstance(part, Dropout) and part.rate for part in _parts(layer))
        self._slots = [self._slot(parameter) for parameter in layer.parameters()]
        self._bound: list[tuple[Any, ...] | None] = [None] * len(self._slots)
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
        """Let parameters and tensors be one memory again where either was given other memory."""
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

    def _apply(self, fn: Any, recurse: bool = True) -> LayerModule:
        """Let the layer follow its tensors to another dtype; refuse to leave the device of the grid."""
        for slot in self._slots:
            with torch.no_grad():
                moved = fn(slot.tensor)
            if moved.device != slot.tensor.device:
                raise SharingError(
                    f"as_module: the blocks are on {slot.tensor.device}, the device of {self.grid}, and cannot go to "
                    f"{moved.device}: make the grid there"
                )
        super()._apply(fn, recurse)
        self._bind()
        return self

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output.

        Parameters
        ----------
        x : torch.Tensor
            The global array, or this rank's block in the module's layout of x; of the dtype of the weights, or int32
            or int64 for ids. Neither it nor the result may be changed in place before the backward pass, which then
            raises torch's error.
        mask : bool torch.Tensor, optional
            `Context.mask`, ``[b, s]``: the global array, or this rank's block as the first dims of x are cut.

        Raises
        ------
        DTypeError, ShapeError, SharingError
            The same on all ranks, if what any of them gives is of another dtype or on another device than the weights
            or no block of one global array.
        """
        # Once torch.compile is about, it looks into every call but these.
        run = torch.compiler.disable(self._run) if "torch._dynamo" in sys.modules else self._run
        return run(x, mask)

    def _run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        self._bind()
        values: Sequence[Any] = [x] if mask is None else [x, mask]
        # As masks of torch's own are drawn: by the generator's state, which torch's checkpointing winds back.
        step = int(torch.randint(1 << 62, ())) if self._drops and self.training else 0
        layouts = [self.x_layout, self.x_layout and Layout(*self.x_layout.dims[:2])][: len(values)]
        dtypes = [self._dtypes(), ("torch.bool",)][: len(values)]
        step, (given, *rest) = agree(self.grid, values, layouts, dtypes, step)
        context = Context(step=step, train=self.training, mask=rest[0].array(values[1]) if rest else None)
        call = Call(self.wrapped, context, given, self._entry(x, given.layout), self.y_layout)
        return call(x, [slot.tensor for slot in self._slots])

    def _dtypes(self) -> tuple[str, ...] | None:
        """Return the names of the dtypes that x may have."""
        if isinstance(_first(self.wrapped), Embedding):
            return _IDS
        if not self._slots:
            return None
        weights = str(self._slots[0].tensor.dtype)
        return (weights, *_IDS) if any(isinstance(part, Embedding) for part in _parts(self.wrapped)) else (weights,)

    def _entry(self, x: torch.Tensor, layout: Layout) -> Layout:
        """Return the layout to hand the layer its input in: as it comes to products and tables, else as a stream."""
        first = _first(self.wrapped)
        letters = {2: "bh", 3: "sbh" if isinstance(first, SequenceFirst) else "bsh"}.get(x.ndim)
        if letters is None or not x.is_floating_point() or isinstance(first, Linear | Embedding):
            return layout
        return self.parallelism.stream(letters)

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """Return the whole weights by name, on every rank, in host memory. **Communication:** each is gathered."""
        self._bind()
        return {p.name: dlpack.to_torch(p.value.gather()) for p in self.wrapped.parameters()}

    def load_gathered(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's blocks of whole weights, given by name and the same on every rank, into its own.

        Raises
        ------
        ShapeError
            If the names or the shapes are not those of the layer.
        """
        self._bind()
        mine = {p.name: p.value for p in self.wrapped.parameters()}
        wanted, came = ({name: tuple(w.shape) for name, w in weights.items()} for weights in (mine, state))
        if wanted != came:
            raise ShapeError(f"load_gathered: the layer has {wanted}; the state has {came}")
        with torch.no_grad():
            for slot in self._slots:
                whole = state[slot.parameter.name]
                slot.tensor.copy_(whole[index_of(slot.parameter.value.box)])


def clip_grad_norm_(model: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients of a model in place so that their norm together is at most `max_norm`; return their norm.

    ``torch.nn.utils.clip_grad_norm_`` sees on each rank the blocks of that rank alone, and would scale the ranks
    differently. Here each element of a layer's weights counts once, however many ranks hold it, and the parameters of
    torch's own count as what they are on every rank: the same. The scale is torch's, ``max_norm / (norm + 1e-6)``.

    **Communication:** one allreduce of a single word for each grid of the model's modules.
    """
    ours = {id(slot.tensor): slot for m in model.modules() if isinstance(m, LayerModule) for slot in m._slots}
    grads = {id(p): p.grad for p in model.parameters() if p.grad is not None}
    square = sum((float(g.abs().double().square().sum()) for key, g in grads.items() if key not in ours), start=0.0)
    blocks: dict[Grid, list[DistArray]] = {}
    for key, slot in ours.items():
        if key in grads:
            value = slot.parameter.value
            blocks.setdefault(value.grid, []).append(value.like(dlpack.from_torch(grads[key])))
    for arrays in blocks.values():
        square += gradient_norm(arrays) ** 2
    norm = math.sqrt(square)
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for grad in grads.values():
            grad.mul_(scale)
    return norm


def _first(layer: Layer) -> Layer:
    """Return the layer that is handed the input of a chain."""
    while isinstance(layer, Sequential) and not isinstance(layer, Residual):
        layer = layer.layers[0]
    return layer


def _parts(layer: Layer) -> Any:
    """Yield a layer and all layers that it is made of."""
    yield layer
    for value in vars(layer).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Layer):
                yield from _parts(item)
