"""The end of a job that a rank leaves: one message, a non-zero exit code, no hang.

`colossal_mpi.runtime.guards` calls `watch`, which installs the hooks; the module calls MPI only when a rank leaves.

An MPI program in which one rank fails waits for ever if nothing ends it: the other ranks are blocked in a call that the
failed rank never makes, and the failed rank waits for them in MPI_Finalize. The hooks end such a job. They do not see
``raise SystemExit(n)`` on one rank, because no hook of Python does; they see ``sys.exit(n)``. A rank that leaves
without an error says farewell, and `colossal_mpi.runtime.watchdog` ends the job if the others wait for it.
`colossal_mpi.runtime.signals` handles signals.
"""

import atexit
import builtins
import contextlib
import functools
import glob
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from colossal_mpi.errors import ColossalError

_PATIENCE = 2.0  # seconds that a leaving rank waits for the others; the whole job is to end within five
_FORWARDING = 0.2  # seconds for mpiexec to read the message: without them MPICH's lost one message in twenty
_STALE = 60.0  # seconds after which a claim belongs to an earlier job: a job ends seconds after its claim
_CODE: Any = SystemExit.code
_exit_codes: list[int] = []  # filled when the interpreter itself exits by sys.exit
_exit_site: list[str] = []  # where sys.exit was called
farewells: list[Callable[[str, bool], None]] = []
"""Functions that are told why this rank leaves, and whether it ends the whole job."""
leaving = threading.Event()
"""Set when this rank ends the whole job."""


def watch() -> None:
    """Install the hooks that end the job when this rank fails."""
    pid = os.getpid()  # children made by fork inherit the hooks, but must not touch MPI
    sys.excepthook = functools.partial(_on_exception, pid)
    sys.exit = _exit
    for name in {"exit", "quit"} & vars(builtins).keys():
        setattr(builtins, name, _exit)
    os._exit = functools.partial(_exit_at_once, pid, os._exit)
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
        frame = sys._getframe(1)
        _exit_site[:] = [f"sys.exit({status!r:.60}) at {frame.f_code.co_filename}:{frame.f_lineno}"]
        raise _SystemExit(status)
    raise SystemExit(status)  # threading prints a traceback for anything but SystemExit itself


def _exit_at_once(pid: int, exit_process: Callable[[int], NoReturn], status: int) -> NoReturn:
    """Exit without the hooks of the interpreter; end the job if the other ranks do not leave as well."""
    # The launcher's exit code can be 0 after such an end, and nothing says which rank was the first.
    if _in_job(pid) and not leaving.is_set():
        if not _leave_together():
            frame = sys._getframe(1)
            site = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            say(f"{where()}left the program (os._exit({status}) at {site}) while others go on\n")
            abort(status & 0xFF or 1)
        for farewell in farewells:
            farewell("left the program by os._exit", False)
    exit_process(status)


def _on_exit(pid: int) -> None:
    # Python sets last_value before it calls a hook, also one by which rich, typer or the user replaced ours.
    failed = [1] if isinstance(getattr(sys, "last_value", None), BaseException) else []
    code = max(_exit_codes + failed, default=0)
    if not _in_job(pid):
        return
    if code:
        _leave(code)
    how = _exit_site[0] if _exit_codes and _exit_site else "it reached its end or raised SystemExit"
    for farewell in farewells:
        farewell(f"left the program ({how})", False)


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


def write_all(text: str) -> None:
    """Write a text to the standard error of this process, not through sys.stderr, whose lock a thread may hold."""
    rest = memoryview(text.encode(errors="replace"))
    with contextlib.suppress(OSError):
        while rest:
            rest = rest[os.write(2, rest) :]


def say(text: str) -> None:
    """Write a text for the whole job to stderr, and let the launcher read it before the job ends."""
    write_all(text)
    time.sleep(_FORWARDING)


def where() -> str:
    """Return rank, number of ranks and host as the beginning of a message."""
    from mpi4py import MPI

    return f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {os.uname().nodename}: "


def _claim() -> bool:
    """Return whether this rank is the first of its node that prints a message for the job."""
    import tempfile

    stem = os.path.join(tempfile.gettempdir(), prefix())
    # The file of a claim stays when the job ends: if the winner removed it, the next late rank would win it again.
    for old in glob.glob(glob.escape(stem) + "*"):
        try:
            if time.time() - os.stat(old).st_mtime > _STALE:
                os.unlink(old)
        except OSError:  # another rank was faster
            pass
    try:
        os.close(os.open(stem + job(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:  # no directory for temporary files: several messages are better than none
        pass
    return True


def job() -> str:
    """Return a name of this job, the same on all ranks of a node."""
    # All ranks of a node are children of one process. The namespace distinguishes the jobs of one prte daemon.
    parent = os.getppid()
    return re.sub(r"\W", "_", f"{parent}-{started(parent) or ''}-{os.environ.get('PMIX_NAMESPACE', '')}")


def prefix() -> str:
    """Return the beginning of the names of the files that the jobs of this user share."""
    return f"colossal_mpi-{os.getuid()}-"


def shared_folder() -> str:
    """Return the folder of the files that the ranks of a node share, in memory where there is such a folder."""
    import tempfile

    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def started(pid: int) -> int:
    """Return when a process began, in clock ticks since the boot; 0 if it is gone or the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return int(stat.read().rpartition(")")[2].split()[19])  # field 22; the name, field 2, may contain blanks
    except (OSError, ValueError, IndexError):
        return 0


def _in_job(pid: int) -> bool:
    from mpi4py import MPI

    return os.getpid() == pid and MPI.Is_initialized() and not MPI.Is_finalized()


def abort(code: int) -> None:
    """End the whole job with an exit code, from any thread."""
    from mpi4py import MPI

    leaving.set()
    for farewell in farewells:
        farewell("ends the job", True)
    MPI.COMM_WORLD.Abort(code)


def _leave(code: int) -> None:
    """Return if every rank is leaving as well, so that each exits with its own code; else end the whole job."""
    if not _leave_together():
        abort(code)


def _leave_together() -> bool:
    from mpi4py import MPI

    try:
        return _all_leave()
    except MPI.Exception:  # a rank is gone already
        return False


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
