"""Vision Transformers: the section of their configuration, and the task of classifying images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from colossal_mpi.apps import data
from colossal_mpi.apps.config import Config, ModelSection, TransformerSection
from colossal_mpi.apps.training.tasks.task import Batch, Task, make_model, register_section, register_task, whole
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.layers import Context, CrossEntropy, Parallelism, count_correct
from colossal_mpi.layout import Layout

_COLUMNS = 80


class ImageSection(ModelSection):
    """The keys of a model that reads images."""

    reads: ClassVar[Literal["text", "images"]] = "images"


class ViTSection(ImageSection, TransformerSection):
    """A Vision Transformer, which names the class of an image."""

    patch: int = Field(2, ge=1, description="side of a patch in pixels")
    pool: Literal["first", "mean"] = Field("first", description="classify a class token, or the mean of the patches")
    dropout: float = Field(0.0, ge=0, lt=1, description="rate at which elements are dropped")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate at which whole branches are dropped, in the last block")


class ImageClassification(Task):
    """The task that maps images ``[b, c, y, x]`` to the logits ``[b, v]`` of their classes.

    Parameters
    ----------
    config : Config
        Its model is an `ImageSection`.
    parallelism : Parallelism
        The tensor mode on the grid of one stage.

    Notes
    -----
    An epoch has every training image once, in a random order, moved by up to ``data.shift`` pixels. The loss is the
    cross-entropy, a mean over the images. A validation takes all held-out images.
    """

    section = ImageSection
    name, unit, per, per_sample = "ViT", "images", "image", 1

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        super().__init__(config, parallelism)
        self.images = data.read_images(config.data.files, config.data.validation, self.grid)
        channels, height, width = self.images.train.shape[1:]
        image = {"image": (height, width), "channels": channels, "classes": self.images.classes}
        self.model, sizes = make_model(config, parallelism, **image)
        self.cross_entropy = CrossEntropy(parallelism)
        self.held, self.about = len(self.images.validation), self.images.about
        self.digest = self.images.digest
        self.length = sizes.positions
        self.samples = parallelism.tokens().dims[0]

    def batch(self, first: int, stop: int) -> Batch:
        which = data.shuffled(first, stop, len(self.images.train), self.config.training.seed)
        moves = data.random_shifts(first, stop, self.config.data.shift, self.config.training.seed)
        return self._batch(self.images.train, self.images.train_labels, which, moves)

    def _batch(
        self, images: np.ndarray, labels: np.ndarray, which: np.ndarray, moves: np.ndarray | None = None
    ) -> Batch:
        shape, layout = (len(which), *images.shape[1:]), Layout(self.samples, None, None, None)

        def cut(index: tuple[slice, ...]) -> np.ndarray:
            rows = index[0]
            return images[which[rows]] if moves is None else data.shifted(images[which[rows]], moves[rows])

        x = from_global(cut, self.grid, layout, shape, self.config.parallel.dtype)
        return Batch(x, from_global(labels[which], self.grid, Layout(self.samples)))

    def held_out(self) -> Iterator[Batch]:
        for first in range(0, self.held, self.config.training.batch):
            yield self._held(first, min(first + self.config.training.batch, self.held))

    def _held(self, first: int, stop: int) -> Batch:
        return self._batch(self.images.validation, self.images.validation_labels, np.arange(first, stop))

    def loss(self, outputs: DistArray, labels: DistArray, samples: float) -> tuple[float, Any]:
        return self.cross_entropy.forward(outputs, labels, round(samples))

    def backward(self, saved: Any, scale: float = 1.0) -> DistArray:
        return self.cross_entropy.backward(saved, scale)

    def measures(self, outputs: DistArray, labels: DistArray, samples: int) -> Mapping[str, float]:
        return {"accuracy": count_correct(outputs, labels) / samples}

    def sample(self, count: int) -> bytes:
        # Draw the first held-out images, as many as fit on a line, above their labels and the model's answers.
        width = 2 * self.images.train.shape[3] + 2
        shown = max(1, min(self.held, _COLUMNS // width))
        logits = self.run(self._held(0, shown).inputs, Context(train=False))
        named = whole(logits).argmax(-1)
        words = [f"{label}, named {n}" for label, n in zip(self.images.validation_labels, named, strict=False)]
        pictures = zip(*(data.draw(image) for image in self.images.validation[:shown]), strict=True)
        rows = [*pictures, words]
        return "\n".join(["", *("".join(f"{cell:{width}}" for cell in row).rstrip() for row in rows)]).encode()


register_task("images", ImageClassification)
register_section("vit", ViTSection)
