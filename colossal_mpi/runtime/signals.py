"""Signals to a rank that may be inside MPI: Ctrl-C and SIGHUP end the job, SIGUSR1 makes every rank report its stacks.

`colossal_mpi.runtime.guards` and the trainer call `listen`; ``ledger`` adds its last collectives to the `sources` of a
report, and `colossal_mpi.runtime.watchdog` is called by the same thread. The module calls
`colossal_mpi.runtime.exits` to end a job.

Python runs its signal handlers between byte codes, so that a rank that waits inside MPI would react to neither signal.
The C part of Python's handler, however, writes the number of the signal to a file descriptor at once, where a thread
reads it: mpi4py releases the interpreter lock during a call.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import FrameType

from colossal_mpi.runtime import exits

_PATIENCE = 0.5  # seconds in which Python raises KeyboardInterrupt, unless the rank is inside a call
_interrupted = threading.Event()
_wakeup = -1
_masks = threading.local()
_PERIOD, _FIRST, _START = 0.5, 0.05, 2.0  # seconds between two calls of `periodic`, in the first seconds, and these

sources: list[Callable[[], Iterable[str]]] = []
"""Functions that return further lines for the report of a rank on SIGUSR1."""
periodic: list[Callable[[], None]] = []
"""Functions that the listening thread calls twice a second."""
descriptors: dict[int, Callable[[], None]] = {}
"""Functions that the listening thread calls when a file descriptor can be read."""
asked: list[Callable[[int], None]] = []
"""Functions that the listening thread calls with the number of a signal that asks the program to stop."""


def listen(interrupt: bool = True) -> None:
    """Make this process report on SIGUSR1 and, with `interrupt`, end its job on SIGINT and SIGHUP, inside MPI as well.

    Only the first call from the main thread has an effect. Handlers that exist already, and a wake-up descriptor of
    another library such as an event loop, stay as they are. A SIGHUP that ``nohup`` ignores stays ignored.

    Parameters
    ----------
    interrupt : bool, default True
        Whether to end the job on SIGINT and SIGHUP. A process alone does not need it, because it waits for no other
        rank.
    """
    global _wakeup
    if _wakeup != -1 or threading.current_thread() is not threading.main_thread():
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        if periodic and not _listening:
            _start(read)
        else:
            os.close(read)
            os.close(write)
        return
    _wakeup = write
    if interrupt and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)
    if interrupt and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _on_hangup)  # MPICH's UCX takes it for a wish to see debugging messages
        signal.siginterrupt(signal.SIGHUP, False)
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _on_question)
        signal.siginterrupt(signal.SIGUSR1, False)  # system calls of libraries go on
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
    _start(read)


_listening: list[threading.Thread] = []


def _start(descriptor: int) -> None:
    thread = threading.Thread(target=_wait, args=(descriptor,), daemon=True, name="colossal_mpi.runtime.signals")
    _listening.append(thread)
    thread.start()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.default_int_handler(number, frame)


def _on_hangup(_number: int, _frame: FrameType | None) -> None:
    exits.leaving.wait(_PATIENCE)  # the thread ends the job: the program must not reach its end before


def _on_question(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Python writes the signal's number to the descriptor only if there is a handler."""


# The child of a fork inherits the handlers and the descriptor, but not the thread: its parent would read the child's
# bytes. The child therefore removes them before any signal reaches it.
def _hold() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _forget() -> None:
    with contextlib.suppress(ValueError):  # not from the main thread
        other = signal.set_wakeup_fd(-1)
        if other not in (-1, _wakeup):
            signal.set_wakeup_fd(other)
        for number, ours, theirs in (
            (signal.SIGINT, _on_interrupt, signal.default_int_handler),
            (signal.SIGUSR1, _on_question, signal.SIG_DFL),
            (signal.SIGHUP, _on_hangup, signal.SIG_DFL),
        ):
            if signal.getsignal(number) is ours:
                signal.signal(number, theirs)
    _release()


def _wait(descriptor: int) -> None:
    begun = due = time.monotonic()
    while True:
        ready, _, _ = select.select([descriptor, *descriptors], [], [], max(0.0, due - time.monotonic()))
        for other in ready:
            if other != descriptor and other in descriptors:
                descriptors[other]()
        if descriptor in ready:
            _react(os.read(descriptor, 64))
        if time.monotonic() >= due:
            for function in list(periodic):
                function()
            due = time.monotonic() + (_PERIOD if due - begun > _START else _FIRST) if periodic else due + 3600.0


def _react(numbers: bytes) -> None:
    # Another library may have replaced our handlers.
    if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is _on_interrupt:
        if not _interrupted.wait(_PATIENCE):
            exits.abort(130)
        _interrupted.clear()
    if signal.SIGHUP in numbers and signal.getsignal(signal.SIGHUP) is _on_hangup:
        exits.say("colossal_mpi: error: SIGHUP, the terminal of the job is gone; start it with nohup to go on\n")
        exits.abort(128 + signal.SIGHUP)
    for number in {signal.SIGTERM, signal.SIGHUP} & set(numbers):
        for function in list(asked):
            function(number)
    if signal.SIGUSR1 in numbers and signal.getsignal(signal.SIGUSR1) is _on_question:
        report()


def lines() -> list[str]:
    """Return where every thread of this process but the calling one is, and the lines of `sources`."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            found += [f"thread {names.get(ident, ident)}:", *"".join(traceback.format_stack(frame)).splitlines()]
    for source in list(sources):
        found += source()
    return found


def report() -> None:
    """Write to stderr where every thread of this rank is, and the lines of `sources`, each with the rank."""
    who = exits.where()
    exits.write_all("".join(f"{who}{line}\n" for line in lines()))
