"""The digest of the data of a run, by which a resumed run knows whether the data have changed.

`corpus` and `images` call `digest_of` on rank 0 when they read the data; checkpoints hold the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

WHOLE = 1 << 24
"""Greatest number of tokens on a disk that are all read for the digest."""
_STRETCHES, _STRETCH = 256, 4096
"""Of more tokens, this many stretches of this many tokens are read, spread evenly, with both ends among them."""
_AT_ONCE = 1 << 20


def digest_of(parts: Sequence[Any]) -> str:
    """Return a digest of sequences of tokens or arrays.

    Parameters
    ----------
    parts : sequence of Tokens or array
        The parts of the data, in order. An array in memory counts to its last byte. Of tokens on a disk the number
        counts, and the tokens themselves: all of up to `WHOLE`, of more 256 stretches of 4,096 tokens.

    Returns
    -------
    str
        A SHA-256 in hexadecimal digits.

    Examples
    --------
    >>> digest_of([np.arange(3)]) == digest_of([np.arange(4)])
    False
    """
    found = hashlib.sha256()
    for part in parts:
        in_memory = isinstance(part, np.ndarray) and not isinstance(part, np.memmap)
        found.update(f"{part.dtype.str} {part.shape} ".encode() if in_memory else f"{len(part)} ".encode())
        for piece in [np.ascontiguousarray(part)] if in_memory else _pieces(part):
            found.update(piece.data if piece.size else b"")
    return found.hexdigest()


def _pieces(tokens: Any) -> Iterator[np.ndarray]:
    """Yield the tokens that the digest of tokens on a disk covers."""
    count = len(tokens)
    whole = count <= WHOLE
    starts = range(0, count, _AT_ONCE) if whole else np.linspace(0, count - _STRETCH, _STRETCHES).astype(np.int64)
    length = _AT_ONCE if whole else _STRETCH
    for start in starts:
        yield tokens[np.arange(start, min(count, start + length))].astype("<i8")
