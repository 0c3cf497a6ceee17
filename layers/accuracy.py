"""How often the greatest logit is that of the label."""

from __future__ import annotations

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


def correct(logits: DistArray, labels: DistArray) -> int:
    """Return how many labels name the class of the greatest logit, the first of equal ones; negative ones do not count.

    Parameters
    ----------
    logits : DistArray, ``[..., v]``
        In any layout.
    labels : DistArray of integers, ``[...]``
        In any layout.

    Raises
    ------
    ShapeError
        If labels are not of the shape of all but the last dim of the logits.

    Notes
    -----
    **Communication:** over the axes that cut v, p ranks: a maximum of the logits and one of places, in all
    ``4 (p - 1)`` words for each label, summed over ranks; a single word over the axes that cut the labels.
    """
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(f"correct: labels {labels.shape} must have all but the last dim of the logits {logits.shape}")
    logits = logits.redistribute(logits.layout.with_partial())
    labels = labels.redistribute(Layout(*logits.layout.dims[:-1]))
    block, (start, stop), axes = logits.local, logits.box[-1], logits.layout.dims[-1]
    xp, most = backend.namespace(block), kernels.of(logits.grid).peak(block)
    top = comm.allreduce(most, logits.grid, axes, comm.MAX)
    # Counted from the end, so that the greatest place is that of the first class.
    place = xp.zeros_like(labels.local)
    if stop > start:
        first = xp.astype(xp.argmax(block, axis=-1), place.dtype) + start
        place = xp.where(most == top, logits.shape[-1] - first, place)
    place = comm.allreduce(place, logits.grid, axes, comm.MAX)
    right = logits.shape[-1] - place == labels.local
    return int(labels.like(xp.astype(right, xp.int64)).sum())
