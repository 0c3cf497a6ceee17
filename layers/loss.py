"""Losses, the number of correct predictions, and the backward pass from the loss through the model.

Training and pipelines call a loss with the model's output and the labels, and `backpropagate` where there is one stage.
Losses take arrays in any layout, and a cross-entropy takes cut classes; they call the kernels of the grid for blocks
and an allreduce for maxima and sums.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Arrays, Cache, Layer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.precision import rounded, widened
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


class Loss(Protocol):
    """The methods that every loss has: `CrossEntropy`, `MeanSquaredError` or a user's own class."""

    def forward(self, x: Arrays, target: Arrays, count: int | None) -> tuple[float, Cache]:
        """Return the loss, the same bits on every rank, and the cache that `backward` takes."""

    def backward(self, cache: Cache, scale: float = 1.0) -> Arrays:
        """Return the cotangent of x, times a loss scale."""


def backpropagate(
    model: Layer,
    loss: Loss,
    x: Arrays,
    target: Arrays,
    ctx: Context | None = None,
    *,
    count: int | None = None,
) -> float:
    """Return the loss of a model and add its gradients to the gradients of the parameters.

    Parameters
    ----------
    model : Layer
        The whole model.
    loss : Loss
        Compares the output of the model with the target.
    x : DistArray
        The input of the model.
    target : DistArray
        Labels, or another target that the loss takes.
    ctx : Context, optional
        The step, and the tokens' positions and masks; by default `Context` with none.
    count : int, optional
        The divisor of the loss: the number of labels that count in all microbatches of the step. By default only this
        microbatch counts.

    Returns
    -------
    float
        The loss with the auxiliary losses of the layers, the same bits on every rank.

    Notes
    -----
    **Communication:** the collectives of the model's layers and of the loss.

    Examples
    --------
    >>> backpropagate(model, CrossEntropy(parallelism), ids, labels, Context(step=0))
    10.82
    """
    ctx, own = ctx or Context(), dict[str, float]()
    y, cache = model.forward(x, replace(ctx, auxiliary=replace(ctx.auxiliary, values=own)))
    value, saved = loss.forward(y, target, count)
    model.backward(loss.backward(saved, ctx.scale), cache)
    if ctx.auxiliary.values is not None:
        ctx.auxiliary.values.update(own)
    return value + sum(own.values())


class CrossEntropy:
    """The mean cross-entropy of logits ``[b, s, v]`` or ``[b, v]`` against labels of all but the last dim.

    Parameters
    ----------
    parallelism : Parallelism
        The mode, which chooses the layout in which the loss is computed.
    ignore : int, optional
        One more label that does not count, inside or outside of the vocabulary, such as padding. Negative labels never
        count.
    smoothing : float
        Label smoothing e, from 0 to 1: the target is ``1 - e`` for the label plus ``e / v`` for every class.
    z_loss : float
        Factor z, 0 or more: ``z log(sum exp(logits))^2`` is added to each loss, which keeps logits from drifting. PaLM
        takes 1e-4.

    Raises
    ------
    OptionError
        If smoothing or z_loss is out of its range.

    Notes
    -----
    An empty block of the vocabulary has maximum -inf and sum 0.

    **Communication:** over the axes that cut v, p ranks: an allreduce of maxima ``[b, s]`` and one of sums
    ``[2, b, s]``, together ``6 (p - 1) b s`` words summed over ranks, smoothing and z-loss included; a single word over
    the axes that cut b and s. Backward none.

    References
    ----------
    Shoeybi et al.: Megatron-LM, 2019. Szegedy et al.: Rethinking the Inception architecture, 2016 (smoothing).
    Chowdhery et al.: PaLM, 2022 (z-loss).

    Examples
    --------
    >>> value, cache = CrossEntropy(parallelism).forward(logits, labels)
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

    def forward(self, logits: DistArray, labels: DistArray, count: int | None = None) -> tuple[float, Cache]:
        """Return the sum of the losses divided by `count`, and the cache that `backward` takes.

        Parameters
        ----------
        logits : DistArray, ``[b, s, v]`` or ``[b, v]``
            The logits in any layout; the layout in which the head returns them moves nothing.
        labels : DistArray of int, ``[b, s]`` or ``[b]``
            The classes, from 0 to v - 1, or labels that do not count, in any layout.
        count : int, optional
            The number of labels that count in all microbatches of the step, 1 or more; by default of `labels` alone,
            for which one word is summed over the axes that cut them.

        Returns
        -------
        loss : float
            The same bits on every rank.
        cache : object
            The input of `backward`.

        Raises
        ------
        ShapeError
            If the shapes do not fit, no label counts, or, on the ranks that hold it, a label is outside of the
            vocabulary.
        """
        count = self._count(labels) if count is None else count
        if logits.ndim not in self.layouts or labels.shape != logits.shape[:-1] or count < 1:
            raise ShapeError(
                f"cross-entropy of logits {logits.shape} and labels {labels.shape}, {count} of them valid: logits must "
                "be [b, s, v] or [b, v], labels must have all but their last dim, and one of them must count"
            )
        layout, grid = self.layouts[logits.ndim], logits.grid
        # logits -> logits[B, S, V_col], labels -> labels[B, S]: nothing moves if they come so
        logits, labels = logits.redistribute(layout), self._labels(labels.redistribute(Layout(*layout.dims[:-1])))
        kernels.require_ids(labels.local, logits.shape[-1], least=None)
        start, axes = logits.box[-1][0], logits.layout.dims[-1]
        # logits[B, S, V_col] -> max over v: top[B, S], an allreduce (MAX) over col
        top = comm.allreduce(kernels.of(grid).peak(logits.local), grid, axes, comm.MAX)
        # sum over v of exp(logits - top), and of target . logits: sums[2, B, S] {U_col} -> sums[2, B, S], an allreduce
        target = {"on": 1 - self.smoothing, "off": self.smoothing / logits.shape[-1]}
        sums = kernels.of(grid).cross_entropy_sums(logits.local, labels.local, top, start, **target)
        sums = comm.allreduce(sums, grid, axes)
        losses = labels.like(kernels.of(grid).cross_entropy_losses(top, sums, labels.local >= 0, self.z_loss))
        options = {**target, "scale": 1.0 / count, "z_loss": self.z_loss}
        # losses[B_row, S] summed over b and s: a word over the axes that cut them
        return losses.sum() / count, (logits, labels, top, sums[0, ...], start, options)

    def _count(self, labels: DistArray) -> int:
        """Return how many labels count."""
        labels = self._labels(labels.reduced())
        xp = backend.namespace(labels.local)
        # counts[B_row, S] summed over b and s: a word over the axes that cut them
        return int(labels.like(xp.astype(labels.local >= 0, xp.int64)).sum())

    def _labels(self, labels: DistArray) -> DistArray:
        """Return the labels with -1 in place of the ignored one."""
        if self.ignore is None:
            return labels
        xp = backend.namespace(labels.local)
        return labels.like(xp.where(labels.local == self.ignore, -xp.ones_like(labels.local), labels.local))

    def backward(self, cache: Cache, scale: float = 1.0) -> DistArray:
        """Return the cotangent of the logits.

        Parameters
        ----------
        cache : object
            What `forward` returned.
        scale : float
            Loss scale that multiplies the cotangent.

        Returns
        -------
        DistArray, ``[b, s, v]`` or ``[b, v]``
            ``(softmax(logits) - target) scale / count``, in the layout of the inside of a block.
        """
        logits, labels, top, total, start, options = cache
        options = {**options, "scale": scale * options["scale"]}
        backward = kernels.of(logits.grid).cross_entropy_backward
        dlogits: DistArray = logits.like(backward(logits.local, labels.local, top, total, start, **options))
        return dlogits


class MeanSquaredError:
    """The mean of the squares of ``x - target``, for two arrays of one shape in any layouts.

    Notes
    -----
    **Communication:** the target is redistributed to the layout of x, and one word is summed over the axes that cut x.
    Backward none.
    """

    def forward(self, x: DistArray, target: DistArray, count: int | None = None) -> tuple[float, Cache]:
        """Return the sum of the squares divided by `count`, and the cache that `backward` takes.

        Parameters
        ----------
        x : DistArray
            The output of a model.
        target : DistArray
            An array of the shape of x.
        count : int, optional
            The number of elements in all microbatches of the step, 1 or more; by default of x alone.

        Returns
        -------
        loss : float
            The same bits on every rank.
        cache : object
            The input of `backward`.

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
        # X {U} -> X: partial sums are reduced; X - target, in the layout of X
        difference = widened(x.redistribute(x.layout.with_partial())) - widened(target)
        return (difference * difference).sum() / count, (difference, 2.0 / count, x.dtype)

    def backward(self, cache: Cache, scale: float = 1.0) -> DistArray:
        """Return the cotangent of x.

        Parameters
        ----------
        cache : object
            What `forward` returned.
        scale : float
            Loss scale that multiplies the cotangent.

        Returns
        -------
        DistArray
            ``2 (x - target) scale / count``, in the layout of x with partial sums made replicated.
        """
        difference, factor, dtype = cache
        return rounded(difference * (scale * factor), dtype)


def count_correct(logits: DistArray, labels: DistArray) -> int:
    """Return the number of labels that name the class of the greatest logit; of equal logits the first counts.

    Parameters
    ----------
    logits : DistArray, ``[..., v]``
        The logits in any layout.
    labels : DistArray of int, ``[...]``
        The classes in any layout; negative labels do not count.

    Returns
    -------
    int
        The number, the same on every rank.

    Raises
    ------
    ShapeError
        If the labels do not have the shape of all but the last dim of the logits.

    Notes
    -----
    **Communication:** over the axes that cut v, p ranks: an allreduce of the greatest logits and one of their places,
    together ``4 (p - 1)`` words for each label, summed over ranks; a single word over the axes that cut the labels.
    """
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(
            f"count_correct: labels {labels.shape} must have all but the last dim of the logits {logits.shape}"
        )
    # logits {U} -> logits[B, S, V_col]: partial sums are reduced; labels -> labels[B, S]
    logits = logits.redistribute(logits.layout.with_partial())
    labels = labels.redistribute(Layout(*logits.layout.dims[:-1]))
    block, (start, stop), axes = logits.local, logits.box[-1], logits.layout.dims[-1]
    xp, most = backend.namespace(block), kernels.of(logits.grid).peak(block)
    # logits[B, S, V_col] -> max over v: top[B, S], an allreduce (MAX) over col
    top = comm.allreduce(most, logits.grid, axes, comm.MAX)
    # A place is counted from the end, so that the greatest place belongs to the first class.
    place = xp.zeros_like(labels.local)
    if stop > start:
        first = xp.astype(xp.argmax(block, axis=-1), place.dtype) + start
        place = xp.where(most == top, logits.shape[-1] - first, place)
    # place[B, S] in each part of v -> the greatest place[B, S], an allreduce (MAX) over col
    place = comm.allreduce(place, logits.grid, axes, comm.MAX)
    right = logits.shape[-1] - place == labels.local
    # right[B_row, S] summed over b and s: a word over the axes that cut them
    return int(labels.like(xp.astype(right, xp.int64)).sum())
