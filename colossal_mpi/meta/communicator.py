"""What a meta grid has in the place of MPI: a communicator whose other ranks do not exist, and a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from colossal_mpi.meta.array import MetaArray, work
from colossal_mpi.platform import backend

NAME = "meta"


class Communicator:
    """A Cartesian communicator of which this process is one rank: messages go nowhere and nothing comes.

    Parameters
    ----------
    sizes, coords : sequence of int
    request : object
        What messages without waiting return: a request of MPI that is done.
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
        """Return the communicator of the ranks that differ along the remaining dims."""
        kept = [d for d, keep in enumerate(remain) if keep]
        return Communicator([self._sizes[d] for d in kept], [self._coords[d] for d in kept], self._request)

    def allgather(self, value: Any) -> list[Any]:
        """Return the value as if all ranks had it."""
        return [value] * self.size

    def bcast(self, value: Any, root: int = 0) -> Any:
        """Return the value, whoever has it."""
        return value

    def allreduce(self, value: Any, op: Any = None) -> Any:
        """Return the value."""
        return value

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(name)
        return lambda *_, **__: self._request if name[0] == "I" else None


class _Device:
    """The device of arrays without memory."""

    def count(self) -> int:
        return 0  # none that a grid of this process could be made on

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
