"""``colossal-mpi data``: write a token store, and look at one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from colossal_mpi.apps.command import Command
from colossal_mpi.apps.data import FORMATS, show_store, write_store
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import world_rank


@dataclass(frozen=True, kw_only=True)
class Prepare(Command):
    """Write the tokens of texts of any size to a store, which data.files takes."""

    example = "colossal-mpi data prepare --tokenizer gpt2.json *.txt corpus.h5"

    files: Annotated[
        list[Path],
        typer.Argument(help="INPUT... OUT.h5: texts or .jsonl files with one document per line, also packed (.gz)."),
    ]
    tokenizer: Annotated[str, typer.Option(help="bytes, or a JSON file of the package tokenizers.")] = "bytes"
    end: Annotated[str | None, typer.Option(help="Put this token (with bytes: this text) behind each document.")] = None
    key: Annotated[str, typer.Option(help="The key of the text in a line of .jsonl.")] = "text"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.h5.")] = False
    format: Annotated[
        str, typer.Option(help="What the inputs are: auto (by name and content), text (any bytes) or jsonl.")
    ] = "auto"

    def __post_init__(self) -> None:
        if len(self.files) < 2 or self.files[-1].suffix != ".h5":
            raise ConfigError("data prepare: give one or more inputs and then a store to write, which ends in .h5")
        if self.format not in FORMATS:
            raise ConfigError(f"--format {self.format}: it must be one of {', '.join(FORMATS)}")

    def run(self) -> int:
        if world_rank() == 0:  # the ranks of a job must not write one file
            inputs, out = self.files[:-1], self.files[-1]
            write_store(inputs, out, self.tokenizer, self.end, self.key, self.overwrite, self.format)
        return 0


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Show the tokens, documents, vocabulary and some text of a store."""

    example = "colossal-mpi data inspect corpus.h5"

    store: Annotated[Path, typer.Argument(help="A token store.")]
    shown: Annotated[int, typer.Option("--tokens", help="Number of tokens to show as text, from some documents.")] = 60

    def run(self) -> int:
        if world_rank() == 0:
            show_store(self.store, self.shown)
        return 0
