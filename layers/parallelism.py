"""Parallel modes as layouts: the registry of tensor and sequence modes, and the layouts that layers ask of a mode.

This is the only module that knows a mode by its name. `MODES` and `SEQUENCE_MODES` are the registries from which the
choices of a configuration, the help of the command line, the candidates of a plan and the tables of the documentation
derive; `register_mode` and `register_sequence_mode` add to them. Layers call the methods of `Parallelism`, which calls
the maps of `colossal_mpi.linalg.contraction`.

A layer asks three questions: how is the residual stream ``[b, s, h]`` cut, how is the inside of a block ``[b, s, f]``
cut, and which map of grid axes does a product of the two run on. Two templates answer them.

Template A runs both products of a block on one map of the axes row x col x depth. ``3d`` is template A on all three
axes; ``1d`` is its case row = depth = 1, which is Megatron's tensor parallelism with sequence regions. Template B has
the classic modes: ``2d`` (SUMMA, as in Optimus) and ``2.5d`` (Tesseract).

The mode ``2.5d`` is Tesseract's: there are ``depth`` copies of the weights of ``2d``, and each copy multiplies its part
of the batch. The algorithm ``2.5d`` of `colossal_mpi.linalg.matmul` is Solomonik's and Demmel's: there ``depth`` cuts
the summed dim k of one product, and the partial sums are added. They share a name and a shape of the grid only.

In every mode ``data`` cuts b, and ``seq`` and ``ulysses`` cut s. In attention the axes of a ring still cut s, and the
other axes that cut s outside attention cut the heads instead.

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
from colossal_mpi.layers.order import balanced, zigzag
from colossal_mpi.layout import Axes, Layout, bounds, part
from colossal_mpi.linalg.contraction import Subscripts, layout_map, map_layout, parse

INNER = "inner"
"""Stands, in a template, for the letter that the inside of a block is cut on: f, the heads a, or the vocabulary v."""


@dataclass(frozen=True)
class Template:
    """The axes that cut each letter of the residual stream and of the inside of a block, and the map of each product.

    Parameters
    ----------
    stream : mapping of str to tuple of str
        Axes that cut each letter of the residual stream ``[b, s, h]``, the outermost first. An absent letter is whole.
    inside : mapping of str to tuple of str
        Axes that cut each letter of the inside of a block; `INNER` stands for the letter that the layer names.
    up : mapping of str to str
        Map of the products from h to the inner letter: the letter that each axis of the grid cuts.
    down : mapping of str to str
        Map of the products from the inner letter to h.
    stored : tuple of str
        Axes over which a weight is stored, so that each element is stored once among them.
    """

    stream: Mapping[str, Axes]
    inside: Mapping[str, Axes]
    up: Mapping[str, str]
    down: Mapping[str, str]
    stored: Axes


_DATA = ("data",)
_SEQUENCE = ("seq", "ulysses")
_COPIES = (*_DATA, *_SEQUENCE)
"""Axes of every mode: they cut the tokens, and each rank along them has a copy of the weights."""

_CUT_S = dict.fromkeys(_SEQUENCE, "s")
_ONE_MAP = {"data": "b", "row": "b", **_CUT_S, "col": INNER, "depth": "h"}
_BATCH = {"data": "b", "depth": "b", "row": "b", **_CUT_S}

TEMPLATE_A = Template(
    stream={"b": ("data", "row"), "s": (*_SEQUENCE, "col"), "h": ("depth",)},
    inside={"b": ("data", "row", "depth"), "s": _SEQUENCE, INNER: ("col",)},
    up=_ONE_MAP,
    down=_ONE_MAP,
    stored=("row", "col", "depth"),
)
"""Template A: both products of a block run on one map, and ``[h_depth, inner_col]`` weights meet tokens cut on row."""

TEMPLATE_B = Template(
    stream={"b": ("data", "depth", "row"), "s": _SEQUENCE, "h": ("col",)},
    inside={"b": ("data", "depth", "row"), "s": _SEQUENCE, INNER: ("col",)},
    up={**_BATCH, "col": INNER},
    down={**_BATCH, "col": "h"},
    stored=("row", "col"),
)
"""Template B, SUMMA: the result of each product is stationary, and stream and inside are both cut over ``col``."""


def _of_experts(template: Template) -> Template:
    """Return a template with the letters of a mixture of experts: e experts, p blocks of tokens, c slots of a block.

    Every axis that cuts tokens in the stream cuts the blocks of tokens p: first the axes of the map, ``data`` last. The
    slots of a rank's tokens then leave that rank along ``data`` and along the axes that its map gathers, and along no
    other. For the experts, ``data`` cuts e in place of p. An axis that cuts more tokens inside than in the map cuts the
    slots.
    """
    axes = {axis: {"b": "p", "s": "p"}.get(letter, letter) for axis, letter in template.up.items()}
    mapped = tuple(axis for axis, letter in axes.items() if letter == "p" and axis not in _DATA)
    rest = {
        name: tuple(axis for x in "bs" for axis in place.get(x, ()) if axis not in (*mapped, *_DATA))
        for name, place in (("stream", template.stream), ("inside", template.inside))
    }
    over = dict.fromkeys(_DATA, "e")
    return Template(
        stream={"p": (*mapped, *rest["stream"], *_DATA), "h": template.stream.get("h", ())},
        inside={"e": _DATA, "p": mapped, "c": rest["inside"], INNER: template.inside.get(INNER, ())},
        up={**axes, **over},
        down={axis: "p" if letter in ("b", "s") else letter for axis, letter in template.down.items()} | over,
        stored=template.stored,
    )


@dataclass(frozen=True)
class Mode:
    """A tensor-parallel mode: a template and the axes of the grid that it uses.

    Parameters
    ----------
    name : str
        The word for it in configurations and on the command line.
    template : Template
        Layouts and maps.
    axes : tuple of str
        The axes of the grid that it uses besides ``data``, ``seq`` and ``ulysses``, in the order of the grid.
    description : str
        One sentence for help texts and tables.
    paper : str
        Authors, title and year of the paper that describes it; empty if there is none.
    """

    name: str
    template: Template
    axes: Axes
    description: str
    paper: str = ""


@dataclass(frozen=True)
class SequenceMode:
    """A way to cut the sequence in attention: a ring of keys and values, or heads that are cut in its place.

    Parameters
    ----------
    name : str
        The word for it in configurations and on the command line.
    ring : tuple of str
        Axes that cut s inside attention, too: keys and values travel round them.
    heads : tuple of str
        Axes that cut s outside attention and the heads inside it.
    description : str
        One sentence for help texts and tables.
    paper : str
        Authors, title and year of the paper that describes it; empty if there is none.
    """

    name: str
    ring: Axes
    heads: Axes
    description: str
    paper: str = ""


MODES: dict[str, Mode] = {}
"""The tensor-parallel modes by name, in the order in which they were registered."""

SEQUENCE_MODES: dict[str, SequenceMode] = {}
"""The ways to cut the sequence in attention by name, in the order in which they were registered."""


def register_mode(mode: Mode) -> Mode:
    """Register a tensor-parallel mode, so that configurations, the command line, plans and tables know it.

    Parameters
    ----------
    mode : Mode
        Its name must be new, unless it is the same mode again. Its axes must be none of ``data``, ``seq``, ``ulysses``
        and ``pipe``.

    Returns
    -------
    Mode
        The mode itself.

    Raises
    ------
    OptionError
        If the name is taken, an axis belongs to every mode, or the template is none: it names an unknown letter, gives
        an axis twice or as a bare string, or does not use an axis of the mode.

    Examples
    --------
    >>> register_mode(Mode("columns", template, ("col",), "Cut weights by columns."))
    """
    _require_new(mode, MODES, "tensor mode")
    reserved = [axis for axis in mode.axes if axis in (*_COPIES, "pipe")]
    if reserved:
        raise OptionError(f"tensor mode {mode.name!r}: every mode has the axes {', '.join(reserved)}: leave them out")
    problem = _fault(mode.template, mode.axes)
    if problem:
        raise OptionError(f"tensor mode {mode.name!r}: {problem}")
    MODES[mode.name] = mode
    return mode


_LETTERS = {"stream": ("b", "s", "h"), "inside": ("b", "s", INNER), "up": ("b", "s", "h", INNER)}
_LETTERS["down"] = _LETTERS["up"]
"""The letters that each part of a template may name."""


def _fault(template: Template, axes: Axes) -> str:
    """Return what is wrong with the template of a mode and what would be right; ``""`` if nothing is."""
    given = {"axes": axes, "template.stored": template.stored}
    places = {"stream": template.stream, "inside": template.inside}
    given |= {f"template.{side}[{letter!r}]": cut for side, place in places.items() for letter, cut in place.items()}
    for name, cut in given.items():
        if isinstance(cut, str) or not all(isinstance(axis, str) for axis in cut):
            return f"{name}={cut!r} must be a tuple of names of axes, such as ('col',)"
    for side, known in _LETTERS.items():
        named: Mapping[str, object] = getattr(template, side)
        letters = named.keys() if side in places else named.values()
        odd = [letter for letter in letters if letter not in known]
        if odd:
            return f"template.{side} has the letter {odd[0]!r}: use {', '.join(map(repr, known))}"
        cuts = [axis for cut in places.get(side, {}).values() for axis in cut]
        twice = [axis for axis in cuts if cuts.count(axis) > 1]
        if twice:
            return f"template.{side} cuts by {twice[0]} twice: an axis cuts one letter"
    used = {*template.up, *template.down, *(axis for name, cut in given.items() if name != "axes" for axis in cut)}
    idle = [axis for axis in axes if axis not in used]
    return f"its template says nothing of the axis {idle[0]}: say what it cuts, or leave it out" if idle else ""


def register_sequence_mode(mode: SequenceMode) -> SequenceMode:
    """Register a way to cut the sequence in attention, so that configurations, the command line and tables know it.

    Parameters
    ----------
    mode : SequenceMode
        Its name must be new, unless it is the same mode again. Its axes must be ``seq`` and ``ulysses``, each in one of
        the two places.

    Returns
    -------
    SequenceMode
        The mode itself.

    Raises
    ------
    OptionError
        If the name is taken, or the axes are not each of ``seq`` and ``ulysses`` once.
    """
    _require_new(mode, SEQUENCE_MODES, "sequence mode")
    if sorted((*mode.ring, *mode.heads)) != sorted(_SEQUENCE):
        raise OptionError(
            f"sequence mode {mode.name!r}: ring={mode.ring} and heads={mode.heads} must have each of the axes "
            f"{', '.join(_SEQUENCE)} once"
        )
    SEQUENCE_MODES[mode.name] = mode
    return mode


def _require_new(mode: Mode | SequenceMode, registry: Mapping[str, Mode | SequenceMode], kind: str) -> None:
    """Refuse another mode of a name that is taken; the same mode may be registered again."""
    if registry.get(mode.name, mode) != mode:
        raise OptionError(f"{kind} {mode.name!r} is registered already: choose another name than {', '.join(registry)}")


for _mode in (
    Mode("none", TEMPLATE_A, (), "Keep every weight whole; only data and sequence are cut."),
    Mode(
        "1d",
        TEMPLATE_A,
        ("col",),
        "Cut weights by columns, then by rows, over col, and the sequence between them (Megatron-LM).",
        "Korthikanti et al.: Reducing activation recomputation in large transformer models, 2022",
    ),
    Mode(
        "2d",
        TEMPLATE_B,
        ("row", "col"),
        "Cut weights and activations over row x col and multiply them by SUMMA (Optimus).",
        "Xu, You: An efficient 2D method for training super-large deep learning models, 2021",
    ),
    Mode(
        "2.5d",
        TEMPLATE_B,
        ("depth", "row", "col"),
        "Keep depth copies of the 2d mode, each with its part of the batch (Tesseract, not Solomonik & Demmel).",
        "Wang et al.: Tesseract: parallelize the tensor parallelism efficiently, 2021",
    ),
    Mode(
        "3d",
        TEMPLATE_A,
        ("row", "col", "depth"),
        "Cut batch, inner dim and hidden dim of every product over row, col and depth.",
        "Bian et al.: Maximizing parallelism in distributed training for huge neural networks, 2021",
    ),
):
    register_mode(_mode)

for _sequence in (
    SequenceMode(
        "ring",
        ("seq",),
        ("ulysses",),
        "Send keys and values round the ranks of seq; any number of heads will do.",
        "Liu, Zaharia, Abbeel: Ring attention with blockwise transformers for near-infinite context, 2023",
    ),
    SequenceMode(
        "ulysses",
        (),
        _SEQUENCE,
        "Cut the heads over seq inside attention, for fewer words.",
        "Jacobs et al.: DeepSpeed Ulysses, 2023",
    ),
):
    register_sequence_mode(_sequence)


@dataclass(frozen=True)
class Product:
    """One product of a layer: its map, and the layouts of its operands and its result.

    Parameters
    ----------
    subscripts : str
        The product as an einsum of two operands.
    axes : mapping of str to str
        The map: the letter that each axis of the grid cuts.
    x : Layout
        The input as the map takes it, gathered.
    w : Layout
        The weight as the map takes it, gathered.
    y : Layout
        The result as the layer hands it on.
    dy : Layout
        The cotangent of the result as both adjoint products take it, gathered.
    """

    subscripts: str
    axes: Mapping[str, str]
    x: Layout
    w: Layout
    y: Layout
    dy: Layout


class Parallelism:
    """Layouts and maps of a parallel mode on a grid.

    Parameters
    ----------
    grid : Grid
        Its axes are among ``data``, ``seq``, ``ulysses`` and the axes of the mode; an absent axis has size 1.
    tensor : str, optional
        A tensor mode of `MODES`: ``"1d"``, ``"2d"``, ``"2.5d"``, ``"3d"`` or a registered one; None is ``"none"``.
    keep_gathered : bool
        Whether a product keeps its gathered operands for the backward pass, which moves fewer words, or its stored
        ones, which takes less memory: they are gathered again, for ``mk(P_n - 1) + kn(P_m - 1)`` words more of each
        product of m x k and k x n.
    zero : {0, 1, 2, 3}
        Stage of ZeRO, which cuts arrays over ``data``, ``seq`` and ``ulysses``, too, so that each rank there stores its
        share: with 1 the state of the optimizer; with 2 also the gradients, which are reduced after each microbatch;
        with 3 also the weights, which are gathered for each use.
    sequence : str
        A mode of `SEQUENCE_MODES`. In ``"ring"`` keys and values travel round the ranks of ``seq``: memory falls with
        the ranks, and any number of heads will do. In ``"ulysses"`` the axis ``seq`` cuts the heads inside attention,
        for fewer words. The axis ``ulysses`` always cuts heads there, so that a grid with both axes does both.

    Raises
    ------
    GridError
        If there is no such tensor mode, or the grid has an axis larger than 1 that the mode does not use.
    OptionError
        If there is no such stage of ZeRO or no such sequence mode.

    References
    ----------
    Rajbhandari et al.: ZeRO: memory optimizations toward training trillion parameter models, 2020.

    Examples
    --------
    >>> Parallelism(Grid.meta(row=2, col=2), "2d").stream()
    Layout('row', None, 'col')
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
        if sequence not in SEQUENCE_MODES:
            raise OptionError(f"sequence={sequence!r}: use one of {', '.join(map(repr, SEQUENCE_MODES))}")
        self.grid, self.tensor, self.keep_gathered, self.zero = grid, mode, keep_gathered, zero
        self._template = MODES[mode].template
        require_axes(grid.axes, mode)
        self.ring = self._present(SEQUENCE_MODES[sequence].ring)
        self._heads = self._present(SEQUENCE_MODES[sequence].heads)

    @property
    def copies(self) -> Axes:
        """Axes that cut tokens and along which weights are replicated, unless ZeRO cuts them."""
        return self._present(_COPIES)

    @property
    def deferred(self) -> Axes:
        """Axes over which gradients stay partial until the last microbatch."""
        return self.copies if self.zero < 2 else ()

    @property
    def keep_weights(self) -> bool:
        """True if a product keeps its gathered weight for the backward pass."""
        return self.keep_gathered and self.zero < 3

    def _present(self, axes: Sequence[str]) -> Axes:
        return tuple(axis for axis in axes if self.grid.axes.get(axis, 1) > 1)

    def _cut(self, letters: str, axes: Mapping[str, Axes], inner: str = "") -> Layout:
        return Layout(*[self._present(axes.get(INNER if x == inner else x, ())) for x in letters])

    def stream(self, letters: str = "bsh") -> Layout:
        """Return the layout of an array of the residual stream.

        Parameters
        ----------
        letters : str
            One letter for each dim: b samples, s positions, h the width of the stream; any other letter is whole.

        Returns
        -------
        Layout
            The layout in which layers hand on an array of the stream.
        """
        return self._cut(letters, self._template.stream)

    def inside(self, letters: str, inner: str) -> Layout:
        """Return the layout of an array inside a block.

        Parameters
        ----------
        letters : str
            One letter for each dim.
        inner : str
            The letter that the inside of the block is cut on.

        Returns
        -------
        Layout
            The layout in which a product from the stream hands on its result.
        """
        return self._cut(letters, self._template.inside, inner)

    def attention(self, letters: str, inner: str, spread: str) -> Layout:
        """Return the layout of queries, keys or values inside attention, where only the axes of the ring cut s.

        Parameters
        ----------
        letters : str
            One letter for each dim.
        inner : str
            The letter that the inside of the block is cut on.
        spread : str
            The letter that is cut, innermost, by the axes that cut s outside attention and belong to no ring; `spread`
            chooses it.

        Returns
        -------
        Layout
            The layout in which attention takes the array.
        """
        axes = {**self._template.inside, "s": self.ring}
        cut = [axes.get(INNER if x == inner else x, ()) + (self._heads if x == spread else ()) for x in letters]
        return Layout(*[self._present(axes) for axes in cut])

    def order(self, length: int, documents: np.ndarray | None = None) -> np.ndarray | None:
        """Return the order of a sequence that gives all ranks of a ring the same amount of causal attention.

        Tokens, labels, masks, segments and positions, where they are given, are all permuted by it, and
        `Context.order` tells the layers so.

        Parameters
        ----------
        length : int
            Tokens of the whole sequence.
        documents : array of int, ``[b, length]``, optional
            As `Context.documents`: the order is then made for these samples. None: each sequence is one document.

        Returns
        -------
        array of int64, ``[length]``, or None
            A NumPy array, the same on every rank: element i is the index, in its sequence, of the token that stands at
            index i of the arrays: the zig-zag order, in which the work of two ranks differs by about ``ranks / length``
            of it, or with documents one in which no rank has much more than the mean (`layers.order.balanced`). None
            without a ring: the order stays as it is.
        """
        if not self.ring:
            return None
        ranks = self.grid.extent(self.ring)
        if documents is None:
            return zigzag(length, ranks)
        keys, groups = np.arange(1, length + 1) - documents, self.grid.extent(self.tokens().dims[0])
        work = [keys[slice(*part(len(keys), groups, i))].sum(0) for i in range(groups)]
        return balanced(np.stack(work), ranks)

    def tokens(self) -> Layout:
        """Return the layout of token ids and labels ``[b, s]``.

        Returns
        -------
        Layout
            ``[b_data, s_(seq,ulysses)]``: all ranks that share data and sequence coordinates hold the same tokens.
        """
        return Layout(self._present(_DATA), self._present(_SEQUENCE))

    def experts(self) -> Parallelism:
        """Return the same mode inside a mixture of experts, where the letters ``epch`` take the place of the stream's.

        Returns
        -------
        Parallelism
            In it e counts experts, which ``data`` cuts inside, p the blocks of tokens that ranks hold, and c the slots
            of a block.
        """
        view = copy.copy(self)
        view._template = _of_experts(self._template)
        return view

    def product(self, subscripts: str, inner: str | None, *, replicate: str = "") -> Product:
        """Return map and layouts of a product between the stream (letter h) and the inside of a block (letter `inner`).

        Parameters
        ----------
        subscripts : str
            ``"bsh,hf->bsf"`` goes in, ``"bsf,fh->bsh"`` comes back.
        inner : str, optional
            The letter that the inside of the block is cut on. None: the result, which has no h, is cut as the stream.
        replicate : str
            Letters that the product lacks on purpose: all ranks of the axes that cut them do the same product. For
            example ``"s"`` for ``"bh,hv->bv"``, the classes of whole samples.

        Returns
        -------
        Product
            The map of the product and the layouts of its arrays.

        Raises
        ------
        GridError
            If an axis of the grid cuts a letter that the product lacks and `replicate` does not name.
        OptionError
            If `replicate` names a letter of the product.
        """
        sub = parse(subscripts)
        present = {*sub.a, *sub.b}
        if present & set(replicate):
            raise OptionError(
                f"product {subscripts!r} with replicate={replicate!r}: it has the letters "
                f"{', '.join(sorted(present & set(replicate)))}; replicate names letters that a product lacks"
            )
        if inner is None:
            axes = self._map(sub, layout_map("bsh", self.stream("bsh")), replicate)
            x, w, y = map_layout(sub.a, axes), map_layout(sub.b, axes), map_layout(sub.c, axes)
            return Product(subscripts, axes, x, w, y, y)
        back = "h" in sub.c
        template = self._template.down if back else self._template.up
        named = {axis: inner if letter == INNER else letter for axis, letter in template.items()}
        axes = self._map(sub, {axis: named[axis] for axis in self._present(list(named))}, replicate)
        return Product(
            subscripts,
            axes,
            map_layout(sub.a, axes),
            map_layout(sub.b, axes),
            self.stream(sub.c) if back else self.inside(sub.c, inner),
            map_layout(sub.c, axes),
        )

    def _map(self, sub: Subscripts, axes: Mapping[str, str], replicate: str) -> dict[str, str]:
        """Return the part of a map whose letters the product has; refuse the rest unless it is in `replicate`."""
        for axis, letter in axes.items():
            if letter not in {*sub.a, *sub.b, *replicate}:
                raise GridError(
                    f"product {str(sub)!r} lacks the letter {letter!r}, which axis {axis}={self.grid.axes[axis]} cuts "
                    f"with tensor={self.tensor!r}: give the product this letter, use a grid without this axis, or pass "
                    f"replicate={replicate + letter!r} to do the same product on all ranks along {axis}"
                )
        return {axis: letter for axis, letter in axes.items() if letter in {*sub.a, *sub.b}}

    def inner(self, sizes: Mapping[str, int]) -> str:
        """Return which of several letters the inside of a block is cut on.

        Parameters
        ----------
        sizes : mapping of str to int
            The global size of each letter, first the letter that is best cut.

        Returns
        -------
        str
            The first letter with an index for each rank that cuts it, else the longest.
        """
        ranks = self.grid.extent(self._present(self._template.inside.get(INNER, ())))
        return _widest(sizes, dict.fromkeys(sizes, ranks))

    def spread(self, sizes: Mapping[str, int], inner: str) -> str:
        """Return which of several letters is cut in attention by the axes that cut s outside it and form no ring.

        Parameters
        ----------
        sizes : mapping of str to int
            The global size of each letter, first the letter that is best cut.
        inner : str
            The letter that the inside of the block is cut on: its size counts after that cut.

        Returns
        -------
        str
            The first letter with an index for each rank that cuts it, else the one with most indices for each.
        """
        heads = self.grid.extent(self._heads)
        ranks = self.grid.extent(self._present(self._template.inside.get(INNER, ())))
        return _widest(sizes, {letter: heads * ranks if letter == inner else heads for letter in sizes})

    def store(self, used: Layout, shape: Sequence[int]) -> Layout:
        """Return the layout in which a weight is stored, given the layout in which its layer uses it.

        A vector is stored as it is used: reducing its gradient on every rank that uses it moves as many words as
        scattering the gradient and gathering the vector, in half as many messages. In a matrix each axis that would
        replicate it cuts the first dim whose blocks it divides evenly, else the dim with the largest blocks, so that no
        rank stores more than its share. With ``zero=3`` the axes ``data``, ``seq`` and ``ulysses`` cut each weight and
        vector, too.

        Parameters
        ----------
        used : Layout
            The layout in which the layer uses the weight.
        shape : sequence of int
            The global shape of the weight.

        Returns
        -------
        Layout
            `used`, cut further, innermost.
        """
        stored = used if len(shape) == 1 else self._further(used, shape, self._template.stored)
        return self._further(stored, shape, _COPIES) if self.zero == 3 else stored

    def own(self, stored: Layout, shape: Sequence[int]) -> Layout:
        """Return the layout of a weight's reduced gradient and of the optimizer's state for it.

        Parameters
        ----------
        stored : Layout
            The layout in which the weight is stored.
        shape : sequence of int
            The global shape of the weight.

        Returns
        -------
        Layout
            `stored`; with ZeRO also cut over ``data``, ``seq`` and ``ulysses``.
        """
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
    """Refuse a grid that has an axis larger than 1 that a mode does not use.

    Parameters
    ----------
    sizes : mapping of str to int
        The number of ranks along each axis of the grid, ``pipe`` left out.
    mode : str
        A tensor mode of `MODES`.

    Raises
    ------
    GridError
        If there is such an axis; the message names the modes that use all axes of the grid.
    """
    axes = (*_COPIES, *MODES[mode].axes)
    large = [axis for axis, size in sizes.items() if size > 1]
    alien = [axis for axis in large if axis not in axes]
    if not alien:
        return
    fitting = [mode.name for mode in MODES.values() if all(axis in (*_COPIES, *mode.axes) for axis in large)]
    product = math.prod(sizes[axis] for axis in alien)
    grid = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    raise GridError(
        f"tensor={mode!r} uses the axes {', '.join(axes)} and not {', '.join(alien)} of Grid({grid}): "
        + (f"use tensor={' or '.join(map(repr, fitting))}, " if fitting else "")
        + f"or give those {product} ranks to an axis that it uses"
    )
