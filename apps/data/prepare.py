"""Make token stores from texts of any size, and show what a store holds.

The commands ``data prepare`` and ``data inspect`` call it. It takes the pieces of ``texts``, encodes them with a
tokenizer and writes them with ``store``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from colossal_mpi.apps.data.formats import Format, recognize
from colossal_mpi.apps.data.store import Store, Writer
from colossal_mpi.apps.data.texts import PIECE, Piece, pieces
from colossal_mpi.apps.data.tokenizer import Subwords, Tokenizer, load_tokenizer
from colossal_mpi.apps.text import binary
from colossal_mpi.errors import ConfigError

_MOST = 1000
"""Pieces of text that are encoded together."""


def write_store(
    inputs: Sequence[Path], out: Path, name: str, end: str | None, key: str, overwrite: bool, choice: str = "auto"
) -> None:
    """Write a token store.

    A file is a document; in a file of JSON lines each line is one. Texts are read in pieces, so that no file needs to
    fit into memory; a tokenizer of subwords gets pieces that begin with a line.

    Parameters
    ----------
    inputs : sequence of Path
        The texts.
    out : Path
        The store to write.
    name : str
        ``bytes``, or a JSON file of the package tokenizers.
    end : str, optional
        A token of the tokenizer that is put after each document; for bytes, any text.
    key : str
        The key of the text in a line of JSON.
    overwrite : bool
        Whether to replace `out`.
    choice : str
        ``text`` or ``jsonl`` where the inputs are to be taken as such; ``auto`` goes by name and content.

    Raises
    ------
    ConfigError
        If an input cannot be read or is no text, `out` exists or cannot be written, or `end` is no token.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists: replace it with --overwrite, or choose another name")
    formats = [_text_format(path, choice) for path in inputs]
    sizes = [path.stat().st_size for path in inputs]
    encoder = load_tokenizer(name)
    last = _end(encoder, end)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Writer(out, encoder, [str(path) for path in inputs]) as writer, _progress() as bar:
            task = bar.add_task("tokens", total=sum(sizes), tokens=0)
            for path, kind in zip(inputs, formats, strict=True):
                for batch in _batches(pieces(path, kind, key)):
                    _add(writer, encoder, batch, last)
                    bar.update(task, advance=sum(taken for *_, taken in batch), tokens=writer.tokens)
    except OSError as problem:
        raise ConfigError(f"{out} cannot be written: {problem.strerror or problem}") from None
    console = Console(markup=False, soft_wrap=True, highlight=False)
    if encoder.ignored:
        console.print(f"{name} asks for {encoder.ignored}: switched off, the texts are stored whole")
    console.print(
        f"{out}: {writer.tokens:,} tokens of {writer.documents:,} documents, vocabulary {encoder.vocabulary:,}, "
        f"{binary(out.stat().st_size)} from {binary(sum(sizes))}",
    )


def _add(writer: Writer, encoder: Tokenizer, batch: Sequence[Piece], last: np.ndarray) -> None:
    for tokens, (_, ends, _) in zip(encoder.encode([text for text, *_ in batch]), batch, strict=True):
        writer.add(tokens)
        if ends:
            writer.add(last)
            writer.end()


def _batches(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces in batches; a tokenizer shares a batch among its threads."""
    batch: list[Piece] = []
    for piece in found:
        batch.append(piece)
        if len(batch) >= _MOST or sum(len(text) for text, *_ in batch) >= PIECE:
            yield batch
            batch = []
    if batch:
        yield batch


def _text_format(path: Path, choice: str) -> Format:
    found = recognize(path, choice)
    if not found.is_text:
        raise ConfigError(f"{path} holds tokens already: name it in data.files of a run, and prepare texts")
    return found


def _end(encoder: Tokenizer, end: str | None) -> np.ndarray:
    if end is None:
        return np.zeros(0, np.int64)
    if not isinstance(encoder, Subwords):
        return encoder.encode([end.encode()])[0]
    number = encoder.token(end)
    if number is None:
        raise ConfigError(f"--end {end!r}: the tokenizer {encoder.name} has no such token")
    return np.array([number], np.int64)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.fields[tokens]:,} tokens"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(markup=False, stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def show_store(path: Path, shown: int) -> None:
    """Print what a store holds, and the beginning of some documents.

    Parameters
    ----------
    path : Path
        The store.
    shown : int
        Number of tokens to show of each document; 0 shows no document.

    Raises
    ------
    ConfigError
        If the file is no store.
    """
    store, console = Store(path), Console(markup=False, soft_wrap=True, highlight=False)
    count = store.documents.shape[0]
    lengths: np.ndarray = np.diff(np.r_[0, store.documents[...]]) if count else np.zeros(1, np.int64)
    encoder = store.tokenizer
    lines = [
        f"{path}: {len(store):,} tokens ({store.dtype}), {binary(path.stat().st_size)}",
        f"documents   {count:,}, of {lengths.min():,} to {lengths.max():,} tokens, median {np.median(lengths):,.0f}",
        f"vocabulary  {store.vocabulary:,}, tokenizer {store.name}",
        f"sources     {', '.join(store.sources[:5])}{', ...' if len(store.sources) > 5 else ''}",
    ]
    console.print("\n".join(lines))
    for number in np.unique(np.linspace(0, count - 1, min(count, 3)).astype(int)) if shown and count else []:
        text = encoder.decode(store.document(number, shown), special=True).decode(errors="replace")
        console.print(f"\ndocument {number}", style="bold")
        console.print(text)
