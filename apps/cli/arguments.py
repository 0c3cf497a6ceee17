"""The command line of a user's own program: ``--grid``, ``--tensor`` and the options of the program.

`colossal_mpi.apps.examples` and the programs of the guides call `from_command_line`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from colossal_mpi.apps.config import parse_grid
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_rank, world_size
from colossal_mpi.layers import MODES, Parallelism


class _Parser(argparse.ArgumentParser):
    """A parser that raises the errors of the library, and prints its help on rank 0 only."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; {self.format_usage().strip()}")

    def print_help(self, file: Any = None) -> None:
        if world_rank() == 0:
            super().print_help(file)


def from_command_line(
    arguments: Sequence[str] | None = None, **defaults: str | int | float
) -> tuple[Parallelism, argparse.Namespace]:
    """Return the parallelism that ``--grid`` and ``--tensor`` ask for, and the options of the program.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words to parse; by default the arguments of the process.
    **defaults : str, int or float
        The options of the program with their defaults: ``steps=100`` for ``--steps``. A value has the type of its
        default.

    Returns
    -------
    parallelism : Parallelism
        The grid of all ranks and the tensor mode. Without ``--grid`` all ranks share the batch (axis ``data``).
    options : argparse.Namespace
        The values of the options, by name.

    Raises
    ------
    ConfigError
        If an argument is unknown or its value has another type.
    GridError
        If the product of the axes of ``--grid`` is not the number of ranks, or ``--tensor`` does not use the axes.

    Notes
    -----
    **Communication:** the communicators of one grid are made, over all ranks.

    Examples
    --------
    >>> p, options = from_command_line(steps=100)
    """
    parser = _Parser(allow_abbrev=False)
    parser.add_argument("--grid", help="axes of the grid, outermost first: data=2,row=2,col=2")
    parser.add_argument("--tensor", default="none", help=f"tensor mode: {', '.join(MODES)}")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, type=type(value), help=f"[{value}]")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    axes = parse_grid(options.grid) if options.grid else {"data": world_size()}
    return Parallelism(Grid(None, "auto", **axes), options.tensor), options
