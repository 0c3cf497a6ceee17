"""The loop over new tokens: continue prompts by a causal model, on any grid.

`generate` runs the model, or its pipeline, on the tokens that the KV cache does not have, and lets ``sampling`` draw
the next token of each sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import ColossalError, OptionError, ShapeError
from colossal_mpi.layers.context import Context, Decoding
from colossal_mpi.layers.head import pick
from colossal_mpi.layers.inference.kv_cache import KVCache
from colossal_mpi.layers.inference.sampling import NO_TOKEN, Sampling, draw
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.pipeline import PIPE, Pipeline
from colossal_mpi.platform import backend


def generate(
    model: Layer,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | Iterable[int] = (),
    vocabulary: int | None = None,
    window: int | None = None,
    cached: bool = True,
    pipeline: Pipeline | None = None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt, at most `count`, the same on all ranks.

    Parameters
    ----------
    model : Layer
        Causal model, such as a GPT or a Llama, from token ids ``[b, s]`` to logits ``[b, s, v]``, on any grid and in
        any tensor mode.
    prompts : sequence of sequences of int
        Prompts, b of them, each of one token or more, the same on all ranks. Their lengths may differ, and there may be
        fewer of them than ranks.
    count : int
        Greatest number of new tokens for each prompt.
    temperature : float
        Divisor of the logits. 0 takes the greatest logit.
    top_k : int, optional
        Draw from the k greatest logits alone.
    top_p : float
        Draw from the fewest tokens whose probabilities add up to it.
    seed : int
        Seed of the random numbers. The random number of a token is a function of the seed, the number of its prompt and
        its position, so that the tokens are the same on any grid and beside any other prompts, up to rounding (`draw`).
    stop : int or iterable of int
        Tokens with which a sequence ends.
    vocabulary : int, optional
        Tokens from this number on are never drawn.
    window : int, optional
        Greatest number of tokens that the model sees; by default the positions of its configuration. A sequence that
        outgrows the window goes on with the last half of it.
    cached : bool
        Keep keys and values in a `KVCache`. False runs the model on the whole sequence for each token, which is slow
        and serves as a check.
    pipeline : Pipeline, optional
        The pipeline of the model, if it is cut into stages.

    Returns
    -------
    list of list of int
        New tokens of each prompt, a stop token included.

    Raises
    ------
    OptionError
        If a number is out of its range, or the window is larger than the positions of the model.
    ShapeError
        If a prompt is empty, or has a token outside the vocabulary.
    ColossalError
        If logits are not numbers.

    Notes
    -----
    Prompts are padded at their ends. A token stands at its position, and no query that counts sees the keys of padding,
    because their positions are later. The head computes the logits of the last token of each sequence alone.

    **Communication:** for each new token, the collectives of a forward pass of b tokens and of `draw`, and an allgather
    that gives every rank b words; with an axis ``pipe`` the activation of b tokens also crosses each border between
    chunks once. No rank ever holds logits ``[b, s, v]`` of other ranks.

    References
    ----------
    Pope et al.: Efficiently scaling transformer inference, 2022.

    Examples
    --------
    >>> generate(model, [list(b"The "), list(b"An integer")], 100, temperature=0.8, top_p=0.95, stop=10)
    """
    config = getattr(model, "config", None)
    positions = getattr(config, "positions", None)
    window = positions if window is None else window
    if count < 0 or (window is not None and not 1 <= window <= (positions or window)):
        raise OptionError(
            f"generate: count={count}, window={window} of {positions} positions: 0 or more, from 1 to these"
        )
    _require_tokens(prompts, getattr(config, "vocabulary", None))
    sampling = Sampling(temperature, top_k, top_p, seed, vocabulary)
    sequences = _Sequences(prompts, {stop} if isinstance(stop, int) else set(stop), window)
    decoder, cache = _Decoder(model, pipeline, sampling), None
    for new in range(count):
        if sequences.done:  # at once, if there are no prompts
            break
        if sequences.truncate() or not cached or not new:
            cache = KVCache(sequences.capacity(count - new)) if cached else None
            ids, context = sequences.visible(), Context(train=False, decoding=Decoding(cache, sequences.sizes() - 1))
        else:
            at = sequences.sizes()[:, None] - 1
            ids, context = sequences.last(), Context(train=False, positions=at, decoding=Decoding(cache))
        sequences.append(decoder.next_tokens(ids, context, sequences.lengths()))
    return sequences.continuations()


def _require_tokens(prompts: Sequence[Sequence[int]], vocabulary: int | None) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ShapeError(f"generate: prompt {i} is empty: it must have one token or more")
        least, most = min(prompt), max(prompt)
        if least < 0 or (vocabulary is not None and most >= vocabulary):
            below = "" if vocabulary is None else f", all below {vocabulary}"
            raise ShapeError(
                f"generate: prompt {i} has {len(prompt)} tokens from {least} to {most}: they must be from 0 on{below}"
            )


class _Sequences:
    """Prompts with the tokens drawn after them, and the index of the first token of each that the model sees."""

    def __init__(self, prompts: Sequence[Sequence[int]], stop: set[int], window: int | None) -> None:
        self.tokens = [[int(token) for token in prompt] for prompt in prompts]
        self.stop, self.window = stop, window
        self.prompt_lengths, self.start = self.lengths(), np.zeros(len(self.tokens), np.int64)
        self.running = np.ones(len(self.tokens), bool)

    @property
    def done(self) -> bool:
        """True if every sequence has ended."""
        return not self.running.any()

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each sequence, ``[b]``."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    def sizes(self) -> np.ndarray:
        """Return how many tokens of each sequence the model sees, ``[b]``."""
        return self.lengths() - self.start

    def truncate(self) -> bool:
        """Drop the beginning of sequences that have outgrown the window, and return True if there are any."""
        if self.window is None:
            return False
        grown = self.sizes() > self.window  # sequences that have ended stay in the batch and are truncated, too
        self.start = np.where(grown, self.lengths() - max(1, self.window // 2), self.start)
        return bool(grown.any())

    def capacity(self, count: int) -> int:
        """Return how many slots a KV cache needs until `count` more tokens are drawn, or a sequence is truncated."""
        most = int(self.sizes().max()) + count - 1
        return most if self.window is None else min(most, self.window)

    def visible(self) -> np.ndarray:
        """Return the tokens that the model sees, ``[b, s]``, padded at the end."""
        ids = np.zeros((len(self.tokens), int(self.sizes().max())), np.int64)
        for row, tokens, start in zip(ids, self.tokens, self.start, strict=True):
            row[: len(tokens) - start] = tokens[start:]
        return ids

    def last(self) -> np.ndarray:
        """Return the last token of each sequence, ``[b, 1]``."""
        return np.array([[tokens[-1]] for tokens in self.tokens], np.int64)

    def append(self, drawn: np.ndarray) -> None:
        """Append a token to each sequence that has not ended."""
        for i in np.flatnonzero(self.running):
            self.tokens[i].append(int(drawn[i]))
            self.running[i] = int(drawn[i]) not in self.stop

    def continuations(self) -> list[list[int]]:
        """Return the tokens after each prompt."""
        return [tokens[n:] for tokens, n in zip(self.tokens, self.prompt_lengths, strict=True)]


class _Decoder:
    """Forward passes of a model, each of which gives one more token of every sequence."""

    def __init__(self, model: Layer, pipeline: Pipeline | None, sampling: Sampling) -> None:
        self.model, self.pipeline, self.sampling = model, pipeline, sampling
        first = next(iter(model.parameters() if pipeline is None else pipeline.parameters()))
        self.parallelism, self.dtype = first.parallelism, first.value.dtype

    def next_tokens(self, ids: np.ndarray, context: Context, lengths: np.ndarray) -> np.ndarray:
        """Return the token at position `lengths` of each sequence, ``[b]``, on all ranks."""
        p = self.parallelism
        # ids[B, S] in NumPy on all ranks -> x[B_data, S_seq]: each rank takes its block
        x = from_global(ids, p.grid, p.tokens())
        logits = self.model.forward(x, context)[0] if self.pipeline is None else self._pipelined(x, context)
        tokens = self._on_all_stages(None if logits is None else self._drawn(logits, context, lengths), len(ids))
        if (tokens == NO_TOKEN).any():
            broken = ", ".join(map(str, np.flatnonzero(tokens == NO_TOKEN)))
            raise ColossalError(f"generate: the logits after prompt {broken} are not numbers: are the weights?")
        return tokens

    def _on_all_stages(self, tokens: np.ndarray | None, count: int) -> np.ndarray:
        """Return the tokens that the last stage has drawn on all stages."""
        if self.pipeline is not None and self.pipeline.stages > 1:
            own = self.parallelism.grid.to_block(np.zeros(count, np.int64) if tokens is None else tokens)
            # tokens[B] on the last stage -> tokens[B] on all stages: bcast over pipe
            tokens = backend.to_host(comm.bcast(own, self.pipeline.grid, (PIPE,), self.pipeline.stages - 1))
        assert tokens is not None
        return tokens

    def _pipelined(self, x: DistArray, context: Context) -> Any:
        """Return the logits on the last stage, None on the others."""
        assert self.pipeline is not None
        hidden = self.model.config.hidden  # type: ignore[attr-defined]
        spec = (*x.shape, hidden), self.parallelism.stream(), backend.numpy_dtype(self.dtype).name
        return self.pipeline.forward(x, context, spec)

    def _drawn(self, logits: DistArray, context: Context, lengths: np.ndarray) -> np.ndarray:
        """Return a token for each sequence, ``[b]``."""
        at = None if context.decoding is None else context.decoding.logits_at
        if at is not None and logits.shape[1] != 1:
            logits = pick(logits, at)  # the head of some models computes the logits of all tokens
        # tokens[B_data, 1] -> tokens[B, 1] on all ranks: allgather
        tokens = draw(logits, lengths[:, None], self.sampling).gather()
        assert tokens is not None
        return tokens[:, 0]
