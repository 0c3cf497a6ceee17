"""The command line of a program of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from colossal_mpi.apps.config import parse_grid
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_rank, world_size
from colossal_mpi.layers import Parallelism


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; {self.format_usage().strip()}")

    def print_help(self, file: Any = None) -> None:
        if world_rank() == 0:
            super().print_help(file)


def from_command_line(
    arguments: Sequence[str] | None = None, **defaults: str | int | float
) -> tuple[Parallelism, argparse.Namespace]:
    """Return the parallelism that ``--grid`` and ``--tensor`` ask for, and the values of a program's own options.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.
    **defaults
        The program's options, as ``steps=100`` for ``--steps``; values have the types of their defaults.

    Raises
    ------
    ConfigError
        If an argument is unknown or its value is of another type.
    GridError
        If the axes of ``--grid`` do not multiply to the number of ranks or ``--tensor`` does not use them.

    Notes
    -----
    Without ``--grid`` all ranks share the batch (``data``). **Communication:** one grid is made.

    Examples
    --------
    >>> p, options = from_command_line(steps=100)
    """
    parser = _Parser(allow_abbrev=False)
    parser.add_argument("--grid", help="axes, outermost first: data=2,row=2,col=2")
    parser.add_argument("--tensor", default="none", help="none, 1d, 2d, 2.5d or 3d")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, type=type(value), help=f"[{value}]")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    axes = parse_grid(options.grid) if options.grid else {"data": world_size()}
    return Parallelism(Grid(None, "auto", **axes), options.tensor), options
