"""Convolutions of images, and the embedding of their patches: one product of windows and weight, in every mode.

Vision models build them. They call `contract`, like `Linear`, and the kernels ``unfold`` and ``fold`` of their grid,
which make the windows of an image and add the cotangents of windows up.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction import adjoints, contract, parse
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Pair = tuple[int, int]


def pair(value: int | Pair) -> Pair:
    """Return the sizes along y and x: a single number is both."""
    return (value, value) if isinstance(value, int) else value


class Convolution(Layer):
    """The product of the windows ``[b, c, i, j, s]`` of images ``[b, c, y, x]`` with a weight ``[c, i, j, o]``.

    It is the base of `Conv2d` and `PatchEmbedding`, which name the letters and shape the result. Images are
    redistributed before they are unfolded, and cotangents after they are folded: windows have i j times the words.
    Where the map cuts s, each rank multiplies its part of the windows.
    """

    lead = 0
    """The number of windows of zeros before those of the image."""

    def __init__(
        self,
        subscripts: str,
        inner: str,
        channels: Pair,
        kernel: int | Pair,
        parallelism: Parallelism,
        name: str,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        bias: bool = True,
        std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        self.kernel, self.stride, self.padding = pair(kernel), pair(stride), pair(padding)
        if min(*self.kernel, *self.stride) < 1 or min(self.padding) < 0:
            raise OptionError(
                f"{name}: kernel {self.kernel}, stride {self.stride}, padding {self.padding}: kernel and stride must "
                "be 1 or more and padding 0 or more"
            )
        self.name, self.product = name, parallelism.product(subscripts, inner)
        self.keep_gathered, self.keep_weight = parallelism.keep_gathered, parallelism.keep_weights
        self.images = Layout(*self.product.x.dims[:2], None, None)
        """The layout of an image whose windows are multiplied: y and x are whole."""
        shape = (channels[0], *self.kernel, channels[1])
        self.weight = Parameter(f"{name}.weight", shape, self.product.w, parallelism, std=std, seed=seed, dtype=dtype)
        self.bias, self.out_dim = None, parse(subscripts).c.index(subscripts.split(",")[1][3])
        self.bias_layout = Layout(self.product.w.dims[3])
        if bias:
            self.bias = Parameter(f"{name}.bias", channels[1:], self.bias_layout, parallelism, dtype=dtype)

    def _check(self, x: DistArray) -> Pair:
        """Return the numbers of windows along y and x."""
        channels = self.weight.value.shape[0]
        count = (
            kernels.windows((x.shape[2], x.shape[3]), self.kernel, self.stride, self.padding) if x.ndim == 4 else (0, 0)
        )
        if x.ndim != 4 or x.shape[1] != channels or min(count) < 1:
            raise ShapeError(
                f"{self.name} of images {x.shape}: they must be [b, c, y, x] with c={channels}, and with their padding "
                f"{self.padding} no smaller than the kernel {self.kernel}"
            )
        return count

    def _image(self, x: DistArray) -> DistArray:
        """Return the images in the layout in which their windows are multiplied."""
        # X[B_row, C_col, Y, X] -> X[B_row, C, Y, X]: allgather over the axes that the map needs whole
        return x.redistribute(self.images)

    def _windows(self, image: DistArray) -> DistArray:
        """Return the windows of an image that is cut over b and c alone. **Communication:** none."""
        unfold = kernels.of(image.grid).unfold
        # X[B_row, C, Y, X] -> windows[B_row, C, I, J, S]
        block = unfold(image.local, self.kernel, self.stride, self.padding)
        if self.lead:
            zeros = backend.zeros_like(block, (*block.shape[:4], self.lead))
            block = backend.namespace(block).concat([zeros, block], axis=4)
        layout = Layout(*self.images.dims[:2], None, None, None)
        return DistArray(block, (*image.shape[:2], *self.kernel, block.shape[-1]), layout, image.grid)

    def _apply(self, x: DistArray) -> tuple[DistArray, Cache]:
        """Return the product, without bias, as the map leaves it, and what `_adjoint` needs."""
        p, image = self.product, self._image(x)
        w = self.weight.use(p.w)
        # 1d inside: windows[B, C, I, J, S] . W[C, I, J, O_col] -> Y[B, O_col, S]
        y = contract(p.subscripts, self._windows(image), w, p.axes)
        saved = self.save(x, image if self.keep_gathered else x)
        return y, (saved, x.shape, w if self.keep_weight else None, x.layout.with_partial())

    def _adjoint(self, dy: DistArray, cache: Cache, later: Later) -> DistArray:
        """Return the cotangent of the images, given the cotangent of the product in the layout of the map."""
        p, (saved, shape, w, layout) = self.product, cache
        dx_subscripts, dw_subscripts = adjoints(p.subscripts)
        w = self.weight.use(p.w) if w is None else w
        # dY[B, O_col, S] . W[C, I, J, O_col]^T -> dwindows[B, C, I, J, S] {U_col}
        d = contract(dx_subscripts, dy, w, p.axes)
        # dwindows[B, C, I, J, S] {U_col} -> dX[B, C, Y, X] {U_col}: overlapping windows are added on each rank
        image = kernels.of(d.grid).fold(self._all_windows(d), shape[2:], self.stride, self.padding)
        partial = Layout(*d.layout.dims[:2], None, None, partial=(*d.layout.partial, *d.layout.dims[4]))

        def add_weight_gradient() -> None:
            windows = self._windows(self._image(self.load(saved)))
            # windows[B, C, I, J, S]^T . dY[B, O_col, S] -> dW[C, I, J, O_col]
            self.weight.accumulate(contract(dw_subscripts, windows, dy, p.axes, wide=True))

        add_weight_gradient() if later is None else later.append(add_weight_gradient)
        # dX[B, C, Y, X] {U_col} -> dX[B, C_col, Y, X]: reduce_scatter over col
        return DistArray(image, shape, partial, dy.grid).redistribute(layout)

    def _all_windows(self, d: DistArray) -> Block:
        """Return this rank's windows with zeros in place of the other ranks', without the leading ones."""
        block, (start, stop) = d.local, d.box[4]
        if d.layout.dims[4]:
            block = backend.zeros_like(block, (*block.shape[:4], d.shape[4]))
            block[..., start:stop] = d.local
        return block[..., self.lead :]

    def _accumulate_bias(self, dy: DistArray) -> None:
        if self.bias is not None:
            # dY[B_row, O_col, S] summed over b and s -> dbias[O_col] {U_row}
            self.bias.accumulate(dy.sum_over([d for d in range(dy.ndim) if d != self.out_dim]))


class Conv2d(Convolution):
    """Two-dimensional convolution of images ``[b, c, y, x]``: a cross-correlation, as is usual in deep learning.

    Parameters
    ----------
    inputs : int
        Number of channels of the input.
    outputs : int
        Number of channels of the output.
    kernel : int or pair of int
        Sides of a window along y and x, in pixels.
    parallelism : Parallelism
        The mode, which chooses the map and the layouts.
    name : str
        Prefix of the names of the parameters ``weight`` ``[inputs, i, j, outputs]`` and ``bias`` ``[outputs]``.
    into : {"inside", "stream"}
        ``"inside"`` maps the channels, as the h of the stream, to a letter of the inside of a block; ``"stream"`` maps
        them back.
    stride : int or pair of int
        Distance of two windows along y and x, in pixels.
    padding : int or pair of int
        Rows and columns of zeros on both sides, in pixels.
    bias : bool
        Whether there is a bias.
    std : float
        Standard deviation of the initial weight.
    seed : int, optional
        Seed of the initial weight; None leaves it zero, for a weight that is to be loaded.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    OptionError
        If a size is out of its range.
    ShapeError
        From `forward`, if the images do not fit.

    Notes
    -----
    Images are cut over b and c like the residual stream (b and h) or the inside of a block (b and f), never over y and
    x.

    **Communication:** the words of `Linear` with the image in place of its windows.

    References
    ----------
    Chellapilla, Puri, Simard: High performance convolutional neural networks for document processing, 2006 (unfolding).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Pair,
        parallelism: Parallelism,
        name: str,
        *,
        into: str = "inside",
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        bias: bool = True,
        std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        if into not in ("inside", "stream"):
            raise OptionError(f"{name}: into={into!r}: use 'inside' or 'stream'")
        subscripts, inner = {
            "inside": ("bhijs,hijo->bos", "o"),
            "stream": ("bcijs,cijh->bhs", "c"),
        }[into]
        super().__init__(
            subscripts,
            inner,
            (inputs, outputs),
            kernel,
            parallelism,
            name,
            stride=stride,
            padding=padding,
            bias=bias,
            std=std,
            seed=seed,
            dtype=dtype,
        )
        self.y = parallelism.inside("bos", "o") if into == "inside" else parallelism.stream("bhyx")
        self.y = Layout(*self.y.dims[:2], None, None)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        count = self._check(x)
        y, cache = self._apply(x)
        # stream: Y[B_row, H, S] {U_col} -> Y[B_row, H_col, S]: reduce_scatter over the axes that cut the summed letter
        y = y.redistribute(Layout(*self.y.dims[:2], None))
        xp, shape = backend.namespace(y.local), (*y.shape[:2], *count)
        block = xp.reshape(y.local, (*y.local.shape[:2], *count))
        if self.bias is not None:
            # Y[B_row, O_col, Y, X] + bias[O_col]
            bias = self.bias.use(Layout(self.y.dims[1]))
            block = block + bias.local[None, :, None, None]
        return DistArray(block, shape, self.y, x.grid), cache

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        # dY -> dY[B_row, O_col, Y, X], the layout of the output
        dy = dy.redistribute(self.y)
        b, o, ny, nx = dy.shape
        xp = backend.namespace(dy.local)
        block = xp.reshape(dy.local, (*dy.local.shape[:2], ny * nx))
        dy = DistArray(block, (b, o, ny * nx), Layout(*self.y.dims[:2], None), dy.grid)
        self._accumulate_bias(dy)
        # stream: dY[B_row, H_col, S] -> dY[B_row, H, S]: allgather, the adjoint of the reduce_scatter
        return self._adjoint(dy.redistribute(self.product.dy), cache, later)


class PatchEmbedding(Convolution):
    """Patches of images ``[b, c, y, x]`` as a sequence ``[b, s, h]`` of the stream, with or without a class token.

    Parameters
    ----------
    channels : int
        Number of channels of an image.
    patch : int or pair of int
        Sides of a patch along y and x, in pixels. Rows and columns that do not fill a patch are left out.
    hidden : int
        Width h of the stream.
    parallelism : Parallelism
        The mode, which chooses the map and the layouts.
    name : str
        Prefix of the names of the parameters ``weight`` ``[channels, i, j, hidden]``, ``bias`` ``[hidden]`` and
        ``token`` ``[hidden]``.
    class_token : bool
        Whether a learned vector stands before the patches, at position 0.
    bias : bool
        Whether there is a bias.
    std : float
        Standard deviation of the initial weight.
    seed : int, optional
        Seed of the initial weight; None leaves it zero, for a weight that is to be loaded.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    OptionError
        If a size is out of its range.
    ShapeError
        From `forward`, if the images do not fit.

    Notes
    -----
    The patches stand in the sequence row by row. The class token has a window of zeros: it has its place wherever the
    sequence is cut, joins the partial sums before they are reduced into the stream, and costs no extra words.

    **Communication:** the words of a product from the inside of a block to the stream, with the image in place of its
    windows.

    References
    ----------
    Dosovitskiy et al.: An image is worth 16x16 words, 2021.
    """

    def __init__(
        self,
        channels: int,
        patch: int | Pair,
        hidden: int,
        parallelism: Parallelism,
        name: str,
        *,
        class_token: bool = False,
        bias: bool = True,
        std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        initial: dict[str, Any] = {"std": std, "seed": seed, "dtype": dtype}
        subscripts, sizes = "bcijs,cijh->bsh", (channels, hidden)
        super().__init__(subscripts, "c", sizes, patch, parallelism, name, stride=patch, bias=bias, **initial)
        self.y, self.token, self.lead = parallelism.stream(), None, int(class_token)
        if class_token:
            self.token = Parameter(f"{name}.token", [hidden], self.bias_layout, parallelism, **initial)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        self._check(x)
        # 1d: windows[B, C_col, I, J, S] . W[C_col, I, J, H] -> Y[B, S, H] {U_col}
        y, cache = self._apply(x)
        # Bias and token are added on one of the ranks whose partial sums are reduced.
        first = all(y.grid.coords[axis] == 0 for axis in y.layout.partial)
        if self.bias is not None and first:
            y = y.like(y.local + self.bias.use(self.bias_layout).local)
        if self.token is not None:
            token = self.token.use(self.bias_layout)
            y.local[:, : self._leading(y), :] = token.local if first else 0
        # Y[B, S, H] {U_col} -> Y[B, S_col, H]: reduce_scatter over col
        return y.redistribute(self.y), cache

    def _leading(self, y: DistArray) -> int:
        """Return how many positions of this rank's block stand before the patches."""
        start, stop = y.box[1]
        return max(0, min(stop, self.lead) - start)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        # dY[B, S_col, H] -> dY[B, S, H]: allgather, the adjoint of the reduce_scatter
        dy = dy.redistribute(self.product.dy)
        if self.token is None:
            self._accumulate_bias(dy)
            return self._adjoint(dy, cache, later)
        lead, (b, s, h) = self._leading(dy), dy.layout.dims
        # dY[B, S, H] summed over b and the positions of the token, and of the patches -> dtoken[H] and dbias[H]
        vector = Layout(h, partial=(*b, *s, *dy.layout.partial))
        for parameter, rows in ((self.token, slice(0, lead)), (self.bias, slice(lead, None))):
            if parameter is not None:
                sums = backend.sum_over(dy.local[:, rows, :], [0, 1])
                parameter.accumulate(DistArray(sums, parameter.shape, vector, dy.grid))
        return self._adjoint(dy, cache, later)
