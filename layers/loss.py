"""Cross-entropy over a vocabulary that may be cut."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend, comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.kernels import reference as kernels
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout, bounds


class CrossEntropy:
    """Mean cross-entropy of logits ``[b, s, v]`` against labels ``[b, s]``, over all labels that are not negative.

    Notes
    -----
    **Communication:** over the axes that cut v: one maximum of ``[b, s]`` and one sum of ``[2, b, s]``; a single word
    over those that cut b and s. An empty block of the vocabulary has maximum -inf and sum 0. Backward: none.

    References
    ----------
    Shoeybi et al.: Megatron-LM, 2019.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.layout = parallelism.inside("bsv", "v")

    def forward(self, logits: DistArray, labels: DistArray, count: int) -> tuple[float, Any]:
        """Return the sum of the losses over `count`, the same bits on every rank, and the cache.

        Parameters
        ----------
        logits : DistArray, ``[b, s, v]``
        labels : DistArray of integers, ``[b, s]``
        count : int
            Number of valid labels in all microbatches of the step.
        """
        xp, grid, axes = backend.namespace(logits.local), logits.grid, self.layout.dims[2]
        labels = labels.redistribute(Layout(*self.layout.dims[:2]))
        start, _ = bounds(logits.shape[2], axes, grid.axes, grid.coords)
        top = comm.allreduce(kernels.peak(logits.local), grid, axes, comm.MAX)
        sums = kernels.cross_entropy_sums(logits.local, labels.local, top, start)
        total, target = comm.allreduce(sums, grid, axes)
        spread = xp.log(total)
        valid = xp.astype(labels.local >= 0, logits.dtype)
        losses = labels.like((spread - target) * valid)
        return losses.sum() / count, (logits, labels, top + spread, start, 1.0 / count)

    def backward(self, cache: Any) -> DistArray:
        """Return the cotangent of the logits, in their layout."""
        logits, labels, lse, start, scale = cache
        return logits.like(kernels.cross_entropy_backward(logits.local, labels.local, lse, start, scale))
