"""Masked language models: the bytes of a text that are hidden, and whether its second part follows the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from colossal_mpi.apps.config import sections
from colossal_mpi.apps.config.load import Config
from colossal_mpi.apps.data import corpus
from colossal_mpi.apps.data.masks import BYTES, Form
from colossal_mpi.apps.training.tasks.task import Batch, Task, whole
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.accuracy import correct
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import Bert, BertConfig
from colossal_mpi.layout import Layout


class MaskedLanguage(Task):
    """Token ids ``[b, s]``, some of them hidden, to the logits ``[b, s, v]`` of what they were.

    With ``next_sentence`` a sequence has two parts, and half of the second ones are from elsewhere in the corpus: the
    model has logits ``[b, 2]`` of that, too, and the loss is the sum of both.
    """

    name, unit, per = "BERT", "tokens", "masked token"

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        super().__init__(config, parallelism)
        assert isinstance(config.model, sections.Bert)
        m, training = config.model, config.training
        self.corpus = corpus.read_corpus(config.data.files, config.data.validation, m.context, self.grid)
        corpus.require_vocabulary(
            self.corpus, BYTES, f"a bert reads bytes, {BYTES} of them: prepare with --tokenizer bytes"
        )
        self.pairs, self.form = m.next_sentence, Form(m.context, m.next_sentence, m.masked)
        sizes = m.model_dump(exclude={"kind", "context", "masked"})
        seed, dtype = training.seed, config.parallel.dtype
        self.model = Bert(BertConfig(**sizes, positions=m.context, seed=seed, dtype=dtype), parallelism)
        self.cross_entropy = CrossEntropy(parallelism)
        self.length, self.per_sample, self.held = m.context, m.context, training.evaluate_batches * training.batch
        self.about = self.corpus.about

    def batch(self, first: int, stop: int) -> Batch:
        """Return sequences that begin anywhere in the corpus."""
        seed, text = self.config.training.seed, self.corpus.train
        starts = corpus.sample_starts(first, stop, len(text), self.form.bytes, seed)
        return self._batch(text, starts, first, seed, "data")

    def held_out(self) -> Iterator[Batch]:
        """Yield sequences spread evenly over the held-out text, hidden and paired alike in every validation."""
        for first in range(0, self.held, self.config.training.batch):
            yield self._held(first, first + self.config.training.batch)

    def _held(self, first: int, stop: int) -> Batch:
        starts = corpus.spread_starts(self.held, len(self.corpus.validation), self.form.bytes)
        return self._batch(self.corpus.validation, starts[first:stop], first, self.config.training.seed, "held")

    def _batch(self, text: np.ndarray, starts: np.ndarray, first: int, seed: int, stream: str) -> Batch:
        layout, shape = self.parallelism.tokens(), (len(starts), self.form.length)
        (low, high), _ = layout.on(self.grid.axes, 2).box(shape, self.grid.axes, self.grid.coords)
        made = self.form.make(text, starts[low:high], first + low, seed, stream)

        def tokens(rows: np.ndarray) -> DistArray:
            return from_global(lambda index: rows[:, index[1]], self.grid, layout, shape)

        follows = from_global(lambda _: made.other, self.grid, Layout(layout.dims[0]), shape[:1])
        labels = (tokens(made.labels), follows) if self.pairs else (tokens(made.labels),)
        return Batch(tokens(made.inputs), labels, {"segments": tokens(made.segments)} if self.pairs else {})

    def _each(self, outputs: Any, labels: Any) -> list[tuple[DistArray, DistArray, int]]:
        """Return logits, labels and the number of labels in a sample that count, of each head."""
        every = outputs if self.pairs else (outputs,)
        return list(zip(every, labels, (self.form.hidden, 1), strict=False))

    def loss(self, outputs: Any, labels: Any, samples: int) -> tuple[float, Any]:
        """Return the cross-entropy, a mean over the hidden tokens, and over the samples that of the second parts."""
        results = [self.cross_entropy.forward(x, y, samples * n) for x, y, n in self._each(outputs, labels)]
        return sum(value for value, _ in results), [saved for _, saved in results]

    def backward(self, saved: Any, scale: float = 1.0) -> Any:
        """Return the cotangents of the logits, times a loss scale."""
        cotangents = tuple(self.cross_entropy.backward(one, scale) for one in saved)
        return cotangents if self.pairs else cotangents[0]

    def measures(self, outputs: Any, labels: Any, samples: int) -> Mapping[str, float]:
        """Return this batch's part of the shares of the hidden tokens, and of the second parts, that are named."""
        names = ("masked accuracy", "next accuracy")
        each = zip(names, self._each(outputs, labels), strict=False)
        return {name: correct(x, y) / (samples * n) for name, (x, y, n) in each}

    def sample(self, count: int) -> bytes:
        """Return some held-out text with its hidden bytes as underlines, and as the model fills them in."""
        rows = min(self.held, -(-count // self.form.bytes))
        batch = self._held(0, rows)
        outputs = self.run(batch.inputs, Context(train=False, **batch.context))
        arrays = [batch.inputs, batch.labels[0], outputs[0] if self.pairs else outputs]
        inputs, labels, logits = map(whole, arrays)
        filled = np.where(labels >= 0, logits[:, :, :BYTES].argmax(-1), inputs)
        pairs = zip(np.where(labels >= 0, ord("_"), inputs), filled, strict=True)
        return b"\n" + b"\n".join(_text(hidden) + b"  ->  " + _text(full) for hidden, full in pairs)


def _text(tokens: np.ndarray) -> bytes:
    """Return the bytes among some tokens, on one line."""
    return bytes(tokens[tokens < BYTES].tolist()).replace(b"\n", b" ")
