"""The watch of a rank over its node-mates: who has gone, who waits for whom, and the deadline of every wait.

`colossal_mpi.runtime.guards` calls `watch` in a job of several ranks. The thread of `colossal_mpi.runtime.signals` then
calls the watch twice a second, and `colossal_mpi.runtime.exits` tells it how this rank leaves. ``ledger`` says what the
rank computes (`places`), and the trainer says which step (`begin_step`).

The ranks of a node share a small file in memory, the board. Each writes into its own slot its process, a heartbeat,
where it is, and since when it has been inside one MPI call. Twice a second the thread also asks the interpreter for a
callback in the main thread. While no callback comes, the main thread is inside a single call, and the byte code of its
innermost frame tells which one. A step therefore does nothing for the watch, and a rank that calls MPI a million times
from one line is not mistaken for one that waits.

Three things end a job:

* a process that is gone without a word (``os._exit``, a signal);
* a rank that has left the program while all others wait, each in one MPI call, for more than `_LEFT` seconds;
* a wait that is longer than the deadline: ten minutes, or ``COLOSSAL_MPI_TIMEOUT`` seconds.

Boards of different nodes do not know each other: across nodes, a rank that has left early is found by the deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import math
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

from colossal_mpi.errors import LaunchError
from colossal_mpi.runtime import exits, signals

VARIABLE = "COLOSSAL_MPI_TIMEOUT"
"""The environment variable with the deadline of every wait in seconds; 0 for none."""
CODE = 86
"""The exit code of a job that ended because a wait passed its deadline."""
TIMEOUT = 600.0
"""The deadline of a wait in seconds where nothing says otherwise."""
_LEFT = 2.0  # seconds for which all others wait before a rank that has left is missed; the job is to end within five
_TOLD = 1.5  # seconds in which the ranks of a node report before the job is aborted
_SILENT = 3.0  # seconds without a heartbeat after which a rank does not answer
_STOP = 10.0  # seconds in which a job answers a signal to stop, unless its steps take longer
_RUNNING, _LEFT_IT = 1, 2
_SLOT = struct.Struct("<qqqdd208s")  # process, its start, state, heartbeat, begin of the wait, place

places: list[Callable[[], str]] = []
"""Functions that return what this rank computes, such as ``backward of blocks.5``; "" for nothing."""


class Seen(NamedTuple):
    """A slot of the board tells this about its rank: times are seconds of ``time.monotonic``, 0 for none."""

    rank: int
    pid: int
    started: int
    state: int
    beat: float
    waiting: float
    place: str


class Board:
    """The slots of the ranks of this node, in a file in memory that they share.

    Parameters
    ----------
    rank, size : int
        This rank, and the number of ranks of the job.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.path = Path(exits.shared_folder()) / f"{exits.prefix()}{exits.job()}.ranks"
        _sweep(self.path.parent)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size * _SLOT.size)
            self._map = mmap.mmap(descriptor, size * _SLOT.size)
        finally:
            os.close(descriptor)
        self._pid, self._started = os.getpid(), exits.started(os.getpid())

    def write(self, state: int, waiting: float, place: str) -> None:
        """Write this rank's slot.

        Parameters
        ----------
        state : int
            Whether the rank runs or has left the program.
        waiting : float
            When the MPI call began in which the rank is, in seconds of ``time.monotonic``; 0 outside of one.
        place : str
            Where the rank is, for a reader; at most 208 bytes are kept.
        """
        text = place.encode(errors="replace")[:208]
        values = self._pid, self._started, state, time.monotonic(), waiting, text
        _SLOT.pack_into(self._map, self.rank * _SLOT.size, *values)

    def read(self, rank: int) -> Seen | None:
        """Return the slot of a rank; None if it is on another node or has not come yet."""
        pid, started, state, beat, waiting, place = _SLOT.unpack_from(self._map, rank * _SLOT.size)
        text = place.rstrip(b"\0").decode(errors="replace")
        return Seen(rank, pid, started, state, beat, waiting, text) if state else None

    def mates(self) -> list[Seen]:
        """Return the slots of all ranks of this node, this one among them."""
        return [seen for rank in range(self.size) if (seen := self.read(rank)) is not None]

    def remove(self) -> None:
        """Remove the name of the file; the ranks that have mapped it keep it."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _sweep(folder: Path) -> None:
    """Remove the boards of jobs whose launcher is gone, and say so."""
    removed = 0
    for path in folder.glob(f"{exits.prefix()}*.ranks"):
        parent, _, began = path.name.removeprefix(exits.prefix()).removesuffix(".ranks").partition("_")
        began = began.partition("_")[0]
        if parent.isdecimal() and began.isdecimal() and exits.started(int(parent)) != int(began):
            with contextlib.suppress(OSError):  # another rank was faster
                path.unlink()
                removed += 1
    if removed:
        files = "1 shared file of a dead job" if removed == 1 else f"{removed} shared files of dead jobs"
        exits.write_all(f"colossal_mpi: removed {files} from {folder}\n")


def process_state(pid: int, started: int) -> str:
    """Return the letter that Linux has for the state of a process, such as R, S, T or Z; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            return "?" if not Path("/proc/self").exists() else ""
        return ""
    return fields[0] if int(fields[19]) == started else ""


_STATES = {
    "R": "runs",
    "S": "sleeps",
    "D": "waits for a device or a file",
    "T": "stopped",
    "t": "stopped by a debugger",
}


class _Watch:
    """The watch of one rank, which the thread of the signals calls."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.board, self.timeout = Board(rank, size), timeout
        self.pid = os.getpid()
        self.left = False  # the program has ended
        self.step, self.longest, self._stepped = 0, 0.0, 0.0
        self.stoppable, self.asked, self.decided = False, 0.0, False
        self._answered, self._since, self.waiting, self._call = True, 0.0, 0.0, ""
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._answer)
        self._neighbour: tuple[int, int] | None = None  # rank and descriptor of its process
        self._expired, self._last = 0.0, ""
        self._named = True  # the board has a name, which the last rank of the node needs to map it
        self.write()

    def _answer(self, _: object) -> int:
        self._answered = True
        return 0

    def write(self) -> None:
        """Write where this rank is into its slot."""
        self._last = self.place()
        self.board.write(_RUNNING, self.waiting, self._last)

    def leave(self, why: str, ends: bool) -> None:
        """Write into this rank's slot that it leaves the program, or ends the whole job."""
        self.left, self.waiting = True, 0.0
        self.board.write(_LEFT_IT, 0.0, why if ends else f"{why}; last seen in {self._last}")
        if ends or all(seen.state != _RUNNING for seen in self.board.mates()):
            self.board.remove()

    def place(self) -> str:
        """Return what this rank does: the computation, the step, and the innermost call."""
        words = [word for source in list(places) if (word := source())]
        words += [f"step {self.step}"] if self.step else []
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is not None:
            inner, user = frame, _user_frame(frame)
            words.append(f"{self._call or inner.f_code.co_name} at {_site(inner)}")
            words += [f"from {_site(user)}"] if user is not inner else []
        return ", ".join(words)

    def look(self) -> None:
        """Write the heartbeat, and end the job if a rank has gone or a wait is too long."""
        if os.getpid() != self.pid or exits.leaving.is_set() or self.left:
            return
        now = time.monotonic()
        if self._answered:
            self._answered, self._since, self.waiting, self._call = False, now, 0.0, ""
            ctypes.pythonapi.Py_AddPendingCall(self._callback, None)
        elif not self.waiting:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            self._call = _mpi_call(frame) if frame is not None else ""
            self.waiting = self._since if self._call else 0.0
        self.write()
        if self._named and len(self.board.mates()) >= _ranks_here(self.board.size):
            self._named = False
            self.board.remove()
        self._watch_neighbour()
        self._miss_a_leaver(now)
        self._keep_the_deadline(now)
        self._force_the_stop(now)

    def _watch_neighbour(self) -> None:
        # Each rank watches the next one of its node that has not left, so that one rank tells of each death.
        mates = self.board.mates()
        others = [seen for seen in mates if seen.rank > self.board.rank] + [
            seen for seen in mates if seen.rank < self.board.rank
        ]
        others = [seen for seen in others if seen.state == _RUNNING]
        wanted = others[0].rank if others else None
        if self._neighbour is not None and self._neighbour[0] != wanted:
            os.close(self._neighbour[1])
            signals.descriptors.pop(self._neighbour[1], None)
            self._neighbour = None
        if wanted is None or self._neighbour is not None:
            return
        seen = others[0]
        try:
            descriptor = os.pidfd_open(seen.pid) if hasattr(os, "pidfd_open") else -1
        except OSError:
            descriptor = -1
        if descriptor >= 0:
            self._neighbour = (seen.rank, descriptor)
            signals.descriptors[descriptor] = self._bereaved
        if process_state(seen.pid, seen.started) in ("", "Z"):
            self._bereaved()

    def _bereaved(self) -> None:
        """End the job because the neighbour's process is gone, unless it said that it leaves."""
        if self._neighbour is None:
            return
        rank, descriptor = self._neighbour
        signals.descriptors.pop(descriptor, None)
        with contextlib.suppress(OSError):
            os.close(descriptor)
        self._neighbour = None
        seen = self.board.read(rank)
        if seen is None or seen.state != _RUNNING or exits.leaving.is_set() or self.asked:
            return
        exits.say(
            f"{_who(rank, self.board.size)}process {seen.pid} ended without a word (os._exit, or a signal killed it); "
            f"last seen in {seen.place}\n"
        )
        exits.abort(1)

    def _miss_a_leaver(self, now: float) -> None:
        mates = self.board.mates()
        if len(mates) < self.board.size or not self.waiting:
            return
        gone = [seen for seen in mates if seen.state == _LEFT_IT]
        waiting = [seen for seen in mates if seen.state == _RUNNING]
        if not gone or any(not seen.waiting or now - max(seen.waiting, _left_at(gone)) < _LEFT for seen in waiting):
            return
        if min(waiting).rank != self.board.rank:
            return
        told = "".join(f"{_who(seen.rank, self.board.size)}{seen.place}\n" for seen in gone)
        told += "".join(f"{_who(seen.rank, self.board.size)}waits for it in {seen.place}\n" for seen in waiting[:4])
        told += f"and {len(waiting) - 4} more ranks wait\n" if len(waiting) > 4 else ""
        exits.say(told)
        exits.abort(1)

    def _keep_the_deadline(self, now: float) -> None:
        mates = self.board.mates()
        if not self.timeout or not self.waiting:
            self._expired = 0.0
            return
        longest = max((now - seen.waiting for seen in mates if seen.waiting and seen.state == _RUNNING), default=0.0)
        if longest < self.timeout:
            return
        if not self._expired:
            self._expired = now
            self._report(now)
        if now - self._expired < _TOLD:
            return
        answering = [s.rank for s in mates if s.state == _RUNNING and s.waiting and now - s.beat < _SILENT]
        if min(answering, default=self.board.rank) == self.board.rank:
            exits.say(self._diagnosis(mates, now))
            exits.abort(CODE)

    def _report(self, now: float) -> None:
        """Write what this rank waits for: a few lines to stderr, and everything to a file."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        group = _group(frame)
        lines = [f"waits since {now - self.waiting:.1f} s{group} in {self.place()}"]
        name = f"colossal_mpi-timeout-rank{self.board.rank}.txt"
        everything = "\n".join([*lines, *signals.lines()]) + "\n"
        for folder in (reports_folder(), exits.shared_folder()):
            try:
                path = os.path.join(folder, name)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
                    file.write(everything)
            except OSError:
                continue
            lines.append(f"its stacks and last transfers are in {path}")
            break
        who = _who(self.board.rank, self.board.size)
        exits.say("".join(f"{who}{line}\n" for line in lines))

    def _diagnosis(self, mates: list[Seen], now: float) -> str:
        host, size = os.uname().nodename, self.board.size
        told = f"colossal_mpi: error: a wait passed its deadline of {self.timeout:g} s ({VARIABLE}). "
        missing = [seen for seen in mates if _is_missing(seen, now)]
        words = []
        for seen in missing:
            letter = process_state(seen.pid, seen.started)
            state = f"{_STATES[letter]} (state {letter})" if letter in _STATES else "gone"
            ago = f", {now - seen.beat:.1f} s ago" if now - seen.beat > _SILENT else ""
            how = "left: " if seen.state != _RUNNING else "last seen in "
            words.append(f"rank {seen.rank} on {host}, {how}{seen.place}{ago}, {state}")
        known = {seen.rank for seen in mates}
        if len(known) < size:
            absent = [rank for rank in range(size) if rank not in known]
            named = ", ".join(map(str, absent[:8])) + (" and others" if len(absent) > 8 else "")
            words.append(f"not on {host}, or without `import colossal_mpi`: rank {named}")
        if words:
            return f"{told}missing: {'; '.join(words)}\n"
        calls = "; ".join(f"rank {seen.rank} in {seen.place}" for seen in mates[:8])
        return f"{told}No rank is missing, each waits for another call: {calls}\n"

    def _force_the_stop(self, now: float) -> None:
        if not self.asked or self.decided or not self.stoppable:
            return
        silent = [s for s in self.board.mates() if s.state == _RUNNING and now - s.beat > _SILENT]
        patience = _STOP / 2 if silent else max(_STOP - 1.0, 3.0 * self.longest)
        if now - self.asked < patience:
            return
        missing = [seen for seen in self.board.mates() if _is_missing(seen, now)] or silent
        who = "; ".join(f"rank {s.rank}, {process_state(s.pid, s.started)}, in {s.place}" for s in missing[:4])
        exits.say(
            f"colossal_mpi: error: not all ranks answered the signal to stop within {now - self.asked:.0f} s, so the "
            f"job ends without a checkpoint. No answer from {who or 'the main thread of any rank'}\n"
        )
        exits.abort(128 + signal.SIGTERM)


def _ranks_here(size: int) -> int:
    """Return the number of ranks on this node, as the launcher tells it; by default, the number of all ranks."""
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return size


def _is_missing(seen: Seen, now: float) -> bool:
    return seen.state != _RUNNING or not seen.waiting or now - seen.beat > _SILENT


def _left_at(gone: list[Seen]) -> float:
    return max(seen.beat for seen in gone)


def _who(rank: int, size: int) -> str:
    return f"rank {rank} of {size} on {os.uname().nodename}: "


def _site(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    with contextlib.suppress(OSError):  # no current folder
        name = name.removeprefix(os.getcwd() + os.sep)
    return f"{name}:{frame.f_lineno}"


_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARY = os.path.dirname(os.__file__) + os.sep


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _user_frame(frame: FrameType) -> FrameType:
    """Return the innermost frame outside of the package and of Python's library; the outermost where there is none."""
    last = frame
    for last in _frames(frame):
        name = last.f_code.co_filename
        if not name.startswith((_PACKAGE, _LIBRARY, "<frozen")):
            return last
    return last


_AMBIGUOUS = frozenset({"recv", "send", "wait", "gather", "scatter", "reduce", "scan", "probe"})
"""Names of mpi4py that sockets, processes and others have, too."""
_LOWER_CASE = _AMBIGUOUS | {
    *("allgather", "allreduce", "alltoall", "barrier", "bcast", "exscan", "sendrecv", "ssend", "bsend"),
    *("waitall", "waitany", "mprobe"),
}


def _mpi_call(frame: FrameType) -> str:
    """Return the name of the MPI function in which a frame is, "" if it is in none."""
    name = _called(frame.f_code, frame.f_lasti)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not name:
        return ""
    if name in _AMBIGUOUS:
        known = any(value is mpi or isinstance(value, mpi.Comm) for value in list(frame.f_globals.values()))
        return name if known else ""
    blocking = any(hasattr(kind, name) for kind in (mpi.Comm, mpi.Intracomm, mpi.Request, mpi.Win, mpi.File))
    return name if name in _LOWER_CASE or (blocking and name[0].isupper()) else ""


def _called(code: CodeType, offset: int) -> str:
    """Return the name of the attribute that the call at an offset of byte code calls, "" if it calls none.

    The instruction that loads the method begins at the same column as the call, and those of the arguments do not.
    """
    instructions = list(dis.get_instructions(code))
    at = next((i for i, instruction in enumerate(instructions) if instruction.offset == offset), None)
    if at is None or "CALL" not in instructions[at].opname:
        return ""
    where = instructions[at].positions
    for instruction in reversed(instructions[:at]):
        found, loads = instruction.positions, instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if loads and found and where and found[:1] + found[2:3] == where[:1] + where[2:3]:
            return str(instruction.argval)
    return ""


def _group(frame: FrameType | None) -> str:
    """Return the operation and the axes of the collective of ``comm`` in which a frame is, as words with a blank."""
    for each in _frames(frame):
        if os.path.dirname(each.f_code.co_filename) == _PACKAGE + "comm":
            values = each.f_locals
            axes = values.get("axes")
            if axes:
                return f" for {each.f_code.co_name} over {','.join(map(str, axes))}"
            entry = getattr(values.get("self"), "_entry", None)
            if entry is not None:
                return f" for {entry.op} over {','.join(entry.axes)}"
    return ""


_current: list[_Watch] = []
_folder: list[str] = []


def reports_folder() -> str:
    """Return the folder of the files that a passed deadline writes: that of the run, else the current one."""
    return _folder[-1] if _folder else os.curdir


def write_reports_to(folder: str | os.PathLike[str]) -> None:
    """Set the folder of the files that a passed deadline writes.

    Parameters
    ----------
    folder : str or path
        The folder, which exists.
    """
    _folder.append(os.fspath(folder))


def timeout_of(text: str | None) -> float:
    """Return the deadline that a text names.

    Parameters
    ----------
    text : str or None
        Seconds; None or ``""`` for `TIMEOUT`.

    Returns
    -------
    float
        The seconds; 0 for none.

    Raises
    ------
    LaunchError
        If the text is no number of seconds from 0 on.
    """
    try:
        seconds = float(text) if text else TIMEOUT
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise LaunchError(f"{VARIABLE}={text!r}: give the seconds that a rank waits at most, or 0 for no deadline")
    return seconds


def set_timeout(seconds: float) -> None:
    """Set the deadline of every wait from now on.

    Parameters
    ----------
    seconds : float
        The seconds; 0 for none.

    Notes
    -----
    **Communication:** none.
    """
    for watch in _current:
        watch.timeout = seconds


def watch(rank: int, size: int) -> None:
    """Begin to watch the ranks of this node; without a place for the shared file, nothing is watched.

    Parameters
    ----------
    rank, size : int
        This rank, and the number of ranks of the job.

    Raises
    ------
    LaunchError
        If `VARIABLE` names no deadline.
    """
    timeout = timeout_of(os.environ.get(VARIABLE))
    if _current:
        return
    try:
        _current.append(_Watch(rank, size, timeout))
    except (OSError, ValueError):
        return
    exits.farewells.append(_say_farewell)
    signals.periodic.append(_current[0].look)
    signals.asked.append(_note_signal)


def _say_farewell(why: str, ended: bool) -> None:
    own = _current[0]
    if os.getpid() != own.pid:
        return
    own.leave(why, ended)


def _note_signal(_number: int) -> None:
    for own in _current:
        own.asked = own.asked or time.monotonic()


def begin_step(step: int) -> None:
    """Say that this rank begins a training step; a message of the watch names it.

    Parameters
    ----------
    step : int
        The number of the step, from 1.
    """
    for own in _current:
        now = time.monotonic()
        if own._stepped:
            own.longest = max(own.longest, now - own._stepped)
        own.step, own._stepped = step, now


def can_stop(yes: bool) -> None:
    """Say whether the program answers a signal to stop after its step: if it does not, the watch ends the job.

    Parameters
    ----------
    yes : bool
        Whether the program waits for such a signal.
    """
    for own in _current:
        own.stoppable, own.asked, own.decided = yes, 0.0, False


def stop_decided() -> None:
    """Say that all ranks have answered a signal to stop, and end by themselves."""
    for own in _current:
        own.decided = True
