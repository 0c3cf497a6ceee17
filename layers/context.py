"""The context of a forward pass: the step that it belongs to, and the positions, order and padding of its tokens.

Training, pipelines and generation make a `Context` for each microbatch, and layers read it: dropout reads the step,
attention the mask, the positions and the order, and experts the share of their losses. It calls `redistribute` where
one of its arrays has another layout than a layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import DTypeError, ShapeError
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class KeyValueCache(Protocol):
    """The keys and values of earlier tokens, as attention uses them; `layers.inference` implements it."""

    def attend(self, layer: object, q: DistArray, kv: DistArray, ctx: Context) -> DistArray:
        """Append keys and values ``[b, s, 2, g, d]`` and return the attention of the queries to all of them.

        Parameters
        ----------
        layer : object
            The attention layer, whose keys and values are kept apart from those of others.
        q : DistArray, ``[b, s, ...]``
            The queries of the new tokens.
        kv : DistArray, ``[b, s, 2, g, d]``
            Their keys and values.
        ctx : Context
            Positions of the new tokens.

        Returns
        -------
        DistArray
            The attention, of the shape of q.
        """


@dataclass(frozen=True)
class AuxiliaryLosses:
    """The losses that layers add to the model's, such as the balance of a mixture of experts.

    Parameters
    ----------
    share : float
        Factor of these losses: the microbatch's share of the step's samples.
    values : dict of str to float, optional
        The dict to which layers add their losses, times `share`, by name; None: they are not reported.
    """

    share: float = 1.0
    values: dict[str, float] | None = None


@dataclass(frozen=True)
class Decoding:
    """The options of a forward pass that generates text.

    Parameters
    ----------
    kv_cache : KeyValueCache, optional
        Keys and values of the earlier tokens, to which attention appends; None: there are no earlier tokens.
    logits_at : array of int, ``[b]``, optional
        A NumPy array, the same on every rank: the index in s of the one token of each sample whose logits the head
        returns; None: it returns the logits of all tokens.
    """

    kv_cache: KeyValueCache | None = None
    logits_at: np.ndarray | None = None


@dataclass(frozen=True)
class Context:
    """The step of a forward pass, and the positions, order and padding of the tokens that go through a layer.

    Parameters
    ----------
    step : int
        The number of the training step, from 0.
    sample : int
        The global index, in the step, of the microbatch's first sample: with it dropout masks do not depend on how a
        step is split into microbatches.
    train : bool
        Whether the model trains; otherwise dropout does nothing.
    mask : DistArray of bool, ``[b, s]``, optional
        True where a token is not padding; the layout of `Parallelism.tokens` moves the fewest words. None: there is no
        padding.
    positions : DistArray or array of int, ``[s]`` or ``[b, s]``, optional
        Position of each token, as a DistArray or whole on every rank; None: the index in the sequence. Causal attention
        compares positions.
    order : array of int, ``[s]``, optional
        A NumPy array, the same on every rank: element i is the index in the sequence of the token at index i of the
        arrays, as `Parallelism.order` returns it; None: arrays hold a sequence in its own order.
    documents : array of int, ``[b, s]``, optional
        A NumPy array, the same on every rank: element i is the index in the sequence of the first token of the document
        to which the token at index i of the sequence belongs, whatever `order` is. Causal attention then sees only keys
        of the query's own document, and `positions`, if they are not given, count from its start. None: a sequence is
        one document.
    segments : DistArray of int, ``[b, s]``, optional
        The segment of each token, such as the first or the second of two sentences; None: 0 for all.
    scale : float
        Factor of all cotangents, the loss's included: the loss scale of 16-bit floats.
    auxiliary : AuxiliaryLosses
        The factor of the losses that layers add, and the dict to which they report them.
    decoding : Decoding, optional
        Options of generation for attention and the head; None: nothing is generated.

    Examples
    --------
    >>> Context(step=3, train=False).positions is None
    True
    """

    step: int = 0
    sample: int = 0
    train: bool = True
    mask: DistArray | None = None
    positions: DistArray | np.ndarray | None = None
    order: np.ndarray | None = None
    documents: np.ndarray | None = None
    segments: DistArray | None = None
    scale: float = 1.0
    auxiliary: AuxiliaryLosses = field(default_factory=AuxiliaryLosses)
    decoding: Decoding | None = None

    def positions_of(self, x: DistArray, whole: bool = False) -> Block | None:
        """Return the positions of the tokens of this rank's block.

        Parameters
        ----------
        x : DistArray, ``[b, s, ...]``
            The array of a layer.
        whole : bool
            Return the positions of the whole sequence, for the samples of this rank's block.

        Returns
        -------
        Block or None
            Integers ``[s]`` or ``[b, s]``: the positions; where none are given, those within the documents, or the
            order; None: they are the indices.

        Raises
        ------
        ShapeError
            If the positions are neither ``[s]`` nor ``[b, s]``.
        DTypeError
            If they are not integers.

        Notes
        -----
        **Communication:** none for a whole array; a DistArray is redistributed to the layout of b and s in x.
        """
        given: Any = self.order if self.positions is None else self.positions
        b, s = x.shape[:2]
        if self.documents is not None and self.positions is None:
            index = np.arange(s) if self.order is None else np.asarray(self.order)
            given = index - self._checked_documents(x)[:, index]
        if given is None:
            return None
        if not isinstance(given, DistArray):
            given = from_global(given, x.grid, Layout(*[None] * np.ndim(given)))
        if given.shape not in ((s,), (b, s)):
            raise ShapeError(
                f"positions must be of shape [s] = {[s]} or [b, s] = {[b, s]}; they are {list(given.shape)}"
            )
        if backend.numpy_dtype(given.dtype).kind not in "iu":
            raise DTypeError(f"positions must be integers; they are {given.dtype}")
        cut = x.layout.dims[0], () if whole else x.layout.dims[1]
        # P[B, S] -> P[B_x, S_x], or P[B_x, S] where the whole sequence is asked for
        return given.redistribute(Layout(*cut[2 - given.ndim :])).local

    def documents_of(self, x: DistArray) -> np.ndarray | None:
        """Return the documents of the samples of this rank's block.

        Parameters
        ----------
        x : DistArray, ``[b, s, ...]``
            The array of a layer.

        Returns
        -------
        array of int or None
            Integers ``[b, s]``, for the whole sequence: for each token the index of its document's first token; None:
            each sequence is one document.

        Raises
        ------
        ShapeError
            If the documents are not ``[b, s]``, or are not such indices.
        DTypeError
            If they are not integers.
        """
        if self.documents is None:
            return None
        return self._checked_documents(x)[slice(*x.layout.box(x.shape, x.grid.axes, x.grid.coords)[0])]

    def _checked_documents(self, x: DistArray) -> np.ndarray:
        given, (b, s) = np.asarray(self.documents), x.shape[:2]
        if given.dtype.kind not in "iu":
            raise DTypeError(f"documents must be integers; they are {given.dtype}")
        if given.shape != (b, s):
            raise ShapeError(f"documents must be of shape [b, s] = {[b, s]}; they are {list(given.shape)}")
        index, given = np.arange(s), given.astype(np.int64)
        begins = np.take_along_axis(given, np.clip(given, 0, max(0, s - 1)), axis=1) if s else given
        if not ((given >= 0) & (given <= index) & (begins == given) & (np.diff(given, axis=1, prepend=0) >= 0)).all():
            raise ShapeError(
                "documents must be the index of the first token of each token's document: they start at 0, never fall, "
                "and are their own index where a document starts, as in [0, 0, 0, 3, 3, 5]"
            )
        return given

    def mask_of(self, x: DistArray, whole: bool = False) -> Block | None:
        """Return the padding mask of the tokens of this rank's block.

        Parameters
        ----------
        x : DistArray, ``[b, s, ...]``
            The array of a layer.
        whole : bool
            Return the mask of the whole sequence, for the samples of this rank's block.

        Returns
        -------
        Block or None
            Bool ``[b, s]``, true where a token counts; None: all tokens count.

        Raises
        ------
        ShapeError
            If the mask is not ``[b, s]``.
        DTypeError
            If it is not bool.

        Notes
        -----
        **Communication:** none for a mask in the layout of `Parallelism.tokens`; with `whole` it is gathered over the
        axes that cut s, one byte an element.
        """
        given = self.mask
        if given is None:
            return None
        if given.shape != x.shape[:2]:
            raise ShapeError(
                f"the mask must be of shape [b, s] = {list(x.shape[:2])}, as its input; it is {list(given.shape)}"
            )
        if backend.numpy_dtype(given.dtype).kind != "b":
            raise DTypeError(f"the mask must be bool, true where a token counts; it is {given.dtype}")
        # M[B, S] -> M[B_x, S_x], or M[B_x, S] where the whole sequence is asked for
        return given.redistribute(Layout(x.layout.dims[0], None if whole else x.layout.dims[1])).local
