"""The end of a job that a rank leaves: one message, a non-zero exit code, no hang.

`colossal_mpi.runtime.guards` calls `watch`, which installs the hooks; the module calls MPI only when a rank leaves.

An MPI program in which one rank fails waits for ever if nothing ends it: the other ranks are blocked in a call that the
failed rank never makes, and the failed rank waits for them in MPI_Finalize. The hooks end such a job. They do not see
``raise SystemExit(n)`` on one rank, because no hook of Python does; they see ``sys.exit(n)``.
`colossal_mpi.runtime.signals` handles signals.
"""

import atexit
import builtins
import functools
import glob
import os
import re
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

from colossal_mpi.errors import ColossalError

_PATIENCE = 2.0  # seconds that a leaving rank waits for the others; the whole job is to end within five
_FORWARDING = 0.2  # seconds for mpiexec to read the message: without them MPICH's lost one message in twenty
_STALE = 60.0  # seconds after which a claim belongs to an earlier job: a job ends seconds after its claim
_CODE: Any = SystemExit.code
_exit_codes: list[int] = []  # filled when the interpreter itself exits by sys.exit


def watch() -> None:
    """Install the hooks that end the job when this rank fails."""
    pid = os.getpid()  # children made by fork inherit the hooks, but must not touch MPI
    sys.excepthook = functools.partial(_on_exception, pid)
    sys.exit = _exit
    for name in {"exit", "quit"} & vars(builtins).keys():
        setattr(builtins, name, _exit)
    atexit.register(_on_exit, pid)


class _SystemExit(SystemExit):
    # A SystemExit may be caught (pytest.raises, typer), and only one that ends the program may end the job. The
    # interpreter reads `code` with no Python frame below it: handle_system_exit in CPython's pythonrun.c.
    @property
    def code(self) -> Any:
        code = _CODE.__get__(self)
        if sys._getframe().f_back is not None:
            return code
        _exit_codes.append((code or 0) & 0xFF if isinstance(code, int | None) else 1)
        return code if isinstance(code, int | None) or _claim() else 1  # only one rank prints a text

    @code.setter
    def code(self, value: Any) -> None:
        _CODE.__set__(self, value)


def _exit(status: Any = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status), which ends the job if it is not caught and not 0."""
    if threading.current_thread() is threading.main_thread():
        raise _SystemExit(status)
    raise SystemExit(status)  # threading prints a traceback for anything but SystemExit itself


def _on_exit(pid: int) -> None:
    # Python sets last_value before it calls a hook, also one by which rich, typer or the user replaced ours.
    failed = [1] if isinstance(getattr(sys, "last_value", None), BaseException) else []
    code = max(_exit_codes + failed, default=0)
    if code and _in_job(pid):
        _leave(code)


def _on_exception(pid: int, kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
    if not _in_job(pid):
        show(kind, problem, trace)
    elif issubclass(kind, KeyboardInterrupt):
        abort(130)
    elif issubclass(kind, ColossalError):  # made from global metadata: very likely raised on all ranks
        if _claim():
            show(kind, problem, trace)
        _leave(1)
    else:
        if _claim():
            _speak(where() + "".join(traceback.format_exception(kind, problem, trace)))
            time.sleep(_FORWARDING)
        else:
            time.sleep(_PATIENCE)  # the rank that prints the message ends the job, and must not be cut short
        abort(1)


def show(kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception; print a `ColossalError` without its traceback."""
    if issubclass(kind, ColossalError):
        _speak(f"colossal_mpi: error: {problem}\n")
    else:
        sys.__excepthook__(kind, problem, trace)


def _speak(text: str) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a closed stderr must not keep the job from ending
        pass


def where() -> str:
    """Return rank, number of ranks and host as the beginning of a message."""
    from mpi4py import MPI

    return f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {os.uname().nodename}: "


def _claim() -> bool:
    """Return whether this rank is the first of its node that prints a message for the job."""
    import tempfile

    stem = os.path.join(tempfile.gettempdir(), f"colossal_mpi-{os.getuid()}-")
    # The file of a claim stays when the job ends: if the winner removed it, the next late rank would win it again.
    for old in glob.glob(glob.escape(stem) + "*"):
        try:
            if time.time() - os.stat(old).st_mtime > _STALE:
                os.unlink(old)
        except OSError:  # another rank was faster
            pass
    try:
        os.close(os.open(stem + _job(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:  # no directory for temporary files: several messages are better than none
        pass
    return True


def _job() -> str:
    # All ranks of a node are children of one process. The namespace distinguishes the jobs of one prte daemon.
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat", encoding="utf-8", errors="replace") as stat:
            started = stat.read().rpartition(")")[2].split()[19]  # field 22; the name, field 2, may contain blanks
    except OSError:
        started = ""
    return re.sub(r"\W", "_", f"{parent}-{started}-{os.environ.get('PMIX_NAMESPACE', '')}")


def _in_job(pid: int) -> bool:
    from mpi4py import MPI

    return os.getpid() == pid and MPI.Is_initialized() and not MPI.Is_finalized()


def abort(code: int) -> None:
    """End the whole job with an exit code, from any thread."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(code)


def _leave(code: int) -> None:
    """Return if every rank is leaving as well, so that each exits with its own code; else end the whole job."""
    from mpi4py import MPI

    try:
        together = _all_leave()
    except MPI.Exception:  # a rank is gone already
        together = False
    if not together:
        abort(code)


@functools.cache  # a rank leaves once, although an error passes through the hook and then through the exit
def _all_leave() -> bool:
    # This is a barrier of point-to-point messages (dissemination: Hensgen, Finkel and Manber, 1988), because no
    # collective is safe here: other ranks may be inside one. A separate communicator, made at import, would hang where
    # not every rank imports colossal_mpi. Only a receive with ANY_TAG on COMM_WORLD could take one of these messages,
    # in a job that is about to end anyway.
    from mpi4py import MPI

    world, step, deadline = MPI.COMM_WORLD, 1, time.monotonic() + _PATIENCE
    tag: Any = world.Get_attr(MPI.TAG_UB)
    while step < world.size:
        after, before = (world.rank + step) % world.size, (world.rank - step) % world.size
        pair = [world.Isend([b"", MPI.BYTE], after, tag), world.Irecv([bytearray(), MPI.BYTE], before, tag)]
        while not MPI.Request.Testall(pair):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        step *= 2
    return True
