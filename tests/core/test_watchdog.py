"""A job ends, with a name and a cause, when a rank leaves or never comes. Each job is a subprocess with a deadline."""

import os
import signal
import subprocess
import sys
import time

import pytest

from colossal_mpi import ledger
from colossal_mpi.errors import LaunchError
from colossal_mpi.runtime import exits, watchdog
from tests.core.test_guards import OPEN_MPI, environment, job, running, start, starting, wait_for

LIMIT = 5  # seconds within which a job ends, beside its start


@pytest.mark.parametrize("leave", ["sys.exit(0)", "raise SystemExit(3)", "os._exit(0)"])
def test_a_rank_that_leaves_while_the_others_wait_ends_the_job(tmp_path, leave):
    code, _, err, seconds = job(tmp_path, 3, f"if rank == 1: {leave}\nworld.Barrier()")
    assert code != 0
    assert "rank 1 of 3 on " in err
    assert "left the program" in err
    assert seconds < LIMIT + starting()


def test_ranks_that_leave_one_after_the_other_are_no_fault(tmp_path):
    code, _, err, _ = job(tmp_path, 2, "time.sleep(3 * rank)")  # longer than a leaver is given
    assert (code, err) == (0, "")


STUCK = {
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "stopped (state T)"),
    "loop": ("while True: pass", "runs (state R)"),
    "blocked": ("import ctypes; ctypes.PyDLL(None).sleep(60)", "sleeps (state S)"),
}


@pytest.mark.parametrize("kind", STUCK)
def test_a_wait_beyond_the_deadline_names_the_missing_rank(tmp_path, kind):
    fault, state = STUCK[kind]
    body = f"""
from colossal_mpi import Grid, Layout, full
from colossal_mpi.runtime import watchdog
watchdog.write_reports_to({str(tmp_path)!r})
watchdog.begin_step(212)
a = full((6, 6), 1.0, Grid(row=2), Layout("row", None))
world.Barrier()
time.sleep(0.6)  # the watch looks twice a second
if rank == 1:
    {fault}
a.redistribute(Layout(None, "row"))
"""
    code, _, err, seconds = job(tmp_path, 2, body, COLOSSAL_MPI_TIMEOUT="1")
    assert code == (code if OPEN_MPI else watchdog.CODE) != 0
    assert "missing: rank 1 on " in err
    assert "step 212" in err
    assert state in err
    assert "for all_to_all over row in " in err
    told = (tmp_path / "colossal_mpi-timeout-rank0.txt").read_text()
    assert "thread MainThread:" in told
    assert "job.py" in told
    assert "the last " in told
    assert seconds < 1 + LIMIT + starting()


def test_ranks_in_different_calls_are_all_named(tmp_path):
    body = f"""
from colossal_mpi.runtime import watchdog
watchdog.write_reports_to({str(tmp_path)!r})
world.bcast(1, 0) if rank == 0 else None
world.recv(source=1) if rank == 0 else world.Barrier()
"""
    code, _, err, _ = job(tmp_path, 2, body, COLOSSAL_MPI_TIMEOUT="1")
    assert code != 0
    assert "No rank is missing, each waits for another call: rank 0 in recv at " in err
    assert "; rank 1 in Barrier at " in err


def test_long_computations_and_many_calls_are_no_wait(tmp_path):
    body = "time.sleep(2)\nworld.Barrier()\nfor _ in range(200):\n    world.Barrier()\n    time.sleep(0.01)"
    code, _, err, _ = job(tmp_path, 2, body, COLOSSAL_MPI_TIMEOUT="1")
    assert (code, err) == (0, "")


def test_a_hangup_ends_the_job(tmp_path):
    code, _, err, seconds = job(
        tmp_path, 2, "if rank == 1: os.kill(os.getpid(), signal.SIGHUP)\nworld.recv(source=rank)"
    )
    assert code == (code if OPEN_MPI else 129) != 0
    assert "SIGHUP" in err
    assert seconds < LIMIT + starting()


@pytest.mark.skipif(OPEN_MPI, reason="its mpiexec kills all ranks half a second after SIGTERM")
def test_a_signal_to_stop_ends_a_job_in_which_a_rank_does_not_answer(tmp_path):
    body = """
from colossal_mpi.runtime import watchdog
signal.signal(signal.SIGTERM, lambda *_: None)
watchdog.can_stop(True)
sys.stdout.write("ready\\n"); sys.stdout.flush()
time.sleep(0.6)
os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else world.Barrier()
"""
    process = start(tmp_path, 2, body)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 10
    assert process.returncode != 0
    assert "No answer from rank 1, T" in err


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_no_rank_outlives_a_killed_launcher(tmp_path):
    script = tmp_path / "job.py"
    script.write_text("import os, sys, time, colossal_mpi\nsys.stdout.write(f'{os.getpid()}\\n')\nsys.stdout.flush()\n")
    script.write_text(script.read_text() + "time.sleep(60)")
    command = [sys.executable, "-m", "colossal_mpi.apps.cli", "run", "-n", "2", str(script)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
        wait_for(lambda: not any(running(pid) for pid in pids))
        assert not [pid for pid in pids if running(pid)]


def test_shared_files_of_dead_jobs_are_removed_with_a_word(tmp_path, capfd):
    dead = tmp_path / f"{exits.prefix()}{os.getppid()}_1_.ranks"  # the process began at another time
    alive = tmp_path / f"{exits.prefix()}{exits.job()}.ranks"
    dead.touch()
    alive.touch()
    watchdog._sweep(tmp_path)
    assert not dead.exists()
    assert alive.exists()
    assert "removed 1 shared file of a dead job" in capfd.readouterr().err


def test_a_deadline_is_a_number_of_seconds():
    assert (watchdog.timeout_of(None), watchdog.timeout_of("0"), watchdog.timeout_of("2.5")) == (600, 0, 2.5)
    with pytest.raises(LaunchError, match="COLOSSAL_MPI_TIMEOUT='soon'"):
        watchdog.timeout_of("soon")


def test_the_open_spans_say_what_a_rank_computes():
    with ledger.span("backward", microbatch=2), ledger.span("backward", layer="blocks.5"):
        assert ledger._place() == "backward of blocks.5, microbatch 2"
    assert ledger._place() == ""
