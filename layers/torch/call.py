"""One use of a layer in a graph of torch's: what the ranks agree on first, and the layer's passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from colossal_mpi import comm, dlpack
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, OptionError, ShapeError, SharingError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.layer import Context, Layer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.precision import rounded
from colossal_mpi.layout import Layout, box_shape
from colossal_mpi.platform import backend


class Place(NamedTuple):
    """Where the blocks of a global array lie."""

    shape: tuple[int, ...]
    layout: Layout
    grid: Grid

    def array(self, tensor: torch.Tensor) -> DistArray:
        """Return a tensor as this rank's block, in the same memory."""
        return DistArray(dlpack.from_torch(tensor), self.shape, self.layout, self.grid)

    def tensor(self, array: DistArray, *others: torch.Tensor) -> torch.Tensor:
        """Return the block of an array in this layout as a tensor that has no memory in common with the others.

        autograd keeps a gradient that it is given, and writes to it; of memory that two tensors share it knows nothing.
        """
        block = array.redistribute(self.layout).local
        try:
            tensor = dlpack.to_torch(block)
        except SharingError:  # a broadcast, which is read-only
            return dlpack.to_torch(backend.namespace(block).asarray(block, copy=True))
        return tensor.clone() if any(_overlap(tensor, other) for other in others) else tensor


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    (low, high), (start, stop) = (
        (memory.data_ptr(), memory.data_ptr() + memory.nbytes()) for memory in (x.untyped_storage() for x in (a, b))
    )
    return low < stop and start < high


class Call(NamedTuple):
    """A layer with all that one use of it needs but the tensors."""

    layer: Layer
    context: Context
    given: Place
    entry: Layout
    """The layout in which the layer is handed its input."""
    y: Layout | None
    """That of the tensor that it gives; None: the global array."""

    def __call__(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the layer's output; `weights` are the tensors of its parameters, in their order."""
        return _Function.apply(self, x, *weights)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y, ctx.cache = call.layer.forward(call.given.array(x).redistribute(call.entry), call.context)
        ctx.call, ctx.gives = call, Place(y.shape, call.y or Layout(*[None] * y.ndim), y.grid)
        out = ctx.gives.tensor(y, x)
        # The cache has views of these, which torch watches for writes.
        ctx.save_for_backward(x, out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            grads = _Function._gradients(ctx, dy)
        if torch.is_grad_enabled():  # create_graph=True
            anchor = torch.zeros((), requires_grad=True)
            grads = [None if g is None else _Last.apply(g, anchor) for g in grads]
        return None, *grads

    @staticmethod
    def _gradients(ctx: Any, dy: torch.Tensor) -> list[torch.Tensor | None]:
        x, *_ = ctx.saved_tensors
        _, of_x, *of_weights = ctx.needs_input_grad
        layer = ctx.call.layer
        parameters = list(layer.parameters())
        with _gradients_apart(parameters):
            dx = layer.backward(ctx.gives.array(dy), ctx.cache, None if any(of_weights) else [])
            grads = [
                _gradient(p, dy, x) if wanted and p.grad is not None else None
                for p, wanted in zip(parameters, of_weights, strict=True)
            ]
        if _is_last_pass():
            ctx.cache = None
        return [ctx.call.given.tensor(dx, dy, x) if of_x and dx is not None else None, *grads]


class _Last(torch.autograd.Function):
    """The identity on a gradient that has no derivative: without it that would count as constant."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> None:
        raise OptionError("create_graph=True: a layer's backward pass has no derivative: use it for the last one only")


def _gradient(parameter: Parameter, *others: torch.Tensor) -> torch.Tensor:
    grad = rounded(parameter.reduce(), parameter.value.dtype)
    return Place(grad.shape, grad.layout, grad.grid).tensor(grad, *others)


@contextmanager
def _gradients_apart(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Begin with no gradients, and leave those that were there: autograd adds up those of several uses."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad


def _is_last_pass() -> bool:
    """Say whether torch lets go of what the graph keeps (no ``retain_graph``); False where it cannot tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is not None and not tell()


class Given(NamedTuple):
    """What a rank tells the others of a tensor."""

    dtype: str
    device: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> Given:
        """Return what is to be told of a value that should be a tensor."""
        if isinstance(value, torch.Tensor):
            return cls(str(value.dtype), value.device.type, tuple(value.shape))
        return cls(f"a {type(value).__name__}", "no device", ())


def agree(
    grid: Grid,
    values: Sequence[Any],
    layouts: Sequence[Layout | None],
    dtypes: Sequence[Sequence[str] | None],
    step: int,
) -> tuple[int, list[Place]]:
    """Return the first rank's step and where the tensors that the ranks give lie, or raise the same error on all.

    Parameters
    ----------
    grid : Grid
    values : sequence
        What this rank was given.
    layouts : sequence
        Of each value; None for a global array.
    dtypes : sequence
        The names of those that each may have, None for any that is no integer.
    step : int

    **Communication:** some bytes of each rank to all.
    """
    everyone = comm.collect((step, [Given.of(value) for value in values]), grid)
    if len({len(tensors) for _, tensors in everyone}) > 1:
        raise ShapeError("as_module: some ranks give a mask and others none: give it on all ranks or on none")
    places = []
    for number, (layout, allowed) in enumerate(zip(layouts, dtypes, strict=True)):
        given = [tensors[number] for _, tensors in everyone]
        _require_same(given, allowed, grid)
        layout = layout or Layout(*[None] * len(given[0].shape))
        places.append(Place(_global_shape([g.shape for g in given], layout, grid), layout, grid))
    return everyone[0][0], places


def _require_same(given: Sequence[Given], allowed: Sequence[str] | None, grid: Grid) -> None:
    device = grid.device.partition(":")[0]
    for rank, g in enumerate(given):
        if g.dtype not in (allowed or (given[0].dtype,)) or not g.dtype.startswith("torch."):
            wanted = " or ".join(allowed) if allowed else given[0].dtype if rank else "a torch.Tensor"
            raise DTypeError(f"as_module: it needs {wanted} on every rank; rank {rank} gives {g.dtype}")
        if g.device != device:
            raise SharingError(
                f"as_module: the layer is on {grid.device!r}; rank {rank} gives a tensor on {g.device!r}: move it, or "
                "make the grid with that device"
            )


def _global_shape(shapes: Sequence[tuple[int, ...]], layout: Layout, grid: Grid) -> tuple[int, ...]:
    """Return the shape of the global array whose blocks have these shapes, by rank."""
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
