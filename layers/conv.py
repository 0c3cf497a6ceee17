"""Convolutions of images and their patches: the windows of an image in one product, in every mode."""

from __future__ import annotations

from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction import adjoints, contract, parse
from colossal_mpi.platform import backend

Pair = tuple[int, int]


def pair(value: int | Pair) -> Pair:
    """Return sizes along y and x of one for both or of a pair."""
    return (value, value) if isinstance(value, int) else value


class Convolution(Layer):
    """The product of the windows ``[b, c, i, j, s]`` of images ``[b, c, y, x]`` with a weight ``[c, i, j, o]``.

    Base of `Conv2d` and `PatchEmbedding`, which name the letters and shape the result. Images move whole, before they
    are unfolded and after their cotangent is folded, which spares a factor i j of the words; where s is cut, so is the
    product.
    """

    lead = 0
    """Windows of zeros before those of the image."""

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
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        self.kernel, self.stride, self.padding = pair(kernel), pair(stride), pair(padding)
        if min(*self.kernel, *self.stride) < 1 or min(self.padding) < 0:
            raise OptionError(
                f"{name}: kernel {self.kernel}, stride {self.stride}, padding {self.padding}: kernel and stride must "
                "be 1 or more and padding 0 or more"
            )
        self.name, self.product, self.keep = name, parallelism.product(subscripts, inner), parallelism.keep_gathered
        self.keep_weight = parallelism.keep_weights
        self.images = Layout(*self.product.x.dims[:2], None, None)
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

    def _windows(self, image: DistArray) -> DistArray:
        """Return the windows of an image that is cut over b and c alone. **Communication:** none."""
        block = kernels.of(image.grid).unfold(image.local, self.kernel, self.stride, self.padding)
        if self.lead:
            zeros = backend.zeros_like(block, (*block.shape[:4], self.lead))
            block = backend.namespace(block).concat([zeros, block], axis=4)
        layout = Layout(*self.images.dims[:2], None, None, None)
        return DistArray(block, (*image.shape[:2], *self.kernel, block.shape[-1]), layout, image.grid)

    def _apply(self, x: DistArray) -> tuple[DistArray, Any]:
        """Return the product, without bias, as the map leaves it, and what `_adjoint` needs."""
        p, image = self.product, x.redistribute(self.images)
        w = self.weight.use(p.w)
        y = contract(p.subscripts, self._windows(image), w, p.axes)
        return y, (image if self.keep else x, w if self.keep_weight else None, x.layout.with_partial())

    def _adjoint(self, dy: DistArray, cache: Any, later: Later) -> DistArray:
        """Return the cotangent of the images for one of the product as the map takes it."""
        p, (x, w, layout) = self.product, cache
        dx_subscripts, dw_subscripts = adjoints(p.subscripts)
        w = self.weight.use(p.w) if w is None else w
        d = contract(dx_subscripts, dy, w, p.axes)
        image = kernels.of(d.grid).fold(self._all_windows(d), x.shape[2:], self.stride, self.padding)
        partial = Layout(*d.layout.dims[:2], None, None, partial=(*d.layout.partial, *d.layout.dims[4]))

        def weight_product() -> None:
            windows = self._windows(x.redistribute(self.images))
            self.weight.accumulate(contract(dw_subscripts, windows, dy, p.axes, wide=True))

        weight_product() if later is None else later.append(weight_product)
        return DistArray(image, x.shape, partial, x.grid).redistribute(layout)

    def _all_windows(self, d: DistArray) -> Any:
        """Return the block of windows with zeros for those of other ranks, without the leading ones."""
        block, (start, stop) = d.local, d.box[4]
        if d.layout.dims[4]:
            block = backend.zeros_like(block, (*block.shape[:4], d.shape[4]))
            block[..., start:stop] = d.local
        return block[..., self.lead :]

    def _accumulate_bias(self, dy: DistArray) -> None:
        if self.bias is not None:
            self.bias.accumulate(dy.sum_over([d for d in range(dy.ndim) if d != self.out_dim]))


class Conv2d(Convolution):
    """Two-dimensional convolution (cross-correlation, as everywhere in deep learning) of images ``[b, c, y, x]``.

    Parameters
    ----------
    inputs, outputs : int
        Numbers of channels.
    kernel, stride, padding : int or pair of int
        Along y and x; padding is of zeros, on both sides.
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters ``weight``, ``[inputs, i, j, outputs]``, and ``bias``.
    into : {"inside", "stream"}
        Whether the channels go as h of the stream to a letter of the inside, or come back.
    bias, std, seed, dtype

    Raises
    ------
    OptionError
        If a size is out of its range.
    ShapeError
        From `forward`, if the images do not fit.

    Notes
    -----
    Images are cut over b and c as the residual stream (b and h) or the inside (b and f), never over y and x.
    **Communication:** as `Linear` with the image in place of its windows.

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
        **options: Any,
    ) -> None:
        if into not in ("inside", "stream"):
            raise OptionError(f"{name}: into={into!r}: use 'inside' or 'stream'")
        subscripts, inner = {
            "inside": ("bhijs,hijo->bos", "o"),
            "stream": ("bcijs,cijh->bhs", "c"),
        }[into]
        super().__init__(subscripts, inner, (inputs, outputs), kernel, parallelism, name, **options)
        self.y = parallelism.inside("bos", "o") if into == "inside" else parallelism.stream("bhyx")
        self.y = Layout(*self.y.dims[:2], None, None)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the images ``[b, o, y, x]`` of the next layer."""
        count = self._check(x)
        y, cache = self._apply(x)
        y = y.redistribute(Layout(*self.y.dims[:2], None))
        xp, shape = backend.namespace(y.local), (*y.shape[:2], *count)
        block = xp.reshape(y.local, (*y.local.shape[:2], *count))
        if self.bias is not None:
            bias = self.bias.use(Layout(self.y.dims[1]))
            block = block + bias.local[None, :, None, None]
        return DistArray(block, shape, self.y, x.grid), cache

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the images; those of weight and bias go to the gradients."""
        dy = dy.redistribute(self.y)
        b, o, ny, nx = dy.shape
        xp = backend.namespace(dy.local)
        block = xp.reshape(dy.local, (*dy.local.shape[:2], ny * nx))
        dy = DistArray(block, (b, o, ny * nx), Layout(*self.y.dims[:2], None), dy.grid)
        self._accumulate_bias(dy)
        return self._adjoint(dy.redistribute(self.product.dy), cache, later)


class PatchEmbedding(Convolution):
    """Patches of images ``[b, c, y, x]`` as a sequence ``[b, s, h]`` of the stream, after a class token if wanted.

    Parameters
    ----------
    channels, patch, hidden : int
        `patch` is the side of a patch, or its sides along y and x; rows and columns that fill none are left out.
    parallelism : Parallelism
    name : str
        Prefix of the names of ``weight`` ``[channels, i, j, hidden]``, ``bias`` and ``token``.
    class_token : bool
        Put a learned vector before the patches, at position 0.
    bias, std, seed, dtype

    Notes
    -----
    **Communication:** that of a product down, of which the windows are the inside. The token has a window of zeros, so
    that it has its place wherever the sequence is cut, and joins the partial sums before they are reduced into the
    stream, for no words of its own.

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
        **options: Any,
    ) -> None:
        sizes = (channels, hidden)
        super().__init__("bcijs,cijh->bsh", "c", sizes, patch, parallelism, name, stride=patch, **options)
        self.y, self.token, self.lead = parallelism.stream(), None, int(class_token)
        if class_token:
            made = {key: options[key] for key in ("std", "seed", "dtype") if key in options}
            self.token = Parameter(f"{name}.token", [hidden], self.bias_layout, parallelism, **{"std": 0.02, **made})

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the embedded patches, row by row, in the layout of the stream."""
        self._check(x)
        y, cache = self._apply(x)
        first = all(y.grid.coords[axis] == 0 for axis in y.layout.partial)
        if self.bias is not None and first:
            y = y.like(y.local + self.bias.use(self.bias_layout).local)
        if self.token is not None:
            token = self.token.use(self.bias_layout)
            y.local[:, : self._held(y), :] = token.local if first else 0
        return y.redistribute(self.y), cache

    def _held(self, y: DistArray) -> int:
        """Return how many positions of this rank's block are no patches."""
        start, stop = y.box[1]
        return max(0, min(stop, self.lead) - start)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the images; those of weight, bias and token go to the gradients."""
        dy = dy.redistribute(self.product.dy)
        if self.token is None:
            self._accumulate_bias(dy)
            return self._adjoint(dy, cache, later)
        held, (b, s, h) = self._held(dy), dy.layout.dims
        vector = Layout(h, partial=(*b, *s, *dy.layout.partial))
        for parameter, rows in ((self.token, slice(0, held)), (self.bias, slice(held, None))):
            if parameter is not None:
                sums = backend.sum_over(dy.local[:, rows, :], [0, 1])
                parameter.accumulate(DistArray(sums, parameter.shape, vector, dy.grid))
        return self._adjoint(dy, cache, later)
