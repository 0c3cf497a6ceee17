"""The search for NaN and infinity: in blocks, in the state of an optimizer, and in the passes of a step done again.

`Optimizer.step` calls `nan_if_not_finite`, so that damage in its state shows in the norm that it reduces anyway, and
`scan` when the norm is not finite. The trainer calls `watch` while it does such a step again, to find where it begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Arrays, Cache, Later, Layer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Place = tuple[int, ...]
"""The global index of an element."""


def not_finite(block: Block) -> bool:
    """Say whether a block has a NaN or an infinity.

    Parameters
    ----------
    block : array
        A block of any dtype and shape.

    Returns
    -------
    bool
        True if it does; False for integers.
    """
    xp = backend.namespace(block)
    dtype = backend.numpy_dtype(block.dtype)
    if dtype.kind not in "fc" and not backend.is_half(dtype):
        return False
    if type(block) is np.ndarray and dtype.kind == "f" and dtype.itemsize in (4, 8):
        flat = block.reshape(-1)
        # x . x is the quickest look at all elements; only where it is not finite is each element looked at
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(flat, flat)):
                return False
    return not bool(xp.all(xp.isfinite(block)))


def nan_if_not_finite(blocks: Iterable[Block]) -> Any:
    """Return 0, or NaN if some block has a NaN or an infinity.

    Parameters
    ----------
    blocks : iterable of array
        Blocks in host memory or on a device, of floats.

    Returns
    -------
    float or array
        A number; for blocks on a device an array without dims, for which the host does not wait.
    """
    total: Any = 0.0
    for block in blocks:
        if type(block) is np.ndarray:
            if not_finite(block):
                return math.nan
        else:
            xp = backend.namespace(block)
            total = total + xp.sum(xp.where(xp.isfinite(block), 0.0, math.nan))
    return total


def first_place(array: DistArray) -> Place | None:
    """Return the global index of the first NaN or infinity of this rank's block.

    Parameters
    ----------
    array : DistArray
        Any array.

    Returns
    -------
    tuple of int or None
        The index in the global array; None if the block is finite.
    """
    if not not_finite(array.local):
        return None
    bad = ~np.isfinite(backend.to_host(array.local))
    inside = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return tuple(int(low + i) for (low, _), i in zip(array.box, inside, strict=True))


def scan(arrays: Mapping[str, DistArray]) -> tuple[str, Place] | None:
    """Return the first of some arrays whose block on this rank has a NaN or an infinity, and where.

    Parameters
    ----------
    arrays : mapping of str to DistArray
        Arrays by name.

    Returns
    -------
    tuple of (str, tuple of int) or None
        The name and the global index; None if all blocks are finite.
    """
    for name, array in arrays.items():
        if (place := first_place(array)) is not None:
            return name, place
    return None


Key = tuple[int, int, int, int]
"""The order of a pass: microbatch, 0 for forward or 1 for backward, chunk in that pass, and number within the chunk."""


_AFTER_ALL_CHUNKS = 1 << 30


@dataclass
class Sighting:
    """The first NaN or infinity that one rank has seen in the passes of a step."""

    key: Key
    what: str
    place: Place


@dataclass
class Watch:
    """A watch looks at the arrays of a step's passes on one rank, and keeps the first that is not finite.

    Attributes
    ----------
    first : Sighting or None
        The first NaN or infinity in the order of the passes; None if all is finite.
    """

    first: Sighting | None = None
    _now: tuple[int, int, int] = (0, 0, 0)
    _number: int = 0
    caches: list[tuple[Cache, int]] = field(default_factory=list)
    """The caches of the chunks' forward passes, each with its microbatch."""

    def see(self, what: str, arrays: Any) -> None:
        """Look at an array, or a tuple of arrays, and keep it if it is the first that is not finite."""
        self._number += 1
        key = (*self._now, self._number)
        if self.first is not None and self.first.key <= key:
            return
        for array in arrays if isinstance(arrays, tuple | list) else [arrays]:
            place = first_place(array) if isinstance(array, DistArray) else None
            if place is not None:
                self.first = Sighting(key, f"{what} of microbatch {self._now[0]}", place)
                return

    def see_loss(self, loss: float, microbatch: int) -> None:
        """Look at the loss of a microbatch, which follows the forward pass of the last chunk."""
        key = (microbatch, 0, _AFTER_ALL_CHUNKS, 0)
        if not math.isfinite(loss) and (self.first is None or key < self.first.key):
            self.first = Sighting(key, f"loss of microbatch {microbatch}", ())

    def enter(self, microbatch: int, backward: bool, chunk: int) -> None:
        """Begin a pass through a chunk, with its number in the order of the pass.

        Parameters
        ----------
        microbatch : int
            Number of the microbatch.
        backward : bool
            True for a backward pass.
        chunk : int
            Number of the chunk in the model.
        """
        self._now, self._number = (microbatch, int(backward), -chunk if backward else chunk), 0


@contextmanager
def watch(chunks: Mapping[int, Layer]) -> Iterator[Watch]:
    """Look at the output of every layer, its cotangent and the contributions to gradients in the passes of a step.

    Parameters
    ----------
    chunks : mapping of int to Layer
        The chunks of this rank's stage by their number in the model.

    Yields
    ------
    Watch
        What this rank has seen.

    Notes
    -----
    **Communication:** none. Each array is read once more, so a step is not watched unless something is wrong.
    """
    found, seen = Watch(), set[int]()
    kept: list[tuple[object, str, Any]] = []

    def put(owner: object, name: str, function: Callable[..., Any]) -> None:
        kept.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, function)

    for number, chunk in chunks.items():
        for parameter in chunk.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                put(parameter, "accumulate", _gradient(found, parameter))
        for layer in chunk.walk():
            if layer is not chunk and id(layer) not in seen:
                seen.add(id(layer))
                put(layer, "forward", _forward(found, layer))
                put(layer, "backward", _backward(found, layer))
        put(chunk, "forward", _first(found, _forward(found, chunk), number))
        put(chunk, "backward", _last(found, chunk.backward, number))
    try:
        yield found
    finally:
        for owner, name, before in reversed(kept):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _gradient(found: Watch, parameter: Parameter) -> Callable[[DistArray], None]:
    plain = parameter.accumulate

    def accumulate(grad: DistArray) -> None:
        found.see(f"gradient of {parameter.name}, backward pass", grad)
        plain(grad)

    return accumulate


def _forward(found: Watch, layer: Layer) -> Callable[..., Any]:
    plain = layer.forward

    def forward(x: Arrays, ctx: Context) -> tuple[Arrays, Cache]:
        y, cache = plain(x, ctx)
        found.see(f"output of {layer.label}, forward pass", y)
        return y, cache

    return forward


def _backward(found: Watch, layer: Layer) -> Callable[..., Any]:
    plain = layer.backward

    def backward(dy: Arrays, cache: Cache, later: Later = None) -> Arrays:
        dx = plain(dy, cache, later)
        found.see(f"cotangent of the input of {layer.label}, backward pass", dx)
        return dx

    return backward


def _first(found: Watch, watched: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Return the forward pass of a chunk, which counts its microbatches."""
    count = itertools.count()

    def forward(x: Arrays, ctx: Context) -> tuple[Arrays, Cache]:
        microbatch = next(count)
        found.enter(microbatch, False, number)
        y, cache = watched(x, ctx)
        found.caches.append((cache, microbatch))
        return y, cache

    return forward


def _last(found: Watch, plain: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Return the backward pass of a chunk, which finds its microbatch by the cache."""

    def backward(dy: Arrays, cache: Cache, later: Later = None) -> Arrays:
        microbatch = next(mb for kept, mb in found.caches if kept is cache)
        found.enter(microbatch, True, number)
        found.see("cotangent of the output, backward pass", dy)
        before = len(later or ())
        dx = plain(dy, cache, later)
        if later is not None:
            later[before:] = [_put_off(found, microbatch, number, work) for work in later[before:]]
        return dx

    return backward


def _put_off(found: Watch, microbatch: int, number: int, work: Callable[[], None]) -> Callable[[], None]:
    def done() -> None:
        found.enter(microbatch, True, number)
        work()

    return done
