"""Cross-entropy over a vocabulary that may be cut."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend, comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers.kernels import reference as kernels
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout


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
            In any layout; free in that of the head's result.
        labels : DistArray of integers, ``[b, s]``
            Negative ones do not count.
        count : int
            Number of valid labels in all microbatches of the step, 1 or more.

        Raises
        ------
        ShapeError
            If the shapes do not fit, nothing counts, or, on the ranks that hold it, a label is not of the vocabulary.
        """
        if labels.shape != logits.shape[:2] or count < 1:
            raise ShapeError(
                f"cross-entropy of logits {logits.shape} and labels {labels.shape}, {count} of them valid: labels must "
                "have the first two dims of the logits, and one of them must count"
            )
        xp, grid, axes = backend.namespace(logits.local), logits.grid, self.layout.dims[2]
        logits, labels = logits.redistribute(self.layout), labels.redistribute(Layout(*self.layout.dims[:2]))
        kernels.require_ids(labels.local, logits.shape[2], least=None)
        start = logits.box[2][0]
        top = comm.allreduce(kernels.peak(logits.local), grid, axes, comm.MAX)
        sums = kernels.cross_entropy_sums(logits.local, labels.local, top, start)
        total, target = comm.allreduce(sums, grid, axes)
        valid = xp.astype(labels.local >= 0, logits.dtype)
        losses = labels.like((xp.log(total) - target) * valid)
        return losses.sum() / count, (logits, labels, top, total, start, 1.0 / count)

    def backward(self, cache: Any) -> DistArray:
        """Return the cotangent of the logits, in the layout of the inside of a block."""
        logits, labels, top, total, start, scale = cache
        return logits.like(kernels.cross_entropy_backward(logits.local, labels.local, top, total, start, scale))
