"""The Vision Transformer: the patches of an image as a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.conv import PatchEmbedding
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import PositionEmbedding
from colossal_mpi.layers.layer import Context
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.pooling import ClassifierHead


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT; by default those of ViT-B/16."""

    image: int | tuple[int, int] = 224
    """Side of an image in pixels, or its sides along y and x."""
    patch: int | tuple[int, int] = 16
    channels: int = 3
    classes: int = 1000
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    inner: int | None = None
    """Width of the MLP; 4 x hidden by default."""
    pool: str = "first"
    """``"first"``: a class token, put before the patches, is classified. ``"mean"``: the mean of the patches alone."""
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    """Rate at which elements of the embedded patches and of what attention and MLP add are dropped."""
    drop_path: float = 0.0
    """Rate at which what the last block adds to a sample is dropped; it grows from 0, linearly, over the blocks."""
    std: float = 0.02
    """Standard deviation of the initial weights."""
    seed: int | None = 0
    dtype: str = "float32"

    @property
    def positions(self) -> int:
        """The length of the sequence: the whole patches that fit into an image, and the class token."""
        (ny, nx), (py, px) = _pair(self.image), _pair(self.patch)
        return (ny // py) * (nx // px) + (self.pool == "first")


class ViT(Sequential):
    """Vision Transformer for classification: images ``[b, c, y, x]`` to logits ``[b, v]`` of v classes.

    Patches and a class token with learned positions, pre-norm blocks in which every position sees all others, a norm,
    and a product of the class token, or of the mean of the patches, with the classes. With ``pool="first"`` it has the
    structure of Hugging Face's ``ViTForImageClassification``.

    Parameters
    ----------
    config : ViTConfig
    parallelism : Parallelism

    Raises
    ------
    OptionError
        If the patch is larger than the image, or there is no such pooling or activation.
    ShapeError
        If `heads` does not divide `hidden`; from `forward`, if the images are of another size.

    Notes
    -----
    Initial weights are normal with standard deviation `std`, those of the positions and the class token, too; they are
    a function of seed and name, bitwise the same on every grid.

    References
    ----------
    Dosovitskiy et al.: An image is worth 16x16 words, 2021. Beyer et al.: Better plain ViT baselines for ImageNet-1k,
    2022 (the mean). Touvron et al.: Training data-efficient image transformers, 2021 (drop-path that grows).
    """

    def __init__(self, config: ViTConfig, parallelism: Parallelism) -> None:
        c, hidden, token = config, config.hidden, config.pool == "first"
        if c.positions < 1 + token:
            raise OptionError(f"a ViT of images {c.image} and patches {c.patch}: at least one patch must fit in")
        self.config, inner = config, 4 * hidden if c.inner is None else c.inner
        common: dict[str, Any] = {"std": c.std, "seed": c.seed, "dtype": c.dtype}
        options: dict[str, Any] = {"eps": c.eps, "activation": c.activation, "dropout": c.dropout, "out_std": c.std}
        blocks = [
            TransformerBlock(
                hidden,
                c.heads,
                inner,
                parallelism,
                f"blocks.{i}",
                attention={"causal": False},
                drop_path=c.drop_path * i / max(1, c.layers - 1),
                **options,
                **common,
            )
            for i in range(c.layers)
        ]
        super().__init__(
            PatchEmbedding(c.channels, c.patch, hidden, parallelism, "patches", class_token=token, **common),
            PositionEmbedding(c.positions, hidden, parallelism, "positions", **common),
            Dropout(c.dropout, "dropout", c.seed or 0),
            *blocks,
            LayerNorm(hidden, parallelism, "norm", eps=c.eps, dtype=c.dtype),
            ClassifierHead(hidden, c.classes, parallelism, "head", pool=c.pool, **common),
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the logits of images ``[b, c, y, x]`` in any layout."""
        c = self.config
        size = (c.channels, *_pair(c.image))
        if x.shape[1:] != size:
            raise ShapeError(f"a ViT of images [b, {', '.join(map(str, size))}]: they are {list(x.shape)}")
        return super().forward(x, ctx)


def _pair(n: int | tuple[int, int]) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else n
