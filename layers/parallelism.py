"""Parallel modes as layouts: the only file that knows a mode by name.

A layer asks three questions: how is the residual stream ``[b, s, h]`` cut, how is the inside of a block ``[b, s, f]``
cut, and which map of grid axes does a product of the two run on. Two templates answer them.

Template A runs both products of a block on one map. ``3d`` on any row x col x depth is template A, and ``1d`` is its
case row = depth = 1: Megatron's tensor parallelism with sequence regions. Template B are the classics: ``2d``
(SUMMA, Optimus) and ``2.5d`` (Tesseract).

In every mode ``data`` cuts b, and ``seq`` and ``ulysses`` cut s: everywhere but in attention, where the axes of a ring
still cut s and the others cut the heads instead.

References
----------
Shoeybi et al.: Megatron-LM, 2019. Korthikanti et al.: Reducing activation recomputation, 2022. Xu & You: Optimus, 2021.
Wang et al.: Tesseract, 2021. Bian et al.: Maximizing parallelism in distributed training for huge networks, 2021.
Jacobs et al.: DeepSpeed Ulysses, 2023. Liu, Zaharia, Abbeel: Ring attention with blockwise transformers, 2023. Fang &
Zhao: USP: a unified sequence parallelism approach for long context generative AI, 2024 (both together).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from colossal_mpi.errors import GridError, OptionError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.order import zigzag
from colossal_mpi.layout import Axes, Layout, bounds
from colossal_mpi.linalg.contraction.subscripts import layout_map, map_layout, parse

INNER = "inner"
"""Stands in a template's map for the letter that the inside of a block is cut on: f, the heads a, the vocabulary v."""


@dataclass(frozen=True)
class Template:
    """Axes that cut each letter of the residual stream and of the inside of a block, and the map of each product."""

    stream: Mapping[str, Axes]
    inside: Mapping[str, Axes]
    up: Mapping[str, str]
    """Map of the products from h to an inner letter."""
    down: Mapping[str, str]
    """Map of the products from an inner letter to h."""
    stored: Axes
    """Axes over which a weight is stored, each element once among them."""


_DATA = ("data",)
_SEQUENCE = ("seq", "ulysses")
_COPIES = (*_DATA, *_SEQUENCE)
"""Axes of every mode: they cut the tokens, and each rank along them has a copy of the weights."""

_CUT_S = dict.fromkeys(_SEQUENCE, "s")
_ONE_MAP = {"data": "b", "row": "b", **_CUT_S, "col": INNER, "depth": "h"}
_BATCH = {"data": "b", "depth": "b", "row": "b", **_CUT_S}

A = Template(
    stream={"b": ("data", "row"), "s": (*_SEQUENCE, "col"), "h": ("depth",)},
    inside={"b": ("data", "row", "depth"), "s": _SEQUENCE, INNER: ("col",)},
    up=_ONE_MAP,
    down=_ONE_MAP,
    stored=("row", "col", "depth"),
)
B = Template(
    stream={"b": ("data", "depth", "row"), "s": _SEQUENCE, "h": ("col",)},
    inside={"b": ("data", "depth", "row"), "s": _SEQUENCE, INNER: ("col",)},
    up={**_BATCH, "col": INNER},
    down={**_BATCH, "col": "h"},
    stored=("row", "col"),
)


def _of_experts(template: Template) -> Template:
    """Return a template with the letters of a mixture of experts: e experts, p blocks of tokens, c slots of a block.

    Blocks of tokens are cut over all axes that cut tokens in the stream, first over those of the map and over ``data``
    last: then the slots of a rank's tokens leave it along ``data`` and the axes that its map gathers alone. To the
    experts, ``data`` cuts e in place of p. An axis that cuts more tokens inside than in the map cuts the slots.
    """
    axes = {axis: {"b": "p", "s": "p"}.get(letter, letter) for axis, letter in template.up.items()}
    mapped = tuple(axis for axis, letter in axes.items() if letter == "p" and axis not in _DATA)
    rest = {
        name: tuple(axis for x in "bs" for axis in place[x] if axis not in (*mapped, *_DATA))
        for name, place in (("stream", template.stream), ("inside", template.inside))
    }
    over = dict.fromkeys(_DATA, "e")
    return Template(
        stream={"p": (*mapped, *rest["stream"], *_DATA), "h": template.stream["h"]},
        inside={"e": _DATA, "p": mapped, "c": rest["inside"], INNER: template.inside[INNER]},
        up={**axes, **over},
        down={axis: "p" if letter in ("b", "s") else letter for axis, letter in template.down.items()} | over,
        stored=template.stored,
    )


MODES: dict[str, tuple[Template, Axes]] = {
    "none": (A, ()),
    "1d": (A, ("col",)),
    "2d": (B, ("row", "col")),
    "2.5d": (B, ("depth", "row", "col")),
    "3d": (A, ("row", "col", "depth")),
}
"""Tensor-parallel modes: their template and the axes that they use."""

SEQUENCES: dict[str, tuple[Axes, Axes]] = {"ring": (("seq",), ("ulysses",)), "ulysses": ((), _SEQUENCE)}
"""What attention makes of a cut of s, by name: the axes that cut s as a ring, and those that cut the heads instead."""


@dataclass(frozen=True)
class Product:
    """How one product of a layer runs: the map, and the layouts of its result and its weight."""

    subscripts: str
    axes: Mapping[str, str]
    x: Layout
    """The input as the map takes it (gathered)."""
    w: Layout
    """The weight as the map takes it (gathered)."""
    y: Layout
    """The result as the layer hands it on."""
    dy: Layout
    """The result's cotangent as both adjoints take it (gathered)."""


class Parallelism:
    """Layouts and maps of a parallel mode on a grid.

    Parameters
    ----------
    grid : Grid
        With axes among ``data``, ``seq``, ``ulysses`` and those of the mode; absent axes have size 1.
    tensor : {None, "1d", "2d", "2.5d", "3d"}
    keep_gathered : bool
        Whether a product keeps its gathered operands for the backward pass (fewer words), or its stored ones (less
        memory; they are gathered again: ``mk(P_n - 1) + kn(P_m - 1)`` words more per product).
    zero : {0, 1, 2, 3}
        What is stored cut over ``data``, ``seq`` and ``ulysses``, too, so that each rank there has its share: 1, the
        state of the optimizer; 2, also the gradients, reduced after each microbatch; 3, also the weights, which are
        gathered for each use.
    sequence : {"ring", "ulysses"}
        What attention makes of the cut of s over ``seq``. In a ring, keys and values travel round it, in memory that
        falls with the ranks; any number of heads will do. Otherwise ``seq`` cuts the heads inside attention, for fewer
        words. An axis ``ulysses`` always cuts heads there, so that a grid with both axes has both.

    Raises
    ------
    GridError
        If there is no such mode, or the grid has an axis larger than 1 that it does not use.
    OptionError
        If there is no such stage of ZeRO, or no such way to cut the sequence.

    References
    ----------
    Rajbhandari et al.: ZeRO: memory optimizations toward training trillion parameter models, 2020.
    """

    def __init__(
        self,
        grid: Grid,
        tensor: str | None = None,
        keep_gathered: bool = True,
        zero: int = 0,
        *,
        sequence: str = "ring",
    ) -> None:
        mode = tensor or "none"
        if mode not in MODES:
            raise GridError(f"tensor={tensor!r}: use one of {', '.join(map(repr, MODES))}")
        if zero not in range(4):
            raise OptionError(f"zero={zero!r}: use 0, 1, 2 or 3")
        if sequence not in SEQUENCES:
            raise OptionError(f"sequence={sequence!r}: use one of {', '.join(map(repr, SEQUENCES))}")
        self.grid, self.tensor, self.keep_gathered, self.zero = grid, mode, keep_gathered, zero
        self._template = MODES[mode][0]
        require_axes(grid.axes, mode)
        self.ring, self._heads = (self._present(axes) for axes in SEQUENCES[sequence])

    @property
    def copies(self) -> Axes:
        """Axes over which tokens are cut and weights replicated, unless ZeRO stores them cut."""
        return self._present(_COPIES)

    @property
    def deferred(self) -> Axes:
        """Axes over which gradients stay partial until the last microbatch."""
        return self.copies if self.zero < 2 else ()

    @property
    def keep_weights(self) -> bool:
        """Whether a product keeps its gathered weight for the backward pass."""
        return self.keep_gathered and self.zero < 3

    def _present(self, axes: Sequence[str]) -> Axes:
        return tuple(axis for axis in axes if self.grid.axes.get(axis, 1) > 1)

    def _cut(self, letters: str, axes: Mapping[str, Axes], inner: str = "") -> Layout:
        return Layout(*[self._present(axes.get(INNER if x == inner else x, ())) for x in letters])

    def stream(self, letters: str = "bsh") -> Layout:
        """Return the layout of an array of the residual stream, by its letters."""
        return self._cut(letters, self._template.stream)

    def inside(self, letters: str, inner: str) -> Layout:
        """Return the layout of an array inside a block that is cut on the letter `inner`."""
        return self._cut(letters, self._template.inside, inner)

    def attention(self, letters: str, inner: str, spread: str) -> Layout:
        """Return the layout of queries, keys or values inside attention: s is cut by the ring alone, if by any.

        Parameters
        ----------
        letters : str
        inner : str
            The letter that the inside of the block is cut on.
        spread : str
            The letter that is cut, innermost, by the axes that cut s outside attention and are no ring (`spread`).
        """
        axes = {**self._template.inside, "s": self.ring}
        cut = [axes.get(INNER if x == inner else x, ()) + (self._heads if x == spread else ()) for x in letters]
        return Layout(*[self._present(axes) for axes in cut])

    def order(self, length: int) -> np.ndarray | None:
        """Return the order of a sequence that gives all ranks of a ring as much causal attention; None: as it is.

        Element i is the index, in its sequence, of the token that is to stand at index i of the arrays. Tokens, labels,
        masks, segments and positions, where they are given, are all permuted alike, and `Context.order` says so.

        Returns
        -------
        array of int64, ``[length]``, or None
            In NumPy, the same on every rank: `zigzag`. The work of the ranks differs by about ``ranks / length`` of it.
        """
        return zigzag(length, self.grid.extent(self.ring)) if self.ring else None

    def tokens(self) -> Layout:
        """Return the layout of token ids and labels ``[b, s]``: the same on all ranks of a data x seq slice."""
        return Layout(self._present(_DATA), self._present(_SEQUENCE))

    def experts(self) -> Parallelism:
        """Return the same mode inside a mixture of experts, whose letters are ``epch`` in the stream's place.

        e counts experts, cut over ``data`` inside, p the blocks of tokens that ranks hold, c slots of a block.
        """
        view = copy.copy(self)
        view._template = _of_experts(self._template)
        return view

    def product(self, subscripts: str, inner: str | None) -> Product:
        """Return how a product between the stream (letter h) and the inside (letter `inner`) runs.

        Parameters
        ----------
        subscripts : str
            ``"bsh,hf->bsf"`` goes in, ``"bsf,fh->bsh"`` comes back.
        inner : str, optional
            The letter that the inside is cut on. None: there is none, and the result, without h, is cut as the stream.
            A product that has no such letter, ``""`` say, or no s, is done redundantly on the axes that would cut it.
        """
        sub = parse(subscripts)
        if inner is None:
            axes = layout_map("bsh", self.stream("bsh"))
            x, w, y = map_layout(sub.a, axes), map_layout(sub.b, axes), map_layout(sub.c, axes)
            return Product(subscripts, axes, x, w, y, y)
        back = "h" in sub.c
        template = self._template.down if back else self._template.up
        named = {axis: inner if letter == INNER else letter for axis, letter in template.items()}
        axes = {axis: named[axis] for axis in self._present(list(named)) if named[axis] in {*sub.a, *sub.b}}
        return Product(
            subscripts,
            axes,
            map_layout(sub.a, axes),
            map_layout(sub.b, axes),
            self.stream(sub.c) if back else self.inside(sub.c, inner),
            map_layout(sub.c, axes),
        )

    def inner(self, sizes: Mapping[str, int]) -> str:
        """Return on which of several letters the inside is cut: the first with an index for each rank, or the longest.

        Parameters
        ----------
        sizes : mapping of str to int
            Size of each letter, the one that had best be cut first.
        """
        ranks = self.grid.extent(self._present(self._template.inside[INNER]))
        return _widest(sizes, dict.fromkeys(sizes, ranks))

    def spread(self, sizes: Mapping[str, int], inner: str) -> str:
        """Return which of several letters the axes cut inside attention that cut s outside it and are no ring.

        Parameters
        ----------
        sizes : mapping of str to int
            As `inner` takes them.
        inner : str
            The letter that the inside is cut on: what that cut leaves of it counts.
        """
        heads, ranks = self.grid.extent(self._heads), self.grid.extent(self._present(self._template.inside[INNER]))
        return _widest(sizes, {letter: heads * ranks if letter == inner else heads for letter in sizes})

    def store(self, used: Layout, shape: Sequence[int]) -> Layout:
        """Return the layout in which a weight is stored that is `used` in another: cut further, innermost.

        A vector is stored as it is used: reducing its gradient on every rank that uses it moves as many words as
        scattering the gradient and gathering the vector, in half as many messages. In a matrix each axis that
        would replicate it goes to the first dim whose blocks it divides evenly, else to the dim with the
        largest blocks, so that no rank stores more than its share. With ``zero=3`` each weight and vector is cut
        over the axes of its copies, ``data``, ``seq`` and ``ulysses``, too.
        """
        stored = used if len(shape) == 1 else self._further(used, shape, self._template.stored)
        return self._further(stored, shape, _COPIES) if self.zero == 3 else stored

    def own(self, stored: Layout, shape: Sequence[int]) -> Layout:
        """Return the layout of the reduced gradient and the optimizer's state of a weight: with ZeRO cut further."""
        return self._further(stored, shape, _COPIES) if self.zero else stored

    def _further(self, layout: Layout, shape: Sequence[int], axes: Axes) -> Layout:
        dims, zero = [list(axes) for axes in layout.dims], dict.fromkeys(self.grid.axes, 0)
        for axis in self._present(axes):
            if axis in layout.cut:
                continue
            size = self.grid.axes[axis]
            local = [bounds(n, tuple(axes), self.grid.axes, zero)[1] for n, axes in zip(shape, dims, strict=True)]
            even = [d for d, n in enumerate(shape) if n and n % (self.grid.extent(dims[d]) * size) == 0]
            dims[even[0] if even else local.index(max(local))].append(axis)
        return Layout(*dims)

    def __repr__(self) -> str:
        return f"Parallelism({self.grid}, tensor={self.tensor!r})"


def _widest(sizes: Mapping[str, int], ranks: Mapping[str, int]) -> str:
    """Return the first letter with an index for each of its ranks, or the one with most indices for each."""
    enough = [letter for letter, size in sizes.items() if size >= ranks[letter]]
    return enough[0] if enough else max(sizes, key=lambda letter: sizes[letter] / ranks[letter])


def require_axes(sizes: Mapping[str, int], mode: str) -> None:
    """Refuse a grid, without ``pipe``, that has an axis larger than 1 of which a mode makes no use.

    Raises
    ------
    GridError
        With the modes that use all of them.
    """
    axes = (*_COPIES, *MODES[mode][1])
    large = [axis for axis, size in sizes.items() if size > 1]
    alien = [axis for axis in large if axis not in axes]
    if not alien:
        return
    fitting = [name for name, (_, used) in MODES.items() if all(axis in (*_COPIES, *used) for axis in large)]
    product = math.prod(sizes[axis] for axis in alien)
    grid = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    raise GridError(
        f"tensor={mode!r} uses the axes {', '.join(axes)} and not {', '.join(alien)} of Grid({grid}): "
        + (f"use tensor={' or '.join(map(repr, fitting))}, " if fitting else "")
        + f"or give those {product} ranks to an axis that it uses"
    )
