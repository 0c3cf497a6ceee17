"""The agreement of ranks on what all of them must have alike: the package, the axes of a grid, a configuration.

`colossal_mpi.grid` and the training runs of ``apps`` call `require_equal` before their first communication. Ranks that
differ would exchange messages that do not belong together: they would hang, or compute something wrong in silence.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colossal_mpi.errors import ColossalError

_SOURCES = (".py", ".toml")


@functools.cache
def fingerprint() -> str:
    """Return a hash of the source files of the installed package, the same for equal files wherever they lie.

    Returns
    -------
    str
        Twelve hexadecimal digits.
    """
    root, found = str(Path(__file__).parents[1]), hashlib.blake2b(digest_size=6)
    for folder, folders, names in os.walk(root, followlinks=True):  # a checkout has links to apps, layers and linalg
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(name for name in names if name.endswith(_SOURCES)):
            path = os.path.join(folder, name)
            found.update(os.path.relpath(path, root).encode())
            with open(path, "rb") as source:
                found.update(source.read())
    return found.hexdigest()


def require_equal(
    comm: Any, facts: Mapping[str, object], kind: type[ColossalError], what: str, remedy: str = "start all ranks alike"
) -> None:
    """Check that all ranks of a communicator have the same facts, and the same files of the package.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The communicator; with one rank nothing is checked.
    facts : mapping of str to object
        The facts by name. Their ``repr`` is compared.
    kind : type
        The type of the error.
    what : str
        The thing that the facts describe, as the error begins.
    remedy : str
        What would work, as the error ends.

    Raises
    ------
    ColossalError
        An error of type `kind` on all ranks, which names the first fact that differs and the first two ranks that have
        it otherwise.

    Notes
    -----
    **Communication:** an allgather of 16 bytes of each rank; where they differ, also one of the facts.
    """
    if comm.Get_size() == 1:
        return
    own = {"the files of colossal_mpi": fingerprint(), **{name: repr(value) for name, value in facts.items()}}
    digest = hashlib.blake2b(repr(sorted(own.items())).encode(), digest_size=16).digest()
    every = bytearray(16 * comm.Get_size())
    comm.Allgather(digest, every)
    if bytes(every) == digest * comm.Get_size():
        return
    own["the files of colossal_mpi"] += f" in {Path(__file__).parents[1]}"
    ranks: list[dict[str, str]] = comm.allgather(own)
    for name in dict.fromkeys(name for of_rank in ranks for name in of_rank):
        values = [of_rank.get(name, "nothing") for of_rank in ranks]
        files = name == "the files of colossal_mpi"
        compared = [value.partition(" ")[0] for value in values] if files else values
        other = next((rank for rank, value in enumerate(compared) if value != compared[0]), None)
        if other is not None:
            raise kind(
                f"{what}: ranks 0 and {other} differ in {name}: "
                f"{values[0]} on rank 0, {values[other]} on rank {other}; "
                + ("install one version on all nodes" if files else remedy)
            )
