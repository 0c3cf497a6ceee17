"""Continue sequences of tokens by a causal model, on any grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi.distarray import from_global
from colossal_mpi.errors import ColossalError, OptionError, ShapeError
from colossal_mpi.layers.head import pick
from colossal_mpi.layers.inference.kv_cache import KeyValues
from colossal_mpi.layers.inference.sampling import NONE, Sampling, draw
from colossal_mpi.layers.layer import Context, Layer
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
    model : GPT, Llama or another causal model
        Of token ids ``[b, s]`` to logits ``[b, s, v]``, on any grid, in any mode.
    prompts : sequence of sequences of int
        b of them, the same on all ranks, each of one token or more; of any lengths, and fewer than ranks if so.
    count : int
    temperature, top_k, top_p, seed, vocabulary
        As `Sampling` takes them: greedy at temperature 0. The random number of a token is a function of the seed, the
        number of its prompt and its position, so that a text is the same on any grid and beside any other prompts, but
        for rounding: see `draw`.
    stop : int or ints
        A text ends with the first of these tokens.
    window : int, optional
        Tokens that the model sees at most; by default the positions of its configuration. A text that has outgrown it
        goes on with the last half of it.
    cached : bool
        Keep keys and values (`KeyValues`). False does the whole text anew for each token: slow, and a check.
    pipeline : Pipeline, optional
        That of the model, where it is cut into stages.

    Raises
    ------
    OptionError
        If a number is out of its range, or the window is larger than the positions of the model.
    ShapeError
        If a prompt is empty, or has a token that is none of the vocabulary.
    ColossalError
        If logits are no numbers.

    Notes
    -----
    Prompts are padded at their ends: a token stands at its position, and keys of padding, which have later positions
    than any query that counts, are never seen. Of the head, the last token of each text alone is done.

    **Communication:** for each token that of a forward pass of b tokens, that of `draw`, and b words to every rank;
    with ``pipe`` the stream of b tokens once over each border. Nothing that is ``[b, s, v]`` is ever gathered.

    Examples
    --------
    >>> generate(model, [list(b"The "), list(b"An integer")], 100, temperature=0.8, top_p=0.95, stop=10)
    """
    config = getattr(model, "config", None)
    known = getattr(config, "positions", None)
    window = known if window is None else window
    if count < 0 or (window is not None and not 1 <= window <= (known or window)):
        raise OptionError(f"generate: count={count}, window={window} of {known} positions: 0 or more, from 1 to these")
    _check(prompts, getattr(config, "vocabulary", None))
    sampling = Sampling(temperature, top_k, top_p, seed, vocabulary)
    texts = _Texts(prompts, {stop} if isinstance(stop, int) else set(stop), window)
    passes, cache = _Passes(model, pipeline, sampling), None
    for made in range(count):
        if texts.done:  # all at once, where there are none
            break
        if texts.forget() or not cached or not made:
            cache = KeyValues(texts.room(count - made)) if cached else None
            ids, context = texts.contexts(), Context(train=False, kv_cache=cache, wanted=texts.sizes() - 1)
        else:
            ids, context = texts.last(), Context(train=False, kv_cache=cache, positions=texts.sizes()[:, None] - 1)
        texts.append(passes.next(ids, context, texts.lengths()))
    return texts.made()


def _check(prompts: Sequence[Sequence[int]], vocabulary: int | None) -> None:
    for i, prompt in enumerate(prompts):
        least, most = (min(prompt), max(prompt)) if len(prompt) else (NONE, NONE)
        if least < 0 or (vocabulary is not None and most >= vocabulary):
            kinds = "" if vocabulary is None else f", all below {vocabulary}"
            raise ShapeError(
                f"generate: prompt {i} has {len(prompt)} tokens from {least} to {most}: it must have one or more, "
                f"from 0 on{kinds}"
            )


class _Texts:
    """Prompts and what has been drawn after them, and from where on the model sees each."""

    def __init__(self, prompts: Sequence[Sequence[int]], stop: set[int], window: int | None) -> None:
        self.tokens = [[int(token) for token in prompt] for prompt in prompts]
        self.stop, self.window = stop, window
        self.prompts, self.start = self.lengths(), np.zeros(len(self.tokens), np.int64)
        self.running = np.ones(len(self.tokens), bool)

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return not self.running.any()

    def lengths(self) -> np.ndarray:
        """Return the numbers of tokens ``[b]``."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    def sizes(self) -> np.ndarray:
        """Return how many of them the model sees."""
        return self.lengths() - self.start

    def forget(self) -> bool:
        """Let go of the beginning of texts that have outgrown the window; say whether there are any."""
        if self.window is None:
            return False
        grown = self.sizes() > self.window  # of those that have ended, too: they are carried along
        self.start = np.where(grown, self.lengths() - max(1, self.window // 2), self.start)
        return bool(grown.any())

    def room(self, count: int) -> int:
        """Return how many slots it takes until `count` more tokens are drawn, or a text is to be cut."""
        most = int(self.sizes().max()) + count - 1
        return most if self.window is None else min(most, self.window)

    def contexts(self) -> np.ndarray:
        """Return what the model sees of each, ``[b, s]``, padded at the end."""
        ids = np.zeros((len(self.tokens), int(self.sizes().max())), np.int64)
        for row, tokens, start in zip(ids, self.tokens, self.start, strict=True):
            row[: len(tokens) - start] = tokens[start:]
        return ids

    def last(self) -> np.ndarray:
        """Return the last token of each, ``[b, 1]``."""
        return np.array([[tokens[-1]] for tokens in self.tokens], np.int64)

    def append(self, drawn: np.ndarray) -> None:
        """Add a token to each that has not ended."""
        for i in np.flatnonzero(self.running):
            self.tokens[i].append(int(drawn[i]))
            self.running[i] = int(drawn[i]) not in self.stop

    def made(self) -> list[list[int]]:
        """Return what has been drawn."""
        return [tokens[n:] for tokens, n in zip(self.tokens, self.prompts, strict=True)]


class _Passes:
    """Forward passes of a model, each to one more token of every text."""

    def __init__(self, model: Layer, pipeline: Pipeline | None, sampling: Sampling) -> None:
        self.model, self.pipeline, self.sampling = model, pipeline, sampling
        first = next(iter(model.parameters() if pipeline is None else pipeline.parameters()))
        self.parallelism, self.dtype = first.parallelism, first.value.dtype

    def next(self, ids: np.ndarray, context: Context, lengths: np.ndarray) -> np.ndarray:
        """Return the token at position `lengths` of each text, on all ranks."""
        place = self.parallelism
        x = from_global(ids, place.grid, place.tokens())
        y = self.model.forward(x, context)[0] if self.pipeline is None else self._through(x, context)
        tokens = None if y is None else self._drawn(y, context, lengths)
        tokens = self._everywhere(tokens, len(ids))
        if (tokens == NONE).any():
            lost = ", ".join(map(str, np.flatnonzero(tokens == NONE)))
            raise ColossalError(f"generate: the logits after text {lost} are no numbers: are the weights?")
        return tokens

    def _everywhere(self, tokens: np.ndarray | None, count: int) -> np.ndarray:
        """Return the tokens of the last stage on all stages."""
        if self.pipeline is not None and self.pipeline.stages > 1:
            own = self.parallelism.grid.own(np.zeros(count, np.int64) if tokens is None else tokens)
            tokens = backend.to_host(comm.bcast(own, self.pipeline.grid, (PIPE,), self.pipeline.stages - 1))
        assert tokens is not None
        return tokens

    def _through(self, x: Any, context: Context) -> Any:
        assert self.pipeline is not None
        hidden = self.model.config.hidden  # type: ignore[attr-defined]
        border = (*x.shape, hidden), self.parallelism.stream(), backend.numpy_dtype(self.dtype).name
        return self.pipeline.forward(x, context, border)

    def _drawn(self, y: Any, context: Context, lengths: np.ndarray) -> np.ndarray:
        if context.wanted is not None and y.shape[1] != 1:
            y = pick(y, context.wanted)  # of a model whose head does all
        tokens = draw(y, lengths[:, None], self.sampling).gather()
        assert tokens is not None
        return tokens[:, 0]
