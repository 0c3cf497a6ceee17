"""The Vision Transformer: a classifier that reads the patches of an image as a sequence, and its Hugging Face mapping.

``apps`` trains it, and checkpoints and `from_pretrained` find it in the registry. It is a chain of layers: nothing here
communicates or knows the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.conv import PatchEmbedding
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import PositionEmbedding
from colossal_mpi.layers.models.bert import block_keys, block_weights
from colossal_mpi.layers.models.huggingface import architecture as hf
from colossal_mpi.layers.models.registry import register_model
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.pooling import ClassifierHead


@dataclass(frozen=True)
class ViTConfig:
    """The configuration of a `ViT`; the defaults are the sizes of ViT-B/16.

    Parameters
    ----------
    image : int or (int, int)
        Side of a square image in pixels, or the sides along y and x.
    patch : int or (int, int)
        Side of a square patch in pixels, or the sides along y and x.
    channels : int
        Channels of an image.
    classes : int
        Number of classes.
    layers : int
        Number of blocks.
    hidden : int
        Width of the residual stream.
    heads : int
        Attention heads in each block; must divide `hidden`.
    inner : int, optional
        Width of the MLP; ``4 hidden`` by default.
    pool : {"first", "mean"}
        ``"first"`` puts a class token before the patches and classifies it; ``"mean"`` has no class token and
        classifies the mean of the patches.
    activation : str
        Activation of the MLP.
    eps : float
        Added to the variance in the norms.
    dropout : float
        Rate at which elements of the embedded patches and of the outputs of attention and MLP are dropped.
    drop_path : float
        Rate at which the outputs of the last block are dropped for a whole sample; it grows linearly from 0 over the
        blocks.
    std : float
        Standard deviation of the initial weights.
    seed : int or None
        Seed of the initial weights; None makes zeros, for weights that are loaded afterwards.
    dtype : str
        Dtype of the weights.
    """

    image: int | tuple[int, int] = 224
    patch: int | tuple[int, int] = 16
    channels: int = 3
    classes: int = 1000
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    inner: int | None = None
    pool: str = "first"
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    drop_path: float = 0.0
    std: float = 0.02
    seed: int | None = 0
    dtype: str = "float32"

    @property
    def positions(self) -> int:
        """The length of the sequence: the whole patches that fit into an image, and the class token."""
        (ny, nx), (py, px) = _pair(self.image), _pair(self.patch)
        return (ny // py) * (nx // px) + (self.pool == "first")


def _normalize(table: hf.Table) -> hf.Table:
    """Count the labels, and write sizes as pairs."""
    pairs = {key: tuple(table[key]) for key in ("image_size", "patch_size") if isinstance(table.get(key), list)}
    return table | pairs | {"labels": hf.count_labels(table)}


def _denormalize(table: hf.Table, extra: hf.Table) -> hf.Table:
    """Keep the names of the labels if there are any, and number the labels otherwise."""
    return table | hf.label_names(table.pop("labels"), extra)


_BODY = "vit.embeddings"

VIT = hf.Architecture(
    model_type="vit",
    classes=("ViTForImageClassification",),
    base="vit",
    keys=(
        hf.ConfigKey("image_size", "image", 224, kinds=(int, tuple)),
        hf.ConfigKey("patch_size", "patch", 16, kinds=(int, tuple)),
        hf.integer("num_channels", "channels", 3),
        hf.integer("labels", "classes", 2),
        *block_keys(),
        hf.fixed("qkv_bias", True, True),
    ),
    weights=(
        *hf.linear("patches", "cijh", [f"{_BODY}.patch_embeddings.projection"], "hcij", "cij"),
        hf.tensor("patches.token", "h", f"{_BODY}.cls_token", "11h"),
        hf.tensor("positions.weight", "ph", f"{_BODY}.position_embeddings", "1ph"),
        *block_weights("vit.encoder.layer.{i}", "attention", ("layernorm_before", "layernorm_after")),
        *hf.norm("norm", "vit.layernorm"),
        *hf.linear("head", "hv", ["classifier"], "vh"),
    ),
    normalize=_normalize,
    denormalize=_denormalize,
    ignored=("vit.pooler.*",),  # a pooler, which classification does not use
)


@register_model("vit", ViTConfig, task="images", huggingface=[VIT])
class ViT(Sequential):
    """Vision Transformer for classification: images ``[b, c, y, x]`` to logits ``[b, v]`` of v classes.

    The patches and a class token get learned positions and pass through pre-norm blocks, in which every position
    attends to all others, and a norm. A linear layer then classifies the class token or the mean of the patches. With
    ``pool="first"`` the model is Hugging Face's ``ViTForImageClassification``.

    Parameters
    ----------
    config : ViTConfig
        Sizes, initial weights and dtype.
    parallelism : Parallelism
        The grid and the tensor mode.

    Raises
    ------
    OptionError
        If the patch is larger than the image, or there is no such pooling or activation.
    ShapeError
        If `heads` does not divide `hidden`; from `forward`, if the images have another size.

    Notes
    -----
    All initial weights, positions and class token included, are normal with standard deviation `std`. They depend on
    seed and name alone and are bitwise the same on every grid.

    References
    ----------
    Dosovitskiy et al.: An image is worth 16x16 words, 2021. Beyer et al.: Better plain ViT baselines for ImageNet-1k,
    2022 (the mean). Touvron et al.: Training data-efficient image transformers, 2021 (drop-path that grows).

    Examples
    --------
    >>> model = ViT(ViTConfig(image=32, patch=4, classes=10), Parallelism(Grid(row=2, col=2), "2d"))
    """

    def __init__(self, config: ViTConfig, parallelism: Parallelism) -> None:
        c, hidden, token = config, config.hidden, config.pool == "first"
        if c.positions < 1 + token:
            raise OptionError(f"a ViT of images {c.image} and patches {c.patch}: at least one patch must fit in")
        self.config, inner = config, 4 * hidden if c.inner is None else c.inner
        initial: dict[str, Any] = {"std": c.std, "seed": c.seed, "dtype": c.dtype}
        rates = [c.drop_path * i / max(1, c.layers - 1) for i in range(c.layers)]
        super().__init__(
            PatchEmbedding(c.channels, c.patch, hidden, parallelism, "patches", class_token=token, **initial),
            PositionEmbedding(c.positions, hidden, parallelism, "positions", **initial),
            Dropout(c.dropout, "dropout", c.seed or 0),
            *[
                TransformerBlock(
                    hidden,
                    c.heads,
                    inner,
                    parallelism,
                    f"blocks.{i}",
                    drop_path=rate,
                    attention={"causal": False},
                    eps=c.eps,
                    activation=c.activation,
                    dropout=c.dropout,
                    out_std=c.std,
                    **initial,
                )
                for i, rate in enumerate(rates)
            ],
            LayerNorm(hidden, parallelism, "norm", eps=c.eps, dtype=c.dtype),
            ClassifierHead(hidden, c.classes, parallelism, "head", pool=c.pool, **initial),
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        c = self.config
        size = (c.channels, *_pair(c.image))
        if x.shape[1:] != size:
            raise ShapeError(f"a ViT of images [b, {', '.join(map(str, size))}]: they are {list(x.shape)}")
        return super().forward(x, ctx)


def _pair(n: int | tuple[int, int]) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else n
