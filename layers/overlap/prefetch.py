"""Weights gathered while the layer before computes."""

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
"""``forward`` or ``backward``, the identity of a chain, the number of a layer in it."""


class _Gathered:
    """The weights of a layer on their way."""

    def __init__(self, uses: Sequence[tuple[Parameter, Layout]]) -> None:
        self._moving = start_redistribution([q.value for q, _ in uses], [layout for _, layout in uses])
        self._arrays: list[DistArray | None] | None = None

    def take(self, i: int) -> DistArray:
        """Wait, and hand out array i, which is not kept here: it is free when the layer no longer uses it."""
        if self._arrays is None:
            self._arrays = [*self._moving.wait()]
            self._moving = start_redistribution([], [])
        array, self._arrays[i] = self._arrays[i], None
        assert array is not None
        return array


class Prefetch:
    """Gathers the weights of the layer that comes next while one computes, where they are gathered for each use.

    Layers are those of chains, blocks of a model say. Which weights a layer takes, in which layout, is learnt when it
    first goes forward and backward; what a layer takes against expectation, or a second time in a pass, is gathered
    when it does. At most the weights of two layers are there: of the one that computes and of the next.

    **Communication:** that of the gathers at once, of a layer's weights in the same messages.

    References
    ----------
    Rajbhandari et al.: ZeRO-Infinity: breaking the GPU memory wall for extreme scale deep learning, 2021.
    """

    def __init__(self) -> None:
        self._uses: dict[Visit, list[tuple[Parameter, Layout]]] = {}
        self._coming: defaultdict[tuple[int, Layout], deque[tuple[_Gathered, int]]] = defaultdict(deque)
        self._order: deque[Visit] = deque()
        self._now: Visit | None = None
        self._seen: list[tuple[Parameter, Layout]] = []

    @contextmanager
    def over(self, layers: Iterable[Layer], order: Iterable[tuple[str, Layer]]) -> Iterator[None]:
        """Watch chains while they compute.

        Parameters
        ----------
        layers : iterable of Layer
            Those that are no chains gather their weights when they use them.
        order : iterable of (str, Layer)
            The passes to come, ``forward`` or ``backward``, of these layers.
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
        """Begin to gather for the layer after layer i of a chain, which computes now."""
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
        if self._now is not None:
            self._uses.setdefault(self._now, self._seen)
        self._now, self._seen = None, []

    def take(self, parameter: Parameter, layout: Layout) -> DistArray:
        """Return a weight in the layout of its use."""
        if parameter.value.layout == layout.on(parameter.value.grid.axes, parameter.value.ndim):
            return parameter.value
        if (parameter, layout) not in self._seen:  # a weight that recompute takes twice would be there twice
            self._seen.append((parameter, layout))
        coming = self._coming[id(parameter), layout]
        progress(parameter.value.grid)
        if not coming:
            return parameter.value.redistribute(layout)
        gathered, i = coming.popleft()
        return gathered.take(i)

    def _end(self) -> None:
        """Wait for what no layer took."""
        self._learn()
        for coming in self._coming.values():
            for gathered, i in coming:
                gathered.take(i)
        self._coming.clear()
        self._order.clear()


def _visits(kind: str, layer: Layer) -> list[Visit]:
    if not isinstance(layer, Sequential):
        return []
    numbers = range(len(layer.layers))
    return [(kind, id(layer), i) for i in (numbers if kind == "forward" else reversed(numbers))]
