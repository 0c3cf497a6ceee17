"""The weights of a model from a Hugging Face directory and back: one mapping, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from colossal_mpi.errors import CheckpointError
from colossal_mpi.layers.models.huggingface.architecture import Architecture
from colossal_mpi.layers.models.huggingface.axes import Entry, Piece
from colossal_mpi.layers.models.huggingface.sink import Sink, Tensors
from colossal_mpi.layers.models.huggingface.source import Source
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Box, box_shape, slices
from colossal_mpi.platform import backend
from colossal_mpi.redistribution import gather

Pairs = list[tuple[Parameter, Entry]]


def pair(parameters: Sequence[Parameter], layers: int, architecture: Architecture) -> Pairs:
    """Return each parameter with its entry, that of its name and number of dims.

    Raises
    ------
    CheckpointError
        If the architecture has no place for one.
    """
    entries = {(entry.ours, len(entry.letters)): entry for entry in architecture.named(layers)}
    keys = [(parameter.name, parameter.value.ndim) for parameter in parameters]
    homeless = [name for name, ndim in keys if (name, ndim) not in entries]
    if homeless:
        raise CheckpointError(f"a {architecture.name} of Hugging Face has no place for {', '.join(homeless[:3])}")
    return [(parameter, entries[key]) for parameter, key in zip(parameters, keys, strict=True)]


def read(source: Source, pairs: Pairs, architecture: Architecture) -> None:
    """Fill the parameters: each rank reads the bytes of its own blocks, and nothing else but the files' headers.

    Raises
    ------
    CheckpointError
        Before any weight is touched, if a tensor is missing, of another shape, or one that the model has no place for;
        later, if weights that are tied differ.
    """
    names = _match(source, pairs, architecture)
    for parameter, entry in pairs:
        value = parameter.value
        block = np.empty(box_shape(value.box), backend.numpy_dtype(value.dtype))
        for piece in entry.pieces(value.shape, value.box):
            values = source.read(names[piece.name], piece.theirs)
            _compare(source, architecture.twins.get(piece.name), names, piece, values)
            block[slices(piece.ours, value.box)] = piece.from_theirs(values)
        value.local[...] = backend.to_block(block, value.local)


def _compare(source: Source, twin: str | None, names: dict[str, str], piece: Piece, values: np.ndarray) -> None:
    """Require of a tensor that stands there twice that it is twice the same."""
    if twin is None or twin in names or twin not in source:
        return
    if not np.array_equal(source.read(twin, piece.theirs), values):
        raise CheckpointError(
            f"{source.directory}: {twin} is not {piece.name}, to which tie_word_embeddings ties it: if it is meant "
            "to be another, make that false in config.json"
        )


def _match(source: Source, pairs: Pairs, architecture: Architecture) -> dict[str, str]:
    """Return the name in the directory of each tensor that is needed, all of them of the right shape."""
    needed = [theirs for _, entry in pairs for theirs in entry.theirs]
    found = {name: [known for known in architecture.spellings(name) if known in source] for name in needed}
    missing, used = [name for name in needed if not found[name]], {name for names in found.values() for name in names}
    surplus = [name for name in source if name not in used and not architecture.is_passed(name)]
    if missing or surplus:
        raise CheckpointError(
            f"{source.directory} does not hold a {architecture.classes[0]} of its configuration: it lacks "
            f"{', '.join(missing[:3]) or 'nothing'} and has {', '.join(surplus[:3]) or 'nothing'} besides"
        )
    names = {name: known[0] for name, known in found.items()}
    for parameter, entry in pairs:
        want = entry.shape(parameter.value.shape)
        for name in (names[theirs] for theirs in entry.theirs):
            if source.shape(name) != want:
                raise CheckpointError(
                    f"{source.directory}: {name} is of shape {source.shape(name)}; its configuration makes it {want}"
                )
            source.dtype(name)
    return names


def tensors(pairs: Pairs) -> Tensors:
    """Return shape and dtype of every tensor that holds the parameters."""
    return {
        name: (entry.shape(parameter.value.shape), backend.numpy_dtype(parameter.value.dtype))
        for parameter, entry in pairs
        for name in entry.theirs
    }


def write(sink: Sink | None, pairs: Pairs) -> Exception | None:
    """Bring all parameters to rank 0, which has the `sink`, and write them; return what went wrong there.

    **Communication:** `stream.to_root` of each parameter.
    """
    failures = [gather.to_root(parameter.value, _putter(sink, parameter, entry)) for parameter, entry in pairs]
    return next((failure for failure in failures if failure is not None), None)


def _putter(sink: Sink | None, parameter: Parameter, entry: Entry) -> Callable[[Box, np.ndarray], None]:
    def put(box: Box, values: np.ndarray) -> None:
        assert sink is not None
        for piece in entry.pieces(parameter.value.shape, box):
            sink.write(piece.name, piece.theirs, piece.to_theirs(values[slices(piece.ours, box)]))

    return put
