"""Classes of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from colossal_mpi.apps.config import sections
from colossal_mpi.apps.config.load import Config
from colossal_mpi.apps.data import corpus
from colossal_mpi.apps.data.images import draw, read_images, shifted
from colossal_mpi.apps.training.tasks.task import Batch, Task, whole
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.accuracy import correct
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import ViT, ViTConfig
from colossal_mpi.layout import Layout

_COLUMNS = 80


class ImageClassification(Task):
    """Images ``[b, c, y, x]`` to the logits ``[b, v]`` of their classes; all images are taken once in an epoch."""

    name, unit, per, per_sample = "ViT", "images", "image", 1

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        super().__init__(config, parallelism)
        assert isinstance(config.model, sections.ViT)
        self.images = read_images(config.data.files, config.data.validation, self.grid)
        channels, height, width = self.images.train.shape[1:]
        sizes = ViTConfig(
            **config.model.model_dump(exclude={"kind"}),
            image=(height, width),
            channels=channels,
            classes=self.images.classes,
            seed=config.training.seed,
            dtype=config.parallel.dtype,
        )
        self.model, self.cross_entropy = ViT(sizes, parallelism), CrossEntropy(parallelism)
        self.held, self.about = len(self.images.validation), self.images.about
        self.length = sizes.positions
        self.samples = parallelism.tokens().dims[0]

    def batch(self, first: int, stop: int) -> Batch:
        """Return images in the order of their epoch."""
        which = corpus.shuffled(first, stop, len(self.images.train), self.config.training.seed)
        moves = corpus.shifts(first, stop, self.config.data.shift, self.config.training.seed)
        return self._some(self.images.train, self.images.train_labels, which, moves)

    def _some(
        self, images: np.ndarray, labels: np.ndarray, which: np.ndarray, moves: np.ndarray | None = None
    ) -> Batch:
        shape, layout = (len(which), *images.shape[1:]), Layout(self.samples, None, None, None)

        def cut(index: tuple[slice, ...]) -> np.ndarray:
            rows = index[0]
            return images[which[rows]] if moves is None else shifted(images[which[rows]], moves[rows])

        x = from_global(cut, self.grid, layout, shape, self.config.parallel.dtype)
        return Batch(x, from_global(labels[which], self.grid, Layout(self.samples)))

    def held_out(self) -> Iterator[Batch]:
        """Yield all images that are held out, a batch of training at a time."""
        for first in range(0, self.held, self.config.training.batch):
            yield self._held(first, min(first + self.config.training.batch, self.held))

    def _held(self, first: int, stop: int) -> Batch:
        return self._some(self.images.validation, self.images.validation_labels, np.arange(first, stop))

    def loss(self, outputs: DistArray, labels: DistArray, samples: int) -> tuple[float, Any]:
        """Return the cross-entropy, a mean over the images."""
        return self.cross_entropy.forward(outputs, labels, samples)

    def backward(self, saved: Any, scale: float = 1.0) -> DistArray:
        """Return the cotangent of the logits, times a loss scale."""
        return self.cross_entropy.backward(saved, scale)

    def measures(self, outputs: DistArray, labels: DistArray, samples: int) -> Mapping[str, float]:
        """Return this batch's part of the share of the images that are given their class."""
        return {"accuracy": correct(outputs, labels) / samples}

    def sample(self, count: int) -> bytes:
        """Return a drawing of the first images held out, as many as fit on a line, and the classes they are given."""
        width = 2 * self.images.train.shape[3] + 2
        shown = max(1, min(self.held, _COLUMNS // width))
        logits = self.run(self._held(0, shown).inputs, Context(train=False))
        named = whole(logits).argmax(-1)
        words = [f"{label}, named {n}" for label, n in zip(self.images.validation_labels, named, strict=False)]
        pictures = zip(*(draw(image) for image in self.images.validation[:shown]), strict=True)
        rows = [*pictures, words]
        return "\n".join(["", *("".join(f"{cell:{width}}" for cell in row).rstrip() for row in rows)]).encode()
