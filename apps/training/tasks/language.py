"""Causal language models, GPT and Llama: sections of the configuration, and the task of predicting the next token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from colossal_mpi.apps import data
from colossal_mpi.apps.config import Config, TextSection, TransformerSection
from colossal_mpi.apps.training.tasks.task import Batch, Task, make_model, register_section, register_task
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import CrossEntropy, Parallelism, generate

PROMPT = b"\nThe "


class LanguageSection(TextSection):
    """The keys of a causal language model."""

    vocabulary: int = Field(256, ge=1, description="number of tokens; bytes need 256; a token store gives its own")


class _MixtureSection(LanguageSection, TransformerSection):
    """The keys of a causal language model whose MLPs may be mixtures of experts."""

    experts: int = Field(0, ge=0, description="experts of each MLP; 0: one MLP for all tokens")
    experts_per_token: int = Field(2, ge=1, description="experts that a token goes through")
    expert_balance: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="coefficient of the loss that balances the experts"
    )
    expert_balance_over: Literal["sequence", "microbatch"] = Field(
        "sequence",
        description="form this loss over the tokens of each sequence, the same for any microbatches, "
        "or over the tokens of each microbatch",
    )
    expert_z_loss: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="coefficient of the loss that keeps the router's logits small"
    )

    @model_validator(mode="after")
    def _experts_fit(self) -> _MixtureSection:
        if 0 < self.experts < self.experts_per_token:
            raise ValueError(f"experts_per_token={self.experts_per_token} must be at most experts={self.experts}")
        return self


class GPTSection(_MixtureSection):
    """GPT-2, which predicts the next byte of a text."""

    dropout: float = Field(0.0, ge=0, lt=1, description="rate at which elements are dropped")


class LlamaSection(_MixtureSection):
    """Llama, which predicts the next byte of a text: rotary positions, grouped queries and a gated MLP."""

    groups: int = Field(2, ge=1, description="groups of heads that share keys and values; must divide heads")
    inner: int = Field(352, ge=1, description="width of the gated MLP; Llama has 8/3 x hidden")
    sliding_window: int | None = Field(
        None, ge=1, description="positions, up to its own, whose keys a query sees, as in Mistral; by default all"
    )
    theta: float = Field(10000.0, gt=0, allow_inf_nan=False, description="base of the rotary frequencies")


class CausalLanguage(Task):
    """The task that maps token ids ``[b, s]`` of a corpus to the logits ``[b, s, v]`` of the token after each.

    Parameters
    ----------
    config : Config
        Its model is a `LanguageSection`.
    parallelism : Parallelism
        The tensor mode on the grid of one stage.

    Notes
    -----
    The loss is the cross-entropy, a mean over all tokens, but where documents are kept apart not over the last of each
    document. A validation takes sequences that are spread evenly over the held-out text.
    """

    section = LanguageSection
    unit, per = "tokens", "token"

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        super().__init__(config, parallelism)
        assert isinstance(config.model, LanguageSection)
        self.context, training = config.model.context, config.training
        d = config.data
        self.corpus = data.read_corpus(
            d.files,
            d.validation,
            self.context,
            self.grid,
            d.format,
            d.dtype,
            separate=d.documents == "separate",
            end=d.end_token,
        )
        vocabulary = config.model.vocabulary
        data.require_vocabulary(self.corpus, vocabulary, f"model.vocabulary={vocabulary}: give it that many")
        self.model, _ = make_model(config, parallelism, positions=self.context)
        self.name, self.cross_entropy = type(self.model).__name__, CrossEntropy(parallelism)
        self.length, self.per_sample, self.held = self.context, self.context, training.evaluate_batches * training.batch
        self.about, self.tokenizer = self.corpus.about, self.corpus.tokenizer.text
        self.digest = self.corpus.digest

    @classmethod
    def complete(cls, config: Config) -> Config:
        section = config.model
        assert isinstance(section, LanguageSection)
        if "vocabulary" in section.model_fields_set:
            return config
        vocabulary = data.stored_vocabulary(config.data.files, section.vocabulary)
        return config.model_copy(update={"model": section.model_copy(update={"vocabulary": vocabulary})})

    def batch(self, first: int, stop: int) -> Batch:
        starts = data.random_starts(first, stop, len(self.corpus.train), self.context, self.config.training.seed)
        return self._sequences(self.corpus.train, starts, self.corpus.train_starts)

    def weight(self, first: int, stop: int) -> float:
        starts = data.random_starts(first, stop, len(self.corpus.train), self.context, self.config.training.seed)
        return self._weight(starts, self.corpus.train_starts)

    def held_weight(self) -> float:
        starts = data.even_starts(self.held, len(self.corpus.validation), self.context)
        return self._weight(starts, self.corpus.validation_starts)

    def _weight(self, starts: np.ndarray, documents: np.ndarray | None) -> float:
        foreign = 0 if documents is None else data.foreign_labels(documents, starts, self.context)
        return (len(starts) * self.context - foreign) / self.context

    def _sequences(self, tokens: data.Tokens, starts: np.ndarray, documents: np.ndarray | None) -> Batch:
        layout = self.parallelism.tokens()
        found = None if documents is None else data.documents_of(documents, starts, self.context + 1)
        own = None if found is None else found[:, :-1]
        order = self.parallelism.order(self.context, own)
        arrays = data.sequences(tokens, starts, self.context, self.grid, layout, order, found)
        return Batch(*arrays, {"order": order, "documents": own})

    def held_out(self) -> Iterator[Batch]:
        starts = data.even_starts(self.held, len(self.corpus.validation), self.context)
        for part in np.split(starts, self.config.training.evaluate_batches):
            yield self._sequences(self.corpus.validation, part, self.corpus.validation_starts)

    def loss(self, outputs: DistArray, labels: DistArray, samples: float) -> tuple[float, Any]:
        return self.cross_entropy.forward(outputs, labels, max(1, round(samples * self.context)))

    def backward(self, saved: Any, scale: float = 1.0) -> DistArray:
        return self.cross_entropy.backward(saved, scale)

    def sample(self, count: int) -> bytes:
        return self.generate(PROMPT, count)

    def generate(self, prompt: bytes, count: int, temperature: float = 0.8) -> bytes:
        """Return a prompt and its continuation, the same on any grid up to rounding.

        Parameters
        ----------
        prompt : bytes
            Text in UTF-8.
        count : int
            Number of tokens to draw.
        temperature : float
            Divides the logits before the softmax.

        Returns
        -------
        bytes
            The whole text, on all ranks.
        """
        words = self.corpus.tokenizer
        tokens = words.encode([prompt])[0].tolist()
        options: dict[str, Any] = {
            "temperature": temperature,
            "seed": self.config.training.seed,
            "vocabulary": self.corpus.vocabulary,
        }
        drawn = generate(self.model, [tokens], count, **options, pipeline=self.pipeline)
        return words.decode([*tokens, *drawn[0]], special=True)  # it may run on into another document


register_task("language", CausalLanguage)
register_section("gpt", GPTSection)
register_section("llama", LlamaSection)
