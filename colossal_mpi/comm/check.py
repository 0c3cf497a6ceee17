"""The check that all ranks of a group make the same call, before the call moves data.

MPI does not see that two ranks make different calls: it waits for ever, or one rank takes the bytes of another call for
its own. Where calls are checked, each rank first sends the others of the group a record of its call: the operation,
the axes, shapes, layouts, dtype, root and reduction, and the line of the user's program. Ranks whose records differ
raise the same `MismatchError`, which names two of them and both lines.

`colossal_mpi.comm.collectives`, `colossal_mpi.comm.transport`, `colossal_mpi.redistribution` and ``linalg.contract``
describe their calls to `call` or `begin`, and what they call is part of that one call. Any two ranks exchange their
records in the order of the calls, whatever group and grid these belong to. A rank that skips a call, or makes it in
another group, thus meets the others with the record of its next call.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike

from colossal_mpi import grid as grids
from colossal_mpi import ledger
from colossal_mpi.errors import MismatchError
from colossal_mpi.grid import Grid, GridCache
from colossal_mpi.layout import Axes
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

VARIABLE = "COLOSSAL_MPI_CHECK"
"""The environment variable that has every call checked: 1 for yes."""
_HEAD = struct.Struct("<II")
_TEXT = 1000
"""Bytes of a record's text; of a longer one the checksum counts the rest."""
_SEPARATOR = "\x1f"
_PACKAGE = tuple(
    os.path.realpath(Path(__file__).parents[1] / folder) + os.sep for folder in ("", "apps", "layers", "linalg")
)
_INSTALLED = tuple(
    os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib", "platlib", "scripts")
)


class _State:
    """The state of the check: it is on or off, and this rank is inside `depth` checked calls."""

    on = os.environ.get(VARIABLE, "") not in ("", "0")
    depth = 0


def checking() -> bool:
    """Return whether calls are checked now."""
    return _State.on and not _State.depth


@contextmanager
def checked(on: bool = True) -> Iterator[None]:
    """Check the calls inside the context, or do not.

    Parameters
    ----------
    on : bool
        Whether calls are checked; the same on all ranks.

    Yields
    ------
    None
        The context.

    Notes
    -----
    **Communication:** none by itself. A checked call sends each rank of its group some hundred bytes, which the ledger
    does not count.

    Examples
    --------
    >>> with comm.checked():
    ...     C = A @ B
    """
    before, _State.on = _State.on, on
    try:
        yield
    finally:
        _State.on = before


class Call:
    """A call of this rank, whose record is on its way to the other ranks of the group.

    Parameters
    ----------
    record : bytes
        The record of this rank.
    grid : Grid
        The grid.
    axes : tuple of str
        The axes that span the group.
    """

    __slots__ = ("_axes", "_channel", "_grid", "_inbox", "_me", "_ranks", "_record", "_requests")

    def __init__(self, record: bytes, grid: Grid, axes: Axes) -> None:
        self._record, self._grid, self._axes = record, grid, axes
        self._channel, self._ranks, self._me = _members(grid, axes)
        others = self._others()
        room = _HEAD.size + _TEXT + 16 * MPI.COMM_WORLD.Get_size()  # the counts of any group of this job fit
        self._inbox = {i: bytearray(room) for i in others}
        tag = _tag()
        self._requests = [
            self._channel.Irecv([self._inbox[i], MPI.BYTE], source=self._ranks[i], tag=tag) for i in others
        ]
        self._requests += [self._channel.Isend([record, MPI.BYTE], dest=self._ranks[i], tag=tag) for i in others]

    def _others(self) -> list[int]:
        return [i for i in range(len(self._ranks)) if i != self._me]

    def end(self) -> None:
        """Wait for the records of the other ranks and compare them.

        Raises
        ------
        MismatchError
            If they differ, on all ranks of the group.
        """
        if not self._requests:
            return
        MPI.Request.Waitall(self._requests)
        self._requests = []
        own = self._record
        # A fact that differs changes the checksum in the head, and so do the counts' own places behind the text.
        if any(inbox[: _HEAD.size] != own[: _HEAD.size] for inbox in self._inbox.values()):
            self._refuse()
        length = _HEAD.unpack_from(own)[1]
        if len(own) > _HEAD.size + length:
            self._compare_counts(_HEAD.size + length)

    def done(self) -> bool:
        """Return whether all records are there, without waiting."""
        return not self._requests or MPI.Request.Testall(self._requests)

    def _compare_counts(self, at: int) -> None:
        """Compare what each rank sends to each other one with what that one expects."""
        size = len(self._ranks)
        records = [self._record if i == self._me else bytes(self._inbox[i]) for i in range(size)]
        counts = np.stack([np.frombuffer(record, "<i8", 2 * size, at).reshape(2, size) for record in records])
        wrong = np.argwhere(counts[:, 0] != counts[:, 1].T)
        if wrong.size:
            sender, to = (int(i) for i in wrong[0])
            raise MismatchError(
                f"{_fields(self._record)[0]}: rank {self._ranks[sender]} sends {counts[sender, 0, to]} elements to "
                f"rank {self._ranks[to]}, which expects {counts[to, 1, sender]}; "
                f"{self._line(records[sender], sender)}, {self._line(records[to], to)}"
            )

    def _line(self, record: bytes | bytearray, i: int) -> str:
        return f"rank {self._ranks[i]} at {_shown(_fields(record)[-1])}"

    def _refuse(self) -> None:
        records = [_fields(self._record if i == self._me else self._inbox[i]) for i in range(len(self._ranks))]
        if any(fields[1] != records[self._me][1] for fields in records):
            self._tell_others()
        first = records[0]
        other = next((i for i, fields in enumerate(records) if fields != first), 0)
        second, names = records[other], (self._ranks[0], self._ranks[other])
        calls = [f"rank {rank} calls {_sentence(fields)}" for rank, fields in zip(names, (first, second), strict=True)]
        remedy = "all ranks of a group must make the same calls in the same order"
        raise MismatchError(f"ranks {names[0]} and {names[1]} make different calls: {', '.join(calls)}; {remedy}")

    def _tell_others(self) -> None:
        """Send this rank's record to the ranks of the grid outside the group: they may wait for it in their group."""
        _, everyone, _ = _members(self._grid, tuple(self._grid.axes))
        for rank in set(everyone) - set(self._ranks):
            self._channel.Isend([self._record, MPI.BYTE], dest=rank, tag=_tag())


def _fields(record: bytes | bytearray) -> list[str]:
    length = _HEAD.unpack_from(record)[1]
    return bytes(record[_HEAD.size : _HEAD.size + length]).decode(errors="replace").split(_SEPARATOR)


def _sentence(fields: Sequence[str]) -> str:
    return f"{', '.join(fields[:-1])}, at {_shown(fields[-1])}"


def _shown(line: str) -> str:
    return line.rpartition(":")[0]


def _tag() -> int:
    # exits.py has the greatest tag. Only a receive with ANY_TAG on COMM_WORLD could take one of these messages.
    greatest: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    return int(greatest) - 1


_MEMBERS = GridCache[Axes, tuple[MPI.Intracomm, list[int], int]](limit=256)


def _members(grid: Grid, axes: Axes) -> tuple[MPI.Intracomm, list[int], int]:
    """Return a communicator of all grids, the ranks of a group in it, and this rank's place in the group."""

    def find() -> tuple[MPI.Intracomm, list[int], int]:
        ranks = np.arange(grid.size).reshape(list(grid.axes.values()))
        at = tuple(slice(None) if axis in axes else place for axis, place in grid.coords.items())
        group: list[int] = ranks[at].ravel().tolist()
        me, own = group.index(grid.rank), grid.comm(tuple(grid.axes))
        mine, world = own.Get_group(), MPI.COMM_WORLD.Get_group()
        there = list(MPI.Group.Translate_ranks(mine, group, world))
        mine.Free()
        world.Free()
        # Ranks of a spawned job are not in COMM_WORLD.
        return (own, group, me) if MPI.UNDEFINED in there else (MPI.COMM_WORLD, there, me)

    return _MEMBERS.get(grid, axes, find)


_lines: dict[tuple[CodeType, int], str | None] = {}


def _line() -> str:
    """Return file, line and column of the user's program from which this call came, else of its caller here."""
    frame, inner = sys._getframe(1), ""
    while True:
        key = (frame.f_code, frame.f_lasti)
        if key not in _lines:
            _lines[key] = _user_line(frame.f_code, frame.f_lasti, frame.f_lineno)
        line = _lines[key]
        if line is not None:
            return line
        if not inner and frame.f_code.co_filename not in _BELOW:
            inner = f"{frame.f_code.co_filename}:{frame.f_lineno}:0"
        if frame.f_back is None:
            return inner
        frame = frame.f_back


_BELOW = {*ledger.BELOW, __file__}


def _user_line(code: CodeType, lasti: int, lineno: int) -> str | None:
    """Return a line of the user's program; None for a line of this package or of an installed one."""
    name = code.co_filename
    if name.startswith("<frozen") or name == contextlib.__file__:
        return None
    if os.path.realpath(name).startswith((*_PACKAGE, *_INSTALLED)):
        return None
    column = next(islice(code.co_positions(), lasti // 2, None), (None,) * 4)[2]  # two calls may share a line
    return f"{name}:{lineno}:{column}"


def begin(
    op: str,
    grid: Grid,
    axes: Sequence[str],
    pieces: tuple[Sequence[int], Sequence[int]] | None = None,
    **facts: object,
) -> Call | None:
    """Send the record of a call to the other ranks of its group.

    Parameters
    ----------
    op : str
        The operation.
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    pieces : (sequence of int, sequence of int), optional
        The elements that this rank sends to each rank of the group, and those that it expects from each.
    **facts
        What must be the same on all ranks of the group, by name.

    Returns
    -------
    Call or None
        The call, whose `Call.end` compares the records; None if calls are not checked, or this rank is inside a checked
        call, or alone.
    """
    if not _State.on or _State.depth:
        return None
    return _begin(op, grid, axes, pieces, **facts)


def _begin(
    op: str,
    grid: Grid,
    axes: Sequence[str],
    pieces: tuple[Sequence[int], Sequence[int]] | None = None,
    **facts: object,
) -> Call | None:
    if grid.is_meta or grid.extent(axes) == 1:
        return None
    group = grid.ordered(axes)
    what = [f"{name} {_brief(value)}" for name, value in facts.items()]
    text = _SEPARATOR.join([op, f"over {','.join(group)} of {grid}", *what, _line()]).encode()
    checksum, shown = zlib.crc32(text), _cut(text)
    behind = b"" if pieces is None else np.array(pieces, "<i8").tobytes()
    return Call(_HEAD.pack(checksum, len(shown)) + shown + behind, grid, group)


def _cut(text: bytes) -> bytes:
    """Return a text that fits into a record; the line, at its end, stays whole."""
    if len(text) <= _TEXT:
        return text
    line = text[text.rindex(_SEPARATOR.encode()) :][-_TEXT // 2 :]
    return text[: _TEXT - len(line)] + line


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({zlib.crc32(text.encode()):08x})"


class _Checked:
    """The context of a checked call: it begins when the ranks have agreed, and what it calls is not checked."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call

    def __enter__(self) -> None:
        self._call.end()
        _State.depth += 1

    def __exit__(self, *_: object) -> None:
        _State.depth -= 1


_unchecked = nullcontext()


def call(
    op: str,
    grid: Grid,
    axes: Sequence[str],
    pieces: tuple[Sequence[int], Sequence[int]] | None = None,
    **facts: object,
) -> AbstractContextManager[None]:
    """Return the context of a call, which begins when all ranks of the group have turned out to make it.

    Parameters
    ----------
    op, grid, axes, pieces, **facts
        As for `begin`.

    Returns
    -------
    context manager
        The context, inside which nothing else is checked. Its beginning raises a `MismatchError` on all ranks of the
        group if their records differ.
    """
    begun = begin(op, grid, axes, pieces, **facts)
    return _unchecked if begun is None else _Checked(begun)


def agree(
    op: str,
    grid: Grid,
    axes: Sequence[str],
    pieces: tuple[Sequence[int], Sequence[int]] | None = None,
    **facts: object,
) -> None:
    """Check that all ranks of the group make this call, which calls nothing that is checked.

    Parameters
    ----------
    op, grid, axes, pieces, **facts
        As for `begin`.

    Raises
    ------
    MismatchError
        If the records of the ranks differ, on all ranks of the group.
    """
    begun = begin(op, grid, axes, pieces, **facts)
    if begun is not None:
        begun.end()


def checksum(values: ArrayLike | Block) -> int:
    """Return the CRC-32 of the elements of an array, by which ranks compare values.

    Parameters
    ----------
    values : array_like
        The array, of any library.

    Returns
    -------
    int
        The checksum.
    """
    host = np.ascontiguousarray(values if backend.device_of(values) is None else backend.to_host(values))
    return zlib.crc32(host.reshape(-1).view(np.uint8).data)


def _agree_on_axes(grid: Grid, axes: Axes) -> None:
    """Check that all ranks of a grid are about to make the communicators of the same axes."""
    begun = _begin("the first communication", grid, tuple(grid.axes), along=",".join(axes)) if _State.on else None
    if begun is not None:
        begun.end()


grids.before_split(_agree_on_axes)
