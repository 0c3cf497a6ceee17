"""Gradients reduced over ``data`` and ``seq`` in buckets, while the rest of the backward pass goes on."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType

from colossal_mpi.comm import progress
from colossal_mpi.distarray import DistArray, PendingRedistribution, start_redistribution
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.platform import backend

BUCKET_BYTES = 1 << 20
"""Bytes of a bucket by default."""
_FLYING = 4
"""Most buckets under way at once. Many MPIs move large messages only while they are called, and what all buckets of a
step hold while they are under way came to more than the gradients themselves."""


class Bucket:
    """Gradients of some parameters, on their way together into the layouts of the optimizer's state."""

    def __init__(self) -> None:
        self.bytes = 0
        self._parameters: list[Parameter] = []
        self._gradients: list[DistArray] = []
        self._moving: PendingRedistribution | None = None

    def put(self, parameter: Parameter, gradient: DistArray) -> None:
        """Take a gradient, or a contribution to one."""
        self._parameters.append(parameter)
        self._gradients.append(gradient)
        parameter.reductions.append(self)
        self.bytes += _bytes(gradient)

    def begin(self) -> None:
        """Begin the reduction."""
        self._moving = start_redistribution(self._gradients, [q.owned for q in self._parameters])
        self._gradients = []

    def get_on(self) -> None:
        """Get on with the reduction; of gradients of which each microbatch's is reduced, wait for it.

        What a deferred gradient lacks is known to be all there only when it is asked for.
        """
        if any(parameter.deferred for parameter in self._parameters):
            assert self._moving is not None
            self._moving.done()
        else:
            self.finish()

    def land(self) -> None:
        """Wait for the messages of the reduction."""
        assert self._moving is not None
        self._moving.wait()

    def lasts(self) -> bool:
        """Say whether `finish` is yet to come."""
        return bool(self._parameters)

    def finish(self) -> None:
        """Wait for the reduction and add the results to the gradients of the parameters. A second time does nothing."""
        if self._moving is None:
            self.begin()
        assert self._moving is not None
        for parameter, gradient in zip(self._parameters, self._moving.wait(), strict=True):
            parameter.reductions.remove(self)
            parameter.add(gradient)
        self._parameters, self._moving = [], start_redistribution([], [])


def _bytes(gradient: DistArray) -> int:
    """Return the bytes of a block, on average: all ranks of a group begin a bucket at the same contribution."""
    count = -(-math.prod(gradient.shape) // gradient.grid.extent(gradient.layout.cut))
    return count * backend.numpy_dtype(gradient.dtype).itemsize


class GradientBuckets:
    """Reduces the gradients of a step over ``data`` and ``seq`` while its backward passes go on.

    A context around all backward passes between two steps of an optimizer. A gradient joins a bucket when the last
    contribution is in: each place at which the layers hold a parameter gives one for each microbatch. With ZeRO 2 and 3
    each contribution joins one at once. A full bucket is begun, and `Parameter.reduce` waits for it. What comes
    against expectation, a layer run twice say, is reduced there; so is everything without this context.

    Parameters
    ----------
    layers : iterable of Layer
    microbatches : int
        Backward passes through each of them.
    size : int
        Bytes of a block's gradients from which on a bucket is full. 0: every gradient has its own.

    Notes
    -----
    **Communication:** the words of the reductions at once. Sums are added in the order of the ranks, so that their bits
    depend neither on `size` nor on the order of the layers.

    References
    ----------
    Li et al.: PyTorch Distributed: experiences on accelerating data parallel training, 2020.

    Examples
    --------
    >>> with GradientBuckets([model], microbatches=2):
    ...     for x, labels in batches:
    ...         backpropagate(model, loss, x, labels, count=count)
    >>> optimizer.step()
    """

    def __init__(self, layers: Iterable[Layer], microbatches: int = 1, size: int = BUCKET_BYTES) -> None:
        layers = list(layers)
        places = [parameter for layer in layers for parameter in layer.parameter_uses()]
        self._parameters = {id(parameter): parameter for parameter in places}
        self._lacking = Counter({key: n * microbatches for key, n in Counter(map(id, places)).items()})
        self._chains = [layer for layer in layers if isinstance(layer, Sequential)]
        self._size, self._open = size, Bucket()
        self._young, self._old = list[Bucket](), list[Bucket]()
        self._flying = deque[Bucket]()

    def __enter__(self) -> GradientBuckets:
        for parameter in self._parameters.values():
            parameter.buckets = self
        self._watching = ExitStack()
        for chain in self._chains:
            self._watching.enter_context(chain.watched(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._watching.close()
        for parameter in self._parameters.values():
            parameter.buckets = None
        if kind is None:
            self._begin()

    def visit(self, kind: str, chain: Sequential, i: int) -> None:
        """Get on with what was begun before the layer that is through: one layer at least has computed meanwhile."""
        for bucket in self._old:
            bucket.get_on()
        self._old, self._young = [*filter(Bucket.lasts, self._old), *self._young], []

    def expect(self, parameter: Parameter) -> None:
        """Expect a contribution more, which is no layer's: the part of another stage."""
        self._lacking[id(parameter)] += 1

    def count(self, parameter: Parameter) -> None:
        """Take note of a contribution to a gradient that stays partial until the last."""
        self._lacking[id(parameter)] -= 1
        if self._lacking[id(parameter)] == 0 and parameter.grad is not None and parameter.grad.layout.partial:
            gradient, parameter.grad = parameter.grad, None
            self._put(parameter, gradient)

    def contribute(self, parameter: Parameter, gradient: DistArray) -> None:
        """Take a contribution, in any layout, to a gradient of which each is reduced."""
        if set(gradient.layout.partial).isdisjoint(parameter.parallelism.copies):
            parameter.add(gradient.redistribute(parameter.owned))
        else:
            self._put(parameter, gradient)

    def _put(self, parameter: Parameter, gradient: DistArray) -> None:
        progress(gradient.grid)
        self._open.put(parameter, gradient)
        if self._open.bytes >= self._size:
            self._begin()

    def _begin(self) -> None:
        self._open.begin()
        self._young.append(self._open)
        self._flying.append(self._open)
        if len(self._flying) > _FLYING:
            self._flying.popleft().land()
        self._open = Bucket()
