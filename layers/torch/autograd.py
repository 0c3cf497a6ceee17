"""One call of a layer as a node of torch's autograd graph, and the agreement of the ranks on the tensors of the call.

``module`` calls `agree` and then `Call`. `Call` hands the layer its blocks by ``dlpack`` and runs its forward and
backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from colossal_mpi import comm, dlpack
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, OptionError, ShapeError, SharingError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.precision import rounded
from colossal_mpi.layout import Layout, box_shape
from colossal_mpi.platform import backend


class Placement(NamedTuple):
    """The shape, the layout and the grid of a global array, of which each rank's tensor is the block."""

    shape: tuple[int, ...]
    layout: Layout
    grid: Grid

    def array(self, tensor: torch.Tensor) -> DistArray:
        """Return the array whose block on this rank is a tensor, in the same memory."""
        return DistArray(dlpack.from_torch(tensor), self.shape, self.layout, self.grid)

    def tensor(self, array: DistArray, *others: torch.Tensor) -> torch.Tensor:
        """Return this rank's block of an array as a tensor that shares no memory with the others.

        autograd keeps a gradient that it is given and writes to it; it does not know that two tensors share memory.
        """
        # Y[any layout] -> Y[self.layout]: redistribute
        block = array.redistribute(self.layout).local
        try:
            tensor: torch.Tensor = dlpack.to_torch(block)
        except SharingError:  # a broadcast block is read-only
            tensor = dlpack.to_torch(backend.namespace(block).asarray(block, copy=True))
            return tensor
        return tensor.clone() if any(_overlap(tensor, other) for other in others) else tensor


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    (low, high), (start, stop) = (
        (memory.data_ptr(), memory.data_ptr() + memory.nbytes()) for memory in (x.untyped_storage() for x in (a, b))
    )
    return low < stop and start < high


class Call(NamedTuple):
    """One call of a layer, without its tensors.

    Parameters
    ----------
    layer : Layer
        The layer.
    context : Context
        The context of the call.
    x : Placement
        The placement of the tensor that the caller gives.
    input_layout : Layout
        The layout in which the layer gets its input.
    y_layout : Layout, optional
        The layout of the tensor that is returned; None returns the global array.
    """

    layer: Layer
    context: Context
    x: Placement
    input_layout: Layout
    y_layout: Layout | None

    def __call__(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the layer's output; `weights` are the tensors of its parameters, in their order."""
        y: torch.Tensor = _LayerFunction.apply(self, x, *weights)  # type: ignore[no-untyped-call]
        return y


class _LayerFunction(torch.autograd.Function):
    """The passes of a layer, as autograd calls them."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        # X[as given] -> X[as the layer takes it]; the layer; Y[as it comes] -> Y[as wanted]
        y, ctx.cache = call.layer.forward(call.x.array(x).redistribute(call.input_layout), call.context)
        ctx.call, ctx.y = call, Placement(y.shape, call.y_layout or Layout(*[None] * y.ndim), y.grid)
        out: torch.Tensor = ctx.y.tensor(y, x)
        # The cache has views of these tensors. torch raises an error if one is written to before the backward pass.
        ctx.save_for_backward(x, out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            grads = _LayerFunction._gradients(ctx, dy)
        if torch.is_grad_enabled():  # create_graph=True
            anchor = torch.zeros((), requires_grad=True)
            grads = [
                None if g is None else _NotDifferentiable.apply(g, anchor)  # type: ignore[no-untyped-call]
                for g in grads
            ]
        return None, *grads

    @staticmethod
    def _gradients(ctx: Any, dy: torch.Tensor) -> list[torch.Tensor | None]:
        x, *_ = ctx.saved_tensors
        _, of_x, *of_weights = ctx.needs_input_grad
        layer = ctx.call.layer
        parameters = list(layer.parameters())
        with _fresh_gradients(parameters):
            # A list takes the weight products and is dropped: nobody wants the gradients of the weights.
            dx = layer.backward(ctx.y.array(dy), ctx.cache, None if any(of_weights) else [])
            grads = [
                _gradient(p, dy, x) if wanted and p.grad is not None else None
                for p, wanted in zip(parameters, of_weights, strict=True)
            ]
        if _is_last_pass():
            ctx.cache = None
        return [ctx.call.x.tensor(dx, dy, x) if of_x and dx is not None else None, *grads]


class _NotDifferentiable(torch.autograd.Function):
    """The identity on a gradient whose derivative is an error; without it, torch would take it for a constant."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> None:
        raise OptionError("create_graph=True: a layer's backward pass has no derivative: use it for the last one only")


def _gradient(parameter: Parameter, *others: torch.Tensor) -> torch.Tensor:
    # dW[W's layout] {U_all axes over which W is replicated} -> dW[W's layout]: allreduce
    grad = rounded(parameter.reduce(), parameter.value.dtype)
    return Placement(grad.shape, grad.layout, grad.grid).tensor(grad, *others)


@contextmanager
def _fresh_gradients(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Start a pass without gradients and restore the old ones after it: autograd adds up several calls itself."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad


def _is_last_pass() -> bool:
    """Return whether torch frees the graph after this pass (no ``retain_graph``); False where torch does not say."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()


class TensorFacts(NamedTuple):
    """The dtype, device and shape of a rank's tensor, which all ranks compare."""

    dtype: str
    device: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, value: object) -> TensorFacts:
        """Return the facts of a value that should be a tensor."""
        if isinstance(value, torch.Tensor):
            return cls(str(value.dtype), value.device.type, tuple(value.shape))
        return cls(f"a {type(value).__name__}", "no device", ())


def agree(
    grid: Grid,
    values: Sequence[object],
    layouts: Sequence[Layout | None],
    dtypes: Sequence[Sequence[str] | None],
    step: int,
) -> tuple[int, list[Placement]]:
    """Return the first rank's step and the placement of each tensor, or raise the same error on all ranks.

    Parameters
    ----------
    grid : Grid
        The grid of the layer.
    values : sequence
        The tensors that this rank was given.
    layouts : sequence of Layout or None
        The layout of each value; None for a global array.
    dtypes : sequence of sequence of str or None
        The names of the dtypes that each value may have, None for any dtype that is the same on all ranks.
    step : int
        This rank's step, from which dropout masks are drawn.

    Returns
    -------
    step : int
        The step of rank 0.
    placements : list of Placement
        The placement of each value.

    Notes
    -----
    **Communication:** an allgather of some bytes.
    """
    # facts of each rank -> facts of all ranks: allgather
    everyone = comm.collect((step, [TensorFacts.of(value) for value in values]), grid)
    if len({len(tensors) for _, tensors in everyone}) > 1:
        raise ShapeError("as_module: some ranks give a mask and others none: give it on all ranks or on none")
    placements = []
    for number, (layout, allowed) in enumerate(zip(layouts, dtypes, strict=True)):
        facts = [tensors[number] for _, tensors in everyone]
        _require_same(facts, allowed, grid)
        layout = layout or Layout(*[None] * len(facts[0].shape))
        placements.append(Placement(_global_shape([fact.shape for fact in facts], layout, grid), layout, grid))
    return everyone[0][0], placements


def _require_same(facts: Sequence[TensorFacts], allowed: Sequence[str] | None, grid: Grid) -> None:
    """Raise an error if any rank's tensor has a wrong dtype or device."""
    device = grid.device.partition(":")[0]
    for rank, fact in enumerate(facts):
        if fact.dtype not in (allowed or (facts[0].dtype,)) or not fact.dtype.startswith("torch."):
            wanted = " or ".join(allowed) if allowed else facts[0].dtype if rank else "a torch.Tensor"
            raise DTypeError(f"as_module: it needs {wanted} on every rank; rank {rank} gives {fact.dtype}")
        if fact.device != device:
            raise SharingError(
                f"as_module: the layer is on {grid.device!r}; rank {rank} gives a tensor on {fact.device!r}: move it, "
                "or make the grid with that device"
            )


def _global_shape(shapes: Sequence[tuple[int, ...]], layout: Layout, grid: Grid) -> tuple[int, ...]:
    """Return the shape of the global array whose blocks have these shapes, in the order of the ranks."""
    coords = [grid.coords_of(rank) for rank in range(grid.size)]
    layout = layout.on(grid.axes, len(shapes[0]))
    if all(len(shape) == len(shapes[0]) for shape in shapes):
        whole = tuple(
            sum(
                shape[d]
                for shape, at in zip(shapes, coords, strict=True)
                if not any(at[a] for a in at if a not in axes)
            )
            for d, axes in enumerate(layout.dims)
        )
        if all(s == box_shape(layout.box(whole, grid.axes, c)) for s, c in zip(shapes, coords, strict=True)):
            return whole
    raise ShapeError(
        f"as_module: blocks of shapes {', '.join(map(str, shapes))} by rank are not those of one array in {layout} "
        f"on {grid}: it cuts n over p ranks into n // p each, and one more for the first n % p"
    )
