"""Substitutes for MPI and a GPU on meta grids: a communicator whose other ranks do not exist, and a device.

`Grid.meta` makes the communicator. ``platform.backend`` finds the device by its name when blocks of a meta grid are
made, read or written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from colossal_mpi.meta.array import MetaArray, work
from colossal_mpi.platform import backend

NAME = "meta"
"""The name of the device of meta arrays."""


class Communicator:
    """A Cartesian communicator with this process as its only real rank.

    It drops sent messages and delivers nothing. Where all ranks collect objects, each seems to have sent the same one.

    Parameters
    ----------
    sizes : sequence of int
        Size of each dim.
    coords : sequence of int
        The coordinates of this rank.
    request : object
        A completed request of MPI, which nonblocking messages return.
    """

    def __init__(self, sizes: Sequence[int], coords: Sequence[int], request: Any) -> None:
        self._sizes, self._coords, self._request = list(sizes), list(coords), request
        self.size = math.prod(sizes)
        self.rank = int(np.ravel_multi_index(self._coords, self._sizes)) if self._sizes else 0

    def Get_rank(self) -> int:  # noqa: N802 - MPI's names
        """Return the number of this rank."""
        return self.rank

    def Get_size(self) -> int:  # noqa: N802
        """Return the number of ranks."""
        return self.size

    def Sub(self, remain: Sequence[bool]) -> Communicator:  # noqa: N802
        """Return the communicator of the ranks that differ from this one along the remaining dims only."""
        kept = [d for d, keep in enumerate(remain) if keep]
        return Communicator([self._sizes[d] for d in kept], [self._coords[d] for d in kept], self._request)

    def allgather(self, value: Any) -> list[Any]:
        """Return one copy of the value for each rank."""
        return [value] * self.size

    def bcast(self, value: Any, root: int = 0) -> Any:
        """Return the value, whichever rank is the root."""
        return value

    def allreduce(self, value: Any, op: Any = None) -> Any:
        """Return the value, the maximum of the equal values that all ranks of a meta grid have."""
        return value

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(name)
        return lambda *_, **__: self._request if name[0] == "I" else None


class _Device:
    """The device of meta arrays, with the functions that ``platform.backend`` asks of a device."""

    def count(self) -> int:
        return 0  # no grid with ranks can be made on it

    def namespace(self, index: int) -> Any:
        return MetaArray.namespace

    def owns(self, block: Any) -> bool:
        return isinstance(block, MetaArray)

    def read(self, block: Any, host: np.ndarray) -> None:
        host[...] = 0

    def write(self, block: Any, host: np.ndarray) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def pinned(self, nbytes: int) -> Any:
        raise NotImplementedError("a meta grid has no host memory")

    def gemm(self, a: Any, b: Any, c: Any, alpha: complex, beta: complex, conj: tuple[bool, bool]) -> bool:
        work(2 * c.size * a.shape[1], a, b, c)
        return True

    def matmul(self, a: Any, b: Any) -> Any:
        work(2 * a.size * b.shape[-1], a, b)
        return MetaArray.namespace.matmul(a, b)


backend.register(NAME, _Device())
