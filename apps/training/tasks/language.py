"""Causal language models: the next byte of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from colossal_mpi.apps.config import sections
from colossal_mpi.apps.config.load import Config
from colossal_mpi.apps.data import corpus
from colossal_mpi.apps.training.tasks.task import Batch, Task
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import Parallelism, generate
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig, Llama, LlamaConfig

PROMPT = b"\nThe "
MODELS: dict[str, tuple[str, type, type]] = {"gpt": ("GPT", GPT, GPTConfig), "llama": ("Llama", Llama, LlamaConfig)}
"""Of each ``model.kind`` its name, the model and its sizes, which are those of its section and the common ones."""


class CausalLanguage(Task):
    """Token ids ``[b, s]``, bytes of a corpus, to the logits ``[b, s, v]`` of the byte after each."""

    unit, per = "tokens", "token"

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        super().__init__(config, parallelism)
        assert isinstance(config.model, sections.Text)
        self.context, training = config.model.context, config.training
        self.corpus = corpus.read_corpus(config.data.files, config.data.validation, self.context, self.grid)
        vocabulary = config.model.model_dump()["vocabulary"]
        corpus.require_vocabulary(self.corpus, vocabulary, f"model.vocabulary={vocabulary}: give it that many")
        self.name, model, sizes = MODELS[config.model.kind]
        given = config.model.model_dump(exclude={"kind", "context"})
        sizes = sizes(**given, positions=self.context, seed=training.seed, dtype=config.parallel.dtype)
        self.model, self.cross_entropy = model(sizes, parallelism), CrossEntropy(parallelism)
        self.length, self.per_sample, self.held = self.context, self.context, training.evaluate_batches * training.batch
        self.about, self.tokenizer = self.corpus.about, self.corpus.tokenizer.text
        self.order = parallelism.order(self.context)
        """Of the tokens of a sequence in its arrays: all ranks of a ring then have as much to attend to."""

    def batch(self, first: int, stop: int) -> Batch:
        """Return sequences that begin anywhere in the corpus."""
        starts = corpus.sample_starts(first, stop, len(self.corpus.train), self.context, self.config.training.seed)
        return self._sequences(self.corpus.train, starts)

    def _sequences(self, tokens: np.ndarray, starts: np.ndarray) -> Batch:
        layout = self.parallelism.tokens()
        arrays = corpus.sequences(tokens, starts, self.context, self.grid, layout, self.order)
        return Batch(*arrays, {"order": self.order})

    def held_out(self) -> Iterator[Batch]:
        """Yield sequences spread evenly over the held-out text."""
        starts = corpus.spread_starts(self.held, len(self.corpus.validation), self.context)
        for some in np.split(starts, self.config.training.evaluate_batches):
            yield self._sequences(self.corpus.validation, some)

    def loss(self, outputs: DistArray, labels: DistArray, samples: int) -> tuple[float, Any]:
        """Return the cross-entropy, a mean over all tokens."""
        return self.cross_entropy.forward(outputs, labels, samples * self.context)

    def backward(self, saved: Any, scale: float = 1.0) -> DistArray:
        """Return the cotangent of the logits, times a loss scale."""
        return self.cross_entropy.backward(saved, scale)

    def sample(self, count: int) -> bytes:
        """Return a prompt continued by `count` sampled bytes, the same on any grid up to rounding."""
        return self.generate(PROMPT, count)

    def generate(self, prompt: bytes, count: int, temperature: float = 0.8) -> bytes:
        """Return `prompt` continued by `count` tokens drawn at a temperature."""
        words = self.corpus.tokenizer
        tokens = words.encode([prompt])[0].tolist()
        options: dict[str, Any] = {
            "temperature": temperature,
            "seed": self.config.training.seed,
            "vocabulary": self.corpus.vocabulary,
        }
        made = generate(self.model, [tokens], count, **options, pipeline=self.pipeline)
        return words.decode([*tokens, *made[0]])
