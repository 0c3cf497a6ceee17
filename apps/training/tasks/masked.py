"""Masked language models, BERT: the section of its configuration, and the task of filling in hidden bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import Field

from colossal_mpi.apps import data
from colossal_mpi.apps.config import Config, TextSection, TransformerSection
from colossal_mpi.apps.training.tasks.task import Batch, Task, make_model, register_section, register_task, whole
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.layers import Context, CrossEntropy, Parallelism, count_correct
from colossal_mpi.layout import Layout


class MaskedSection(TextSection):
    """The keys of a masked language model."""

    context: int = Field(64, ge=5, description="tokens per sequence, with two or three marks among them")
    vocabulary: int = Field(259, ge=259, description="number of tokens: 256 bytes and three marks")
    masked: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are hidden")
    next_sentence: bool = Field(False, description="also tell whether the second half of a sequence follows the first")


class BertSection(MaskedSection, TransformerSection):
    """BERT, which fills in hidden bytes of a text."""

    dropout: float = Field(0.0, ge=0, lt=1, description="rate at which elements are dropped")


class MaskedLanguage(Task):
    """The task that maps token ids ``[b, s]``, some of them hidden, to the logits ``[b, s, v]`` of the hidden ones.

    Parameters
    ----------
    config : Config
        Its model is a `MaskedSection`.
    parallelism : Parallelism
        The tensor mode on the grid of one stage.

    Notes
    -----
    The loss is the cross-entropy, a mean over the hidden tokens. With ``next_sentence`` a sequence has two parts, and
    half of the second parts are from elsewhere in the corpus: the model also has logits ``[b, 2]`` for this, and the
    loss is the sum of both cross-entropies, the second a mean over the samples. A validation takes sequences that are
    spread evenly over the held-out text, hidden and paired in the same way each time.
    """

    section = MaskedSection
    name, unit, per = "BERT", "tokens", "masked token"

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        super().__init__(config, parallelism)
        assert isinstance(config.model, MaskedSection)
        m, training = config.model, config.training
        d = config.data
        self.corpus = data.read_corpus(d.files, d.validation, m.context, self.grid, d.format, d.dtype)
        data.require_vocabulary(
            self.corpus,
            data.BYTE_VALUES,
            f"a bert reads bytes, {data.BYTE_VALUES} of them: prepare with --tokenizer bytes",
        )
        self.pairs, self.form = m.next_sentence, data.MaskedFormat(m.context, m.next_sentence, m.masked)
        self.model, _ = make_model(config, parallelism, positions=m.context)
        self.cross_entropy = CrossEntropy(parallelism)
        self.length, self.per_sample, self.held = m.context, m.context, training.evaluate_batches * training.batch
        self.about, self.digest = self.corpus.about, self.corpus.digest

    def batch(self, first: int, stop: int) -> Batch:
        seed, text = self.config.training.seed, self.corpus.train
        starts = data.random_starts(first, stop, len(text), self.form.bytes, seed)
        return self._batch(text, starts, first, seed, "data")

    def held_out(self) -> Iterator[Batch]:
        for first in range(0, self.held, self.config.training.batch):
            yield self._held(first, first + self.config.training.batch)

    def _held(self, first: int, stop: int) -> Batch:
        starts = data.even_starts(self.held, len(self.corpus.validation), self.form.bytes)
        return self._batch(self.corpus.validation, starts[first:stop], first, self.config.training.seed, "held")

    def _batch(self, text: data.Tokens, starts: np.ndarray, first: int, seed: int, stream: str) -> Batch:
        layout, shape = self.parallelism.tokens(), (len(starts), self.form.length)
        (low, high), _ = layout.on(self.grid.axes, 2).box(shape, self.grid.axes, self.grid.coords)
        rows = self.form.make(text, starts[low:high], first + low, seed, stream)

        def tokens(array: np.ndarray) -> DistArray:
            return from_global(lambda index: array[:, index[1]], self.grid, layout, shape)

        follows = from_global(lambda _: rows.unrelated, self.grid, Layout(layout.dims[0]), shape[:1])
        labels = (tokens(rows.labels), follows) if self.pairs else (tokens(rows.labels),)
        return Batch(tokens(rows.inputs), labels, {"segments": tokens(rows.segments)} if self.pairs else {})

    def _heads(self, outputs: Any, labels: Any) -> list[tuple[DistArray, DistArray, int]]:
        """Return for each head its logits, its labels and the number of labels in a sample that count."""
        logits = outputs if self.pairs else (outputs,)
        return list(zip(logits, labels, (self.form.hidden, 1), strict=False))

    def loss(self, outputs: Any, labels: Any, samples: float) -> tuple[float, Any]:
        results = [self.cross_entropy.forward(x, y, round(samples) * n) for x, y, n in self._heads(outputs, labels)]
        return sum(value for value, _ in results), [saved for _, saved in results]

    def backward(self, saved: Any, scale: float = 1.0) -> Any:
        cotangents = tuple(self.cross_entropy.backward(cache, scale) for cache in saved)
        return cotangents if self.pairs else cotangents[0]

    def measures(self, outputs: Any, labels: Any, samples: int) -> Mapping[str, float]:
        names = ("masked accuracy", "next accuracy")
        heads = zip(names, self._heads(outputs, labels), strict=False)
        return {name: count_correct(x, y) / (samples * n) for name, (x, y, n) in heads}

    def sample(self, count: int) -> bytes:
        # Show lines of held-out text, with underlines for the hidden bytes and then as the model fills them in.
        rows = min(self.held, -(-count // self.form.bytes))
        batch = self._held(0, rows)
        outputs = self.run(batch.inputs, Context(train=False, **batch.context))
        arrays = [batch.inputs, batch.labels[0], outputs[0] if self.pairs else outputs]
        inputs, labels, logits = map(whole, arrays)
        filled = np.where(labels >= 0, logits[:, :, : data.BYTE_VALUES].argmax(-1), inputs)
        pairs = zip(np.where(labels >= 0, ord("_"), inputs), filled, strict=True)
        return b"\n" + b"\n".join(_text(hidden) + b"  ->  " + _text(full) for hidden, full in pairs)


def _text(tokens: np.ndarray) -> bytes:
    """Return the tokens that are bytes, on one line."""
    return bytes(tokens[tokens < data.BYTE_VALUES].tolist()).replace(b"\n", b" ")


register_task("masked", MaskedLanguage)
register_section("bert", BertSection)
