"""Prefetch of weights: the weights of the next layer are gathered while a layer computes (ZeRO 3).

`Pipeline` enters `Prefetch.over` around a step, `Sequential` tells it which layer computes, and `Parameter.use` takes
gathered weights from it. It starts nonblocking redistributions.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from colossal_mpi.comm import progress
from colossal_mpi.distarray import DistArray, start_redistribution
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout

Visit: TypeAlias = tuple[str, int, int]
"""A pass of a layer: ``forward`` or ``backward``, the id of a `Sequential`, and the number of the layer in it."""


class _Gathered:
    """The weights of a layer, whose gather is under way."""

    def __init__(self, uses: Sequence[tuple[Parameter, Layout]]) -> None:
        # W[H_(row,data), F_col] -> W[H_row, F_col] of all weights of a layer: one allgather over data
        self._moving = start_redistribution([q.value for q, _ in uses], [layout for _, layout in uses])
        self._arrays: list[DistArray | None] | None = None

    def take(self, i: int) -> DistArray:
        """Wait, and hand out array i without keeping it, so that it is free when the layer no longer uses it."""
        if self._arrays is None:
            self._arrays = [*self._moving.wait()]
            self._moving = start_redistribution([], [])
        array, self._arrays[i] = self._arrays[i], None
        assert array is not None
        return array


class Prefetch:
    """The gather of the next layer's weights while a layer computes, where weights are gathered for each use.

    It works on the layers of a `Sequential`, such as the blocks of a model. The first pass of a layer, forward and
    backward, shows which weights it uses in which layout. A weight that a layer uses unexpectedly, or a second time in
    a pass, is gathered when it is used. At most two layers have gathered weights: the one that computes and the next
    one.

    Notes
    -----
    **Communication:** the allgathers over ``data`` that the layers would do later, with as many words; all weights of
    a layer share the messages.

    References
    ----------
    Rajbhandari et al.: ZeRO-Infinity: breaking the GPU memory wall for extreme scale deep learning, 2021.

    Examples
    --------
    >>> prefetch = Prefetch()
    >>> with prefetch.over([model], [("forward", model), ("backward", model)]):
    ...     backpropagate(model, loss, x, labels)
    """

    def __init__(self) -> None:
        self._uses: dict[Visit, list[tuple[Parameter, Layout]]] = {}
        self._coming: defaultdict[tuple[int, Layout], deque[tuple[_Gathered, int]]] = defaultdict(deque)
        self._order: deque[Visit] = deque()
        self._now: Visit | None = None
        self._seen: list[tuple[Parameter, Layout]] = []

    @contextmanager
    def over(self, layers: Iterable[Layer], order: Iterable[tuple[str, Layer]]) -> Iterator[None]:
        """Prefetch the weights of some layers until the context ends.

        Parameters
        ----------
        layers : iterable of Layer
            Layers that compute inside the context. Those that are no `Sequential` gather their weights when they use
            them.
        order : iterable of (str, Layer)
            The passes to come, each ``"forward"`` or ``"backward"`` with one of these layers.

        Yields
        ------
        None
            Weights are prefetched inside the context.
        """
        chains = [layer for layer in layers if isinstance(layer, Sequential)]
        parameters = [q for chain in chains for q in chain.parameters()]
        watched = [q for q in parameters if q.parallelism.zero == 3 and q.parallelism.copies]
        if not watched:
            yield
            return
        self._order = deque(visit for kind, layer in order for visit in _visits(kind, layer))
        try:
            with ExitStack() as stack:
                for chain in chains:
                    stack.enter_context(chain.watched(self))
                for parameter in watched:
                    parameter.prefetch = self
                yield
        finally:
            for parameter in watched:
                parameter.prefetch = None
        self._end()

    def visit(self, kind: str, chain: Sequential, i: int) -> None:
        """Start to gather the weights of the layer after the one that computes now.

        Parameters
        ----------
        kind : str
            ``"forward"``, ``"backward"`` or ``"weight"``: what the layer computes now.
        chain : Sequential
            The layers around it.
        i : int
            Number of the layer in `chain`.

        Notes
        -----
        **Communication:** one allgather over ``data``, started and not waited for.
        """
        self._learn()
        if kind == "weight":
            return
        self._now = kind, id(chain), i
        if self._order and self._order.popleft() != self._now:
            self._order.clear()
        if self._order and self._uses.get(self._order[0]):
            uses = self._uses[self._order[0]]
            gathered = _Gathered(uses)
            for place, (parameter, layout) in enumerate(uses):
                self._coming[id(parameter), layout].append((gathered, place))

    def _learn(self) -> None:
        """Remember which weights the last pass used."""
        if self._now is not None:
            self._uses.setdefault(self._now, self._seen)
        self._now, self._seen = None, []

    def take(self, parameter: Parameter, layout: Layout) -> DistArray:
        """Return a weight in the layout in which a layer uses it.

        Parameters
        ----------
        parameter : Parameter
            The parameter.
        layout : Layout
            Layout that the layer uses.

        Returns
        -------
        DistArray
            The gathered weight.

        Notes
        -----
        **Communication:** waits for the gather that `visit` started; without one, gathers the weight now.
        """
        if parameter.value.layout == layout.on(parameter.value.grid.axes, parameter.value.ndim):
            return parameter.value
        if (parameter, layout) not in self._seen:  # recompute uses a weight twice: gather it once
            self._seen.append((parameter, layout))
        coming = self._coming[id(parameter), layout]
        progress(parameter.value.grid)
        if not coming:
            # W[H_(row,data), F_col] -> W[H_row, F_col]: allgather over data
            return parameter.value.redistribute(layout)
        gathered, i = coming.popleft()
        return gathered.take(i)

    def _end(self) -> None:
        """Wait for gathers whose weights no layer took."""
        self._learn()
        for coming in self._coming.values():
            for gathered, i in coming:
                gathered.take(i)
        self._coming.clear()
        self._order.clear()


def _visits(kind: str, layer: Layer) -> list[Visit]:
    """Return the passes of the layers of a `Sequential` in their order."""
    if not isinstance(layer, Sequential):
        return []
    numbers = range(len(layer.layers))
    return [(kind, id(layer), i) for i in (numbers if kind == "forward" else reversed(numbers))]
