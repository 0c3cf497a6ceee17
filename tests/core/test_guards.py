"""The guards of a rank end jobs that would hang. Each job is a subprocess with a deadline; pytest is never a rank."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from colossal_mpi.apps.launch import mpiexec_command

OPEN_MPI = MPI.get_vendor()[0] == "Open MPI"
ROOT = Path(__file__).parents[2]
PREPARE = """
import os, signal, sys, time
signal.alarm(25)  # the deadline of this test
import colossal_mpi.runtime.guards as guards
guards.install()
from mpi4py import MPI
from colossal_mpi.errors import ConfigError
world = MPI.COMM_WORLD
rank = world.rank
world.Barrier()
"""
THREADS = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"}


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in THREADS}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def start(tmp_path, n, body, **more):
    script = tmp_path / "job.py"
    script.write_text(PREPARE + body)
    argv, extra = mpiexec_command(n, [str(script)])
    return subprocess.Popen(
        argv, env=environment(**extra, **more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def job(tmp_path, n, body, **more):
    begin = time.monotonic()
    process = start(tmp_path, n, body, **more)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err, time.monotonic() - begin


@functools.cache
def starting():
    """Return the seconds that a job without failures takes."""
    with tempfile.TemporaryDirectory() as folder:
        return job(Path(folder), 3, "")[3]


def alone(code, **more):
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(**more), capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("wait", ["world.recv(source=1)", "world.Barrier()", "pass"])
def test_exception_on_one_rank_ends_the_job(tmp_path, wait):
    body = f"if rank == 1:\n    raise RuntimeError('broken disk')\n{wait}"
    code, _, err, seconds = job(tmp_path, 3, body)
    assert code == 1
    assert err.count("RuntimeError: broken disk") == 1
    assert "rank 1 of 3 on " in err
    assert "Traceback" in err
    assert seconds < 5 + starting()


def test_exception_on_all_ranks_is_told_once(tmp_path):
    code, _, err, _ = job(tmp_path, 4, "raise RuntimeError('broken disk')")
    assert code == 1
    assert err.count("Traceback") == err.count("RuntimeError: broken disk") == 1


def test_colossal_error_on_all_ranks_is_one_line(tmp_path):
    code, _, err, _ = job(tmp_path, 4, "raise ConfigError('12 heads cannot be cut over col=8')")
    assert code == 1
    assert err.count("colossal_mpi: error: 12 heads cannot be cut over col=8") == 1
    assert "Traceback" not in err
    assert "abort" not in err.lower()


def test_colossal_error_on_one_rank_ends_the_job(tmp_path):
    code, _, err, seconds = job(tmp_path, 3, "if rank == 2: raise ConfigError('bad')\nworld.Barrier()")
    assert code == 1
    assert err.count("colossal_mpi: error: bad") == 1
    assert seconds < 5 + starting()


def test_exception_behind_the_hook_of_another_library_ends_the_job(tmp_path):
    body = "sys.excepthook = lambda *_: print('mine', file=sys.stderr)\nif rank == 0: 1 / 0\nworld.Barrier()"
    code, _, err, _ = job(tmp_path, 2, body)
    assert code == 1
    assert "mine" in err


def test_exit_on_one_rank_ends_the_job(tmp_path):
    code, _, _, seconds = job(tmp_path, 3, "if rank == 1: sys.exit(3)\nworld.Barrier()")
    assert code == 3
    assert seconds < 5 + starting()


@pytest.mark.parametrize(("status", "expected"), [("2", 2), ("'bad config'", 1)])
def test_exit_on_all_ranks_is_quiet(tmp_path, status, expected):
    code, _, err, _ = job(tmp_path, 4, f"sys.exit({status})")
    assert code == expected
    assert err.count("bad config") == (expected == 1)
    assert "MPI_A" not in err.upper()


HEALTHY = {
    "end": "",
    "exit-0": "sys.exit(0)",
    "exit-none": "sys.exit()",
    "one-exits-0": "if rank == 0: sys.exit(0)\ntime.sleep(0.3)",
    "caught": "try:\n    if rank == 0: sys.exit(3)\nexcept SystemExit as e:\n    assert e.code == 3",
    "signals": """
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
except KeyboardInterrupt:
    time.sleep(0.8)  # longer than the thread waits for the KeyboardInterrupt
child = os.fork()
if child == 0:
    time.sleep(20)
os.kill(child, signal.SIGUSR1)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGUSR1
""",
    "thread": "import threading\nt = threading.Thread(target=sys.exit, args=(3,)); t.start(); t.join()",
}


@pytest.mark.parametrize("body", HEALTHY.values(), ids=HEALTHY)
def test_healthy_job_ends_well(tmp_path, body):
    code, _, err, _ = job(tmp_path, 2, body)
    assert (code, err) == (0, "")


FORK = """
if rank == 0:
    if os.fork() == 0:
        sys.excepthook(ValueError, ValueError("x"), None)
        os._exit(0)
    os.wait()
"""


def test_exception_in_a_forked_child_leaves_the_job_alone(tmp_path):
    code, _, err, _ = job(tmp_path, 2, FORK)
    assert (code, err) == (0, "ValueError: x\n")


def test_interrupt_is_quiet(tmp_path):
    code, _, err, _ = job(tmp_path, 2, "if rank == 0: raise KeyboardInterrupt\nworld.Barrier()")
    assert code == 130
    assert "Traceback" not in err


BLOCKED = """
import threading
threading.Thread(target=time.sleep, args=(20,), daemon=True, name="idle").start()
open(f"{sys.argv[0]}.{rank}", "w").close()
world.recv(source=rank)
"""


def test_a_rank_inside_mpi_answers_and_is_interrupted(tmp_path):
    process = start(tmp_path, 2, BLOCKED)
    wait_for(lambda: len(list(tmp_path.glob("job.py.*"))) == 2)
    time.sleep(0.1)  # for the call
    process.send_signal(signal.SIGUSR1)
    told = []
    while sum("the last 0 collectives" in line for line in told) < 2:
        told.append(process.stderr.readline())
        assert told[-1], told
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == (1 if OPEN_MPI else 130)
    assert time.monotonic() - begin < 3
    for rank in (0, 1):
        own = "".join(line for line in told if line.startswith(f"rank {rank} of 2 on "))
        assert "thread MainThread:" in own
        assert "thread idle:" in own
        assert "world.recv(source=rank)" in own


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


COUNT = """
import numpy, threadpoolctl
count = max(pool["num_threads"] for pool in threadpoolctl.threadpool_info())
sys.stdout.write(f"[{count}]")  # one write, because the other rank writes as well
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread anyway")
@pytest.mark.parametrize(
    ("before", "more", "expected"),
    [("", {}, 1), ("", {"OMP_NUM_THREADS": "2"}, 2), ("import numpy", {}, 1)],
    ids=["default", "set-by-user", "numpy-first"],
)
def test_one_blas_thread_for_each_rank(tmp_path, before, more, expected):
    script = tmp_path / "count.py"
    script.write_text(before + PREPARE + COUNT)
    argv, extra = mpiexec_command(2, [str(script)])
    extra["PRTE_MCA_hwloc_default_binding_policy"] = "none"  # else Open MPI gives a rank one core and one thread
    done = subprocess.run(argv, env=environment(**extra, **more), capture_output=True, text=True, timeout=30)
    assert done.stdout == f"[{expected}]" * 2


def test_one_process_alone_is_left_as_it_is():
    code = "import sys; old = sys.exit, sys.excepthook; import colossal_mpi.runtime.guards as g; g.install()"
    done = alone(code + "; assert old == (sys.exit, sys.excepthook); 1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_missing_library_says_what_to_install():
    done = alone("import colossal_mpi.runtime.guards as g; g.install()", MPI4PY_LIBMPI="/nonexistent")
    assert done.returncode == 1
    assert done.stderr.startswith("colossal_mpi: error: MPI was not found (")
    assert "pip install colossal-mpi[mpich]" in done.stderr


def test_missing_mpi4py_is_an_import_error(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('libmpi.so.12: cannot open shared object file')")
    code = "try:\n    import colossal_mpi.runtime.guards as g; g.install()\nexcept ImportError as e:\n    print(e)"
    done = alone(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "MPI was not found (libmpi.so.12: cannot open shared object file)" in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_foreign_launcher_is_told_by_rank_0_only(rank):
    told = {"PMI_SIZE": "4", "PMI_RANK": str(rank)}
    if not OPEN_MPI:  # what Open MPI's sets; MPICH would abort
        told = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": str(rank), "PMIX_RANK": "0", "PRTE_LAUNCHED": "1"}
    done = alone("import colossal_mpi.runtime.guards as g; g.install()", **told)
    assert done.returncode == 1
    assert ("the launcher started 4 processes" in done.stderr) == (rank == 0)
    assert done.stderr.count("\n") == (rank == 0)


def test_batch_script_of_slurm_is_no_launcher():
    done = alone("import colossal_mpi.runtime.guards as g; g.install()", SLURM_NTASKS="4", SLURM_PROCID="0")
    assert (done.returncode, done.stderr) == (0, "")


CHILDREN = """
import subprocess
from colossal_mpi.runtime import child_environment
ASK = "from colossal_mpi.grid import Grid, world_rank, world_size; print(world_rank(), world_size(), flush=True); "
def child(make="", **how):
    done = subprocess.run([sys.executable, "-c", ASK + make], capture_output=True, text=True, **how)
    return done.returncode, done.stdout, done.stderr
if rank == 1:
    assert child() == child(close_fds=False) == (0, "0 1\\n", "")  # without and with the connection of this rank
    code, _, err = child("Grid(data=1)", close_fds=False)
    assert code == 1 and f"LaunchError: this process is no rank of a job: rank 1 of 2 started it" in err, err
    assert "-u PMI_" in err or "-u PMIX_" in err, err
    alone = child_environment(os.environ)
    assert child("print(Grid(data=1))", env=alone) == (0, "0 1\\nGrid(data=1)\\n", "")
    pid = os.fork()
    if pid == 0:
        try:
            guards.require_mpi()
        except guards.LaunchError as problem:
            os._exit(7 if "was forked from process" in str(problem) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
world.Barrier()
"""


def test_children_of_a_rank_are_no_ranks_and_leave_the_job_alone(tmp_path):
    assert job(tmp_path, 2, CHILDREN)[:3] == (0, "", "")


def test_the_child_of_the_only_rank_is_alone(tmp_path):
    body = "import subprocess\nfrom colossal_mpi import Grid\nprint(Grid(data=1), flush=True)\n"
    body += "if len(sys.argv) == 1: sys.exit(subprocess.run([sys.executable, __file__, 'child']).returncode)"
    code, out, err, _ = job(tmp_path, 1, body)
    assert (code, out, err) == (0, "Grid(data=1)\n" * 2, "")


ODD = [
    {"PMI_SIZE": "b", "PMI_RANK": "a"},
    {"PMI_SIZE": "", "PMI_RANK": "", "PMI_FD": "", "PMI_PORT": "", "PMIX_RANK": ""},
    {"OMPI_COMM_WORLD_SIZE": "", "OMPI_COMM_WORLD_RANK": "x"},
    {"SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": "", "SLURM_JOB_ID": ""},
    {"PMI_SIZE": "1", "PMI_RANK": "0", "PMI_FD": "987"},
]


@pytest.mark.parametrize("variables", ODD, ids=lambda variables: "-".join(variables))
def test_odd_variables_are_no_launcher(variables):
    code = "import colossal_mpi.runtime.guards as g; g.install(); g.require_mpi(); print(g.launched())"
    done = alone(code, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 0)\n", "")


def test_a_program_from_standard_input_is_refused_in_a_job(tmp_path):
    argv, extra = mpiexec_command(2, ["python3", "-c", ""])
    done = subprocess.run(
        [*argv[:-2], "-"],
        input="import colossal_mpi\n",
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert done.stderr.count("colossal_mpi: error: the program comes from standard input") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_no_rank_outlives_a_killed_mpiexec(tmp_path):
    process = start(tmp_path, 2, "sys.stdout.write(f'{os.getpid()}\\n'); sys.stdout.flush()\ntime.sleep(60)")
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    wait_for(lambda: not any(running(pid) for pid in pids))
    assert not [pid for pid in pids if running(pid)]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
