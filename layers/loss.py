"""Losses of arrays that may be cut, the classes of a cross-entropy included."""

from __future__ import annotations

from typing import Any

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.precision import rounded, widened
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


class CrossEntropy:
    """Mean cross-entropy of logits ``[b, s, v]`` or ``[b, v]`` against the labels of all but the last dim.

    Negative labels do not count. With smoothing e the target is ``1 - e`` for the label and ``e / v`` more for every
    class; with z_loss z, ``z (log sum exp)^2`` is added to each loss, which keeps logits from drifting.

    Parameters
    ----------
    parallelism : Parallelism
    ignore : int, optional
        One more label that does not count, of the vocabulary or not, such as padding.
    smoothing : float
        From 0 to 1.
    z_loss : float
        0 or more; PaLM has 1e-4.

    Raises
    ------
    OptionError
        If smoothing or z_loss is out of its range.

    Notes
    -----
    **Communication:** over the axes that cut v, p ranks: one maximum of ``[b, s]`` and one sum of ``[2, b, s]``, in all
    ``6 (p - 1) b s`` words summed over ranks, smoothing and z-loss included; a single word over those that cut b and
    s. An empty block of the vocabulary has maximum -inf and sum 0. Backward: none.

    References
    ----------
    Shoeybi et al.: Megatron-LM, 2019. Szegedy et al.: Rethinking the Inception architecture, 2016 (smoothing).
    Chowdhery et al.: PaLM, 2022 (z-loss).
    """

    def __init__(
        self, parallelism: Parallelism, *, ignore: int | None = None, smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        if not (0 <= smoothing <= 1 and z_loss >= 0):
            raise OptionError(
                f"cross-entropy with smoothing={smoothing} and z_loss={z_loss}: smoothing must be from 0 to 1 and "
                "z_loss 0 or more"
            )
        self.layouts = {len(letters): parallelism.inside(letters, "v") for letters in ("bsv", "bv")}
        self.ignore, self.smoothing, self.z_loss = ignore, smoothing, z_loss

    def forward(self, logits: DistArray, labels: DistArray, count: int | None = None) -> tuple[float, Any]:
        """Return the sum of the losses over `count`, the same bits on every rank, and the cache.

        Parameters
        ----------
        logits : DistArray, ``[b, s, v]`` or ``[b, v]``
            In any layout; free in that of the head's result.
        labels : DistArray of integers, ``[b, s]`` or ``[b]``
        count : int, optional
            Number of labels that count in all microbatches of the step, 1 or more; by default those of `labels`, for
            which one word is summed over the axes that cut them.

        Raises
        ------
        ShapeError
            If the shapes do not fit, nothing counts, or, on the ranks that hold it, a label is not of the vocabulary.
        """
        count = self._count(labels) if count is None else count
        if logits.ndim not in self.layouts or labels.shape != logits.shape[:-1] or count < 1:
            raise ShapeError(
                f"cross-entropy of logits {logits.shape} and labels {labels.shape}, {count} of them valid: logits must "
                "be [b, s, v] or [b, v], labels must have all but their last dim, and one of them must count"
            )
        layout, grid = self.layouts[logits.ndim], logits.grid
        logits, labels = logits.redistribute(layout), self._labels(labels.redistribute(Layout(*layout.dims[:-1])))
        kernels.require_ids(labels.local, logits.shape[-1], least=None)
        start, axes = logits.box[-1][0], logits.layout.dims[-1]
        top = comm.allreduce(kernels.of(grid).peak(logits.local), grid, axes, comm.MAX)
        target = {"on": 1 - self.smoothing, "off": self.smoothing / logits.shape[-1]}
        sums = kernels.of(grid).cross_entropy_sums(logits.local, labels.local, top, start, **target)
        sums = comm.allreduce(sums, grid, axes)
        losses = labels.like(kernels.of(grid).cross_entropy_losses(top, sums, labels.local >= 0, self.z_loss))
        options = {**target, "scale": 1.0 / count, "z_loss": self.z_loss}
        return losses.sum() / count, (logits, labels, top, sums[0, ...], start, options)

    def _count(self, labels: DistArray) -> int:
        labels = self._labels(labels.reduced())
        xp = backend.namespace(labels.local)
        return int(labels.like(xp.astype(labels.local >= 0, xp.int64)).sum())

    def _labels(self, labels: DistArray) -> DistArray:
        if self.ignore is None:
            return labels
        xp = backend.namespace(labels.local)
        return labels.like(xp.where(labels.local == self.ignore, -xp.ones_like(labels.local), labels.local))

    def backward(self, cache: Any, scale: float = 1.0) -> DistArray:
        """Return the cotangent of the logits, times a loss scale, in the layout of the inside of a block."""
        logits, labels, top, total, start, options = cache
        options = {**options, "scale": scale * options["scale"]}
        backward = kernels.of(logits.grid).cross_entropy_backward
        return logits.like(backward(logits.local, labels.local, top, total, start, **options))


class MeanSquaredError:
    """Mean of the squares of ``x - target``, arrays of one shape in any layouts.

    **Communication:** the target is redistributed to the layout of x, and one word is summed over the axes that cut
    it. Backward: none.
    """

    def forward(self, x: DistArray, target: DistArray, count: int | None = None) -> tuple[float, Any]:
        """Return the sum of the squares over `count`, the same bits on every rank, and the cache.

        Parameters
        ----------
        x, target : DistArray
        count : int, optional
            Number of elements in all microbatches of the step; those of `x` by default.

        Raises
        ------
        ShapeError
            If the shapes differ or there is no element.
        """
        count = x.size if count is None else count
        if x.shape != target.shape or count < 1:
            raise ShapeError(
                f"mean squared error of {x.shape} and a target of {target.shape}, {count} elements: the shapes must be "
                "equal and one element must count"
            )
        difference = widened(x.redistribute(x.layout.with_partial())) - widened(target)
        return (difference * difference).sum() / count, (difference, 2.0 / count, x.dtype)

    def backward(self, cache: Any, scale: float = 1.0) -> DistArray:
        """Return the cotangent of x, times a loss scale, in its layout with partial sums made replicated."""
        difference, factor, dtype = cache
        return rounded(difference * (scale * factor), dtype)
