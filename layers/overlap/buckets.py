"""Buckets of gradients, which are reduced over ``data`` and ``seq`` while the backward passes go on.

`Pipeline.step` enters `GradientBuckets`, parameters hand their gradients to it, and `Sequential` tells it which layer
computes. It starts nonblocking redistributions.
"""

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
"""Default size of a bucket in bytes."""
_MOST_IN_FLIGHT = 4
"""Greatest number of buckets under way at once. Many MPIs move large messages only while they are called; with all
buckets of a step under way, their buffers took more memory than the gradients."""


class Bucket:
    """Gradients of several parameters, which one redistribution reduces into the layouts of the optimizer's state."""

    def __init__(self) -> None:
        self.bytes = 0
        self._parameters: list[Parameter] = []
        self._gradients: list[DistArray] = []
        self._moving: PendingRedistribution | None = None

    def put(self, parameter: Parameter, gradient: DistArray) -> None:
        """Add a gradient, or a contribution to one, to the bucket."""
        self._parameters.append(parameter)
        self._gradients.append(gradient)
        parameter.reductions.append(self)
        self.bytes += _bytes(gradient)

    def start(self) -> None:
        """Start the reduction."""
        # dW {U_(data,seq)} of each parameter -> dW in the layout of the state: reduce_scatters over data and seq
        self._moving = start_redistribution(self._gradients, [q.owned for q in self._parameters])
        self._gradients = []

    def advance(self) -> None:
        """Let the reduction progress. If the gradients of each microbatch are reduced, wait for it.

        A deferred gradient may still get a contribution that nobody expected: `Parameter.reduce` finishes it.
        """
        if any(parameter.deferred for parameter in self._parameters):
            assert self._moving is not None
            self._moving.done()
        else:
            self.finish()

    def wait(self) -> None:
        """Wait for the messages of the reduction."""
        assert self._moving is not None
        self._moving.wait()

    def is_open(self) -> bool:
        """Return True until `finish` is called."""
        return bool(self._parameters)

    def finish(self) -> None:
        """Wait for the reduction and add the results to the parameters' gradients. A second call does nothing."""
        if self._moving is None:
            self.start()
        assert self._moving is not None
        for parameter, gradient in zip(self._parameters, self._moving.wait(), strict=True):
            parameter.reductions.remove(self)
            parameter.add(gradient)
        self._parameters, self._moving = [], start_redistribution([], [])


def _bytes(gradient: DistArray) -> int:
    """Return the mean bytes of a block, with which all ranks of a group start a bucket at the same contribution."""
    count = -(-math.prod(gradient.shape) // gradient.grid.extent(gradient.layout.cut))
    return count * backend.numpy_dtype(gradient.dtype).itemsize


class GradientBuckets:
    """A context that reduces the gradients of a step over ``data`` and ``seq`` while its backward passes go on.

    Enter it around all backward passes between two steps of an optimizer. A gradient joins a bucket with its last
    contribution: every layer that holds the parameter contributes once for each microbatch. With ZeRO 2 and 3 each
    contribution joins a bucket at once. The reduction of a full bucket starts, and `Parameter.reduce` waits for it.
    `Parameter.reduce` also reduces a contribution that nobody expected, for example from a layer that ran twice, and
    without this context it reduces everything.

    Parameters
    ----------
    layers : iterable of Layer
        Layers whose gradients are reduced.
    microbatches : int
        Number of backward passes through each of them.
    size : int
        Bytes of a rank's gradients at which a bucket is full. With 0 every gradient has its own bucket.

    Notes
    -----
    **Communication:** the reductions that `Parameter.reduce` would do later, over ``data`` and ``seq``, with as many
    words in fewer messages. Terms are added in the order of the ranks, so that the bits of a sum depend neither on
    `size` nor on the order of the layers.

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
        uses = [parameter for layer in layers for parameter in layer.parameter_uses() if not parameter.frozen]
        self._parameters = {id(parameter): parameter for parameter in uses}
        self._expected = Counter({key: n * microbatches for key, n in Counter(map(id, uses)).items()})
        self._sequentials = [layer for layer in layers if isinstance(layer, Sequential)]
        self._size, self._open = size, Bucket()
        self._new, self._started = list[Bucket](), list[Bucket]()
        self._in_flight = deque[Bucket]()

    def __enter__(self) -> GradientBuckets:
        for parameter in self._parameters.values():
            parameter.buckets = self
        self._watching = ExitStack()
        for sequential in self._sequentials:
            self._watching.enter_context(sequential.watched(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._watching.close()
        for parameter in self._parameters.values():
            parameter.buckets = None
        if kind is None:
            self._start()

    def visit(self, kind: str, chain: Sequential, i: int) -> None:
        """Advance the reductions that started before the previous layer, so that one layer computed meanwhile.

        Parameters
        ----------
        kind : str
            ``"forward"``, ``"backward"`` or ``"weight"``: what the layer computes now.
        chain : Sequential
            The layers around it.
        i : int
            Number of the layer in `chain`.
        """
        for bucket in self._started:
            bucket.advance()
        self._started, self._new = [*filter(Bucket.is_open, self._started), *self._new], []

    def expect(self, parameter: Parameter) -> None:
        """Expect one more contribution that comes from no layer: the gradient of another stage.

        Parameters
        ----------
        parameter : Parameter
            Parameter that two stages hold.
        """
        self._expected[id(parameter)] += 1

    def count(self, parameter: Parameter) -> None:
        """Count a contribution to a deferred gradient, which joins a bucket with the last one.

        Parameters
        ----------
        parameter : Parameter
            Parameter whose gradient got a contribution.
        """
        self._expected[id(parameter)] -= 1
        if self._expected[id(parameter)] == 0 and parameter.grad is not None and parameter.grad.layout.partial:
            gradient, parameter.grad = parameter.grad, None
            self._put(parameter, gradient)

    def contribute(self, parameter: Parameter, gradient: DistArray) -> None:
        """Add a contribution to a gradient whose contributions are reduced one by one, as in ZeRO 2 and 3.

        Parameters
        ----------
        parameter : Parameter
            The parameter.
        gradient : DistArray
            Contribution in any layout.

        Notes
        -----
        **Communication:** a redistribution to the layout of the optimizer's state, at once if the contribution has no
        partial sums over ``data`` and ``seq``, else in a bucket.
        """
        if set(gradient.layout.partial).isdisjoint(parameter.parallelism.copies):
            # dW without {U_data} -> dW in the layout of the state
            parameter.add(gradient.redistribute(parameter.owned))
        else:
            self._put(parameter, gradient)

    def _put(self, parameter: Parameter, gradient: DistArray) -> None:
        progress(gradient.grid)
        self._open.put(parameter, gradient)
        if self._open.bytes >= self._size:
            self._start()

    def _start(self) -> None:
        self._open.start()
        self._new.append(self._open)
        self._in_flight.append(self._open)
        if len(self._in_flight) > _MOST_IN_FLIGHT:
            self._in_flight.popleft().wait()
        self._open = Bucket()
