"""The launcher finds the right mpiexec and forwards signals. Each job is a subprocess; pytest is never a rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from colossal_mpi.apps import launch
from colossal_mpi.errors import ConfigError, LaunchError
from colossal_mpi.runtime import launcher

ROOT = Path(__file__).parents[2]
RUN = "import sys\nfrom colossal_mpi.apps.launch import run\nsys.exit(run(2, sys.argv[1:]))"
HELLO = "from mpi4py import MPI\nimport sys\nsys.stdout.write(f'[{MPI.COMM_WORLD.size}]')\n"
VERSIONS = {"MPICH": "HYDRA build details:", "Open MPI": "mpiexec (Open MPI) 5.0.11", "Intel MPI": "Intel(R) MPI"}


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "job.py"
        path.write_text(text)
        return str(path)

    return write


def start(*command, **more):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def fake_mpiexec(folder, says):
    folder.mkdir()
    path = folder / "mpiexec"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def test_ranks_of_a_python_file_form_one_job(script):
    process = start(script(HELLO))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "[2][2]")
    assert err.startswith("$ ")
    assert "-n 2" in err
    assert err.count("\n") == 1


def test_exit_code_of_the_job_is_returned(script):
    process = start(script("import sys; sys.exit(5)"))
    process.communicate(timeout=30)
    assert process.returncode == 5


def test_own_rank_variables_are_not_inherited(script):
    # srun -n 1 and mpiexec -n 1 set these variables for the only rank, which calls run.
    process = start(script(HELLO), PMI_SIZE="1", PMI_RANK="0", PMIX_SERVER_URI2="gone")
    assert process.communicate(timeout=30)[0] == "[2][2]"


def test_import_leaves_no_rank_variables():
    code = "import os, subprocess, colossal_mpi.runtime.guards as g; g.install(); subprocess.run(['env'])"
    env = {"PATH": os.environ["PATH"], "HOME": str(Path.home()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert "PATH" in names
    assert not [name for name in names if "MPI" in name or "PMI" in name or "HYD" in name]


def test_dry_run_prints_and_starts_nothing(script, tmp_path, capfd):
    path = script(f"open({str(tmp_path / 'made')!r}, 'w')")
    assert launch.run(3, [path, "--name", "a b"], dry_run=True) == 0
    assert capfd.readouterr().err.endswith(f"-n 3 {launch._short(sys.executable)} {path} --name 'a b'\n")
    assert not (tmp_path / "made").exists()


BLOCKED = """
import signal, sys
signal.alarm(25)  # the deadline of this test
import colossal_mpi.runtime.guards as guards
guards.install()
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
sys.stdout.write("ready\\n")
sys.stdout.flush()
MPI.COMM_WORLD.recv(source=MPI.COMM_WORLD.rank)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_job_that_is_inside_mpi(script, number):
    process = start(script(BLOCKED))
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    begin = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert time.monotonic() - begin < 8


@pytest.mark.parametrize("vendor", VERSIONS)
def test_mpiexec_of_the_library_is_found_behind_others(tmp_path, monkeypatch, vendor):
    others = {"MPICH", "Intel MPI"} if vendor == "Open MPI" else {"Open MPI"}
    paths = {name: fake_mpiexec(tmp_path / name, VERSIONS[name]) for name in [*others, vendor]}
    monkeypatch.setattr(launcher, "_here", lambda: str(tmp_path))
    env = {"PATH": os.pathsep.join(os.path.dirname(path) for path in paths.values())}
    assert launcher._mpiexec(vendor, env) == paths[vendor]


def test_mpiexec_of_another_library_is_refused(tmp_path, monkeypatch):
    foreign = fake_mpiexec(tmp_path / "bin", "mpiexec (Open MPI) 5.0.11")
    monkeypatch.setattr(launcher, "_here", lambda: str(tmp_path))
    with pytest.raises(LaunchError, match="mpi4py uses MPICH") as caught:
        launcher._mpiexec("MPICH", {"PATH": os.path.dirname(foreign)})
    assert foreign in str(caught.value)


@pytest.mark.parametrize(
    ("uid", "cores", "env", "expected"),
    [
        (1000, 4, {}, ([], {})),
        (0, 4, {}, (["--allow-run-as-root"], {})),
        (1000, 2, {}, (["--oversubscribe", "--bind-to", "none"], {"OMPI_MCA_mpi_yield_when_idle": "1"})),
        (1000, 2, {"SLURM_JOB_ID": "7"}, ([], {})),
    ],
    ids=["fits", "root", "oversubscribed", "allocation"],
)
def test_open_mpi_gets_only_what_it_needs(monkeypatch, uid, cores, env, expected):
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(launcher, "_cores", lambda: cores)
    assert launcher._open_mpi(4, env) == expected


HERE = os.uname().nodename
LOCAL = ["-rmk", "user", "-launcher", "fork"]
SLURM = {"SLURM_JOB_ID": "7", "PATH": "/nonexistent"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, []),
        (SLURM, LOCAL),
        (SLURM | {"SLURM_JOB_NODELIST": HERE}, LOCAL),
        (SLURM | {"SLURM_NODELIST": "localhost"}, LOCAL),
        (SLURM | {"SLURM_JOB_NODELIST": "n[1-3]", "HYDRA_LAUNCHER": "ssh"}, []),
        ({"PBS_JOBID": "1", "PBS_NODEFILE": "/nonexistent"}, LOCAL),
        ({"PBS_JOBID": "1", "PBS_NODEFILE": "FILE"}, []),
        ({"LSB_JOBID": "1", "LSB_HOSTS": f"{HERE} {HERE}"}, LOCAL),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": f"{HERE} 2 other 2"}, []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mpich_starts_ranks_on_this_node_under_any_scheduler(tmp_path, env, expected):
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{HERE}\nother.site.org\n")
    assert launcher._hydra({name: value.replace("FILE", str(hosts)) for name, value in env.items()}) == expected


def test_nodes_that_cannot_be_reached_are_refused():
    with pytest.raises(LaunchError, match=r"belong on n\[1-3\].*srun.*HYDRA_LAUNCHER=fork"):
        launcher._hydra(SLURM | {"SLURM_JOB_NODELIST": "n[1-3]"})


@pytest.mark.skipif(MPI.get_vendor()[0] != "MPICH", reason="the mpiexec of MPICH asks the scheduler")
@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"PBS_JOBID": "1", "PBS_NODEFILE": "/nonexistent"},
    ],
    ids=["salloc", "srun-pty", "pbs"],
)
def test_a_job_starts_under_the_variables_of_a_scheduler(script, variables):
    out, err = start(script(HELLO), **variables).communicate(timeout=30)
    assert out == "[2][2]", err


@pytest.mark.parametrize(
    "command", [["python", "-"], ["python3"], ["python", "-X", "dev", "-u"], ["python", "/dev/stdin"]]
)
def test_a_program_from_standard_input_is_refused(command):
    with pytest.raises(LaunchError, match="the program comes from standard input, which mpiexec gives to rank 0 alone"):
        launch.mpiexec_command(2, command)
    for allowed in (["python", "-c", "1"], ["python", "-m", "this", "-"], ["python", "-V"]):
        launch.mpiexec_command(2, allowed)
    launch.mpiexec_command(1, command)


@pytest.mark.parametrize(
    ("n", "command", "message"),
    [
        (0, ["true"], "-n 0: a job has at least one rank"),
        (2, [], "nothing to run"),
        (2, ["missing.py"], "missing.py: no such file in"),
        (2, ["no-such-program"], "no-such-program: no such program"),
    ],
)
def test_what_cannot_be_run_is_refused(n, command, message):
    with pytest.raises(ConfigError, match=message):
        launch.mpiexec_command(n, command)


def test_rank_of_a_job_is_refused(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "2")
    with pytest.raises(LaunchError, match="rank 2 of 4"):
        launch.mpiexec_command(2, ["true"])


def test_programs_of_this_environment_come_first():
    argv, _ = launch.mpiexec_command(2, ["python", "-V"], env={"PATH": "/usr/bin"})
    assert argv[-2:] == [os.path.join(os.path.dirname(sys.executable), "python"), "-V"]
    assert MPI.get_vendor()[0] in launcher._VERSION_WORDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_never_counts_as_done(tmp_path, number):
    polite = tmp_path / "mpiexec"
    polite.write_text("#!/bin/sh\ntrap 'exit 0' INT TERM\necho ready\nwhile :; do sleep 0.05; done\n")
    polite.chmod(0o755)
    code = f"import sys\nfrom colossal_mpi.apps import launch\nsys.exit(launch._wait([{str(polite)!r}], {{}}))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
