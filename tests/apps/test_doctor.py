"""``colossal-mpi doctor`` finds planted problems, however it is started; each check judges made-up facts rightly."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mpi4py import MPI
from rich.console import Console

import colossal_mpi
from colossal_mpi.apps.doctor import cores, disk, facts, gpus, mpi, network, program, show
from colossal_mpi.apps.doctor.finding import BAD, GOOD, WARNING, Finding, named, worst
from colossal_mpi.runtime.launcher import cpus, mpiexec_command
from tests import command_line

ROOT = Path(__file__).parents[2]
OPEN_MPI = MPI.get_vendor()[0] == "Open MPI"
DOCTOR = [sys.executable, "-m", "colossal_mpi.apps.cli", "doctor", "--seconds", "0.2", "--json"]
QUICK = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm", "PRTE_MCA_hwloc_default_binding_policy": "none"}
UNSET = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"}


def call(command, **more):
    env = {name: value for name, value in os.environ.items() if name not in UNSET}
    env |= {"PYTHONPATH": str(ROOT), **QUICK, **more}
    # python -m would prefer a colossal_mpi in the current folder
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False)


def diagnosis(result):
    """Return the level of each topic, and text and remedy of the bad ones; check that only one rank has printed."""
    told = json.loads(result.stdout)
    assert (told["level"] == BAD) == (result.returncode == 1), result.stderr
    return told, {one["topic"]: one["text"] + " -> " + one["remedy"] for one in told["findings"] if one["level"] == BAD}


def test_alone_it_finds_a_directory_that_cannot_be_written(tmp_path):
    # even root cannot write here
    directory = Path("/proc/runs") if os.geteuid() == 0 else tmp_path / "runs"
    tmp_path.chmod(0o500)
    told, bad = diagnosis(call([*DOCTOR, "--directory", str(directory)]))
    tmp_path.chmod(0o700)
    assert set(bad) == {"disk"}
    assert f"the run directory {directory} cannot be written: " in bad["disk"]
    assert "choose another with --directory" in bad["disk"]
    assert told["ranks"] == 1


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(seconds):
    told = command_line.call("doctor", "--seconds", seconds)
    assert told.returncode == 1
    assert f"doctor: seconds={float(seconds)}: use a time in seconds, 0 or more" in told.stderr


@pytest.mark.skipif(len(cpus()) < 2, reason="BLAS has no more threads than cores")
def test_under_mpiexec_it_finds_too_many_blas_threads(tmp_path):
    many = len(cpus())
    command, env = mpiexec_command(2, [*DOCTOR, "--directory", str(tmp_path / "new" / "runs")])
    told, bad = diagnosis(call(command, **env, OPENBLAS_NUM_THREADS=str(many)))
    assert set(bad) == {"BLAS"}
    assert f"{2 * many} BLAS threads of all 2 ranks on " in bad["BLAS"]
    assert f"instead of OPENBLAS_NUM_THREADS={many}" in bad["BLAS"]
    assert [link["name"] for link in told["network"]] == ["ranks 0, 1", "allreduce of 2"]
    assert all(0 < link["latency"] < 1 < link["bandwidth"] for link in told["network"])
    assert not (tmp_path / "new").exists()


def test_it_finds_the_launcher_of_another_mpi(tmp_path):
    wrong = tmp_path / "mpiexec"
    told = "PMI_SIZE=2 PMI_RANK=$rank"
    if not OPEN_MPI:
        told = "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=$rank PMIX_RANK=$rank PRTE_LAUNCHED=1"
    wrong.write_text(f'#!/bin/sh\nfor rank in 1 0; do env {told} "$@" & done\nwait $!\n')
    wrong.chmod(0o755)
    _, bad = diagnosis(call([str(wrong), *DOCTOR, "--directory", str(tmp_path)]))
    assert set(bad) == {"launcher"}
    assert f"the launcher does not belong to {MPI.get_vendor()[0]} " in bad["launcher"]
    assert "mpiexec, or `colossal-mpi run -n 2 ...`" in bad["launcher"]


def test_it_finds_another_source_on_one_rank(tmp_path):
    shutil.copytree(Path(colossal_mpi.__file__).parent, tmp_path / "colossal_mpi")
    with (tmp_path / "colossal_mpi" / "errors.py").open("a") as file:
        file.write("# another version\n")
    command, env = mpiexec_command(1, DOCTOR)
    other = ["-n", "1", "env", f"PYTHONPATH={tmp_path}", *DOCTOR]
    _, bad = diagnosis(call([*command, ":", *other], **env))
    assert set(bad) == {"program"}
    assert "the source of colossal_mpi differs: " in bad["program"]
    assert f"on rank 1 ({os.uname().nodename})" in bad["program"]


GPU = {"installed": [], "seen": [], "taken": None, "visible": None}


def rank(number, **more):
    """Return the facts of a healthy rank on a node of four cores, with some of them changed."""
    healthy = {
        **{"rank": number, "node": 0, "number": number, "host": "a", "python": "3.12.1", "executable": "python"},
        **{"source": "f00", "versions": {"numpy": "2.0"}, "library": "MPICH 5.0.2", "libraries": []},
        **{"threads": MPI.THREAD_MULTIPLE, "cpus": [0, 1, 2, 3], "quota": None, "load": 0.0},
        **{"blas": [("openblas", 1)], "settings": {}, "hdf5": ("3", "2", False), "gpus": GPU},
    }
    return healthy | more


def bound(number, count):
    return rank(number, blas=[("openblas", count)], cpus=[number])


@pytest.mark.parametrize(
    ("known", "level", "words"),
    [
        ([rank(i) for i in range(4)], GOOD, "1 thread for each rank"),
        ([rank(i) for i in range(5)], WARNING, "all 5 ranks share 4 cores of a"),
        ([rank(i, blas=[("openblas", 2)]) for i in range(2)], GOOD, "2 threads for each rank"),
        ([rank(i, blas=[("openblas", 4)]) for i in range(2)], BAD, "export OMP_NUM_THREADS=2"),
        ([bound(0, 1), bound(1, 1)], GOOD, "2 ranks and 2 cores on a node"),
        ([bound(0, 2), rank(1, cpus=[1, 2, 3])], BAD, "rank 0 has 2 BLAS threads and is bound to 1 CPU"),
        ([rank(i, quota=1.5) for i in range(3)], WARNING, "share 2 cores"),
        ([rank(0, load=9.0)], WARNING, "9 processes want the 4 cores"),
        ([rank(0), rank(1, node=1, host="b", blas=[("mkl", 8)])], BAD, "8 BLAS threads of rank 1 on 4 cores of b"),
    ],
)
def test_cores(known, level, words):
    found = cores.check(known)
    assert worst(found) == level
    assert any(words in f"{one.text} -> {one.remedy}" for one in found)


def gpu(number, seen, taken, **more):
    names = [(f"0000:{i}b:00.0", "H100") for i in seen]
    return rank(number, gpus={"installed": ["x"] * 4, "seen": names, "taken": taken, "visible": None, **more})


@pytest.mark.parametrize(
    ("known", "level", "words"),
    [
        ([rank(0)], GOOD, "none in these machines"),
        ([gpu(i, [0, 1, 2, 3], i) for i in range(2)], GOOD, "rank 1: 0000:1b:00.0 (H100)"),
        ([gpu(0, [], None)], WARNING, "pip install colossal-mpi[cuda12]"),
        ([gpu(0, [], None, visible="") | {"versions": {"cupy-cuda12x": "13"}}], WARNING, "unset CUDA_VISIBLE_DEVICES"),
        ([gpu(i, [i], 0) for i in range(2)], WARNING, "rank 0 sees 1 of the 2 GPUs of the job on a"),
        ([gpu(i, [0, 1], i % 2) for i in range(3)], WARNING, "ranks 0, 2 share GPU 0000:0b:00.0"),
    ],
)
def test_gpus(known, level, words):
    found = gpus.check(known)
    assert worst(found) == level
    assert any(words in f"{one.text} -> {one.remedy}" for one in found)


def test_programs_that_differ_are_told_by_value_and_host():
    assert worst(program.check([rank(0), rank(1)])) == GOOD
    known = [rank(i, host="b" if i == 2 else "a", python="3.13.0" if i == 2 else "3.12.1") for i in range(4)]
    (found,) = program.check(known)
    assert (found.level, found.text) == (BAD, "Python differs: 3.12.1 on ranks 0-1, 3 (a); 3.13.0 on rank 2 (b)")
    (found,) = program.check([rank(0), rank(1, versions={})])
    assert found.text == "numpy differs: 2.0 on rank 0 (a); none on rank 1 (a)"


def test_library_and_threads():
    low = [rank(0), rank(1, threads=MPI.THREAD_FUNNELED, node=1)]
    library, launcher, threads = mpi.check(low)
    assert (library.level, launcher.text) == (GOOD, "2 ranks on 2 nodes")
    assert (threads.level, "funneled" in threads.text) == (WARNING, True)
    two = mpi.check([rank(0, libraries=["/a/libmpi.so.12", "/b/libmpi.so.40"])])[0]
    assert (two.level, "/a/libmpi.so.12, /b/libmpi.so.40" in two.text) == (BAD, True)


def test_alone_it_looks_at_the_mpiexec_on_the_path(tmp_path):
    foreign = tmp_path / "mpiexec"
    foreign.write_text("#!/bin/sh\necho 'MPI of nobody'\n")
    foreign.chmod(0o755)
    found = mpi.alone({"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (found.level, f"{foreign}, first on PATH, belongs to another MPI library" in found.text) == (WARNING, True)
    assert "one process alone in an allocation of 8 tasks" in mpi.alone({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}).text


@pytest.mark.parametrize(("limits", "expected"), [([], None), (["max 100000", "150000 100000", "400000 100000"], 1.5)])
def test_quota_is_the_least_of_the_groups(tmp_path, limits, expected):
    group = tmp_path / "root"
    (group / "a" / "b").mkdir(parents=True)
    for folder, limit in zip([group, group / "a", group / "a" / "b"], limits, strict=False):
        (folder / "cpu.max").write_text(f"{limit}\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert facts.quota(group, tmp_path / "cgroup") == expected


def test_disk_leaves_nothing_behind(tmp_path):
    found = disk.check(tmp_path / "x" / "runs", MPI.COMM_SELF)
    assert "written and flushed at " in found[0].text
    assert list(tmp_path.iterdir()) == []
    failed = [("", 1, 1.0, 1.0, "a"), ("No such file or directory", 0, 1.0, 1.0, "b")]
    judged = disk._judge(Path("runs"), failed, 10**12, "nfs")
    assert (judged.level, judged.text.startswith("rank 1 (b) cannot use the run directory")) == (BAD, True)
    slow = disk._judge(Path("runs"), [("", 10**6, 2.0, 1.0, "a")], 10**12, "nfs")
    assert slow.level == WARNING


def test_links_are_judged_by_where_they_are():
    known = [rank(i, node=i // 2 * 2) for i in range(8)]
    assert network.partners(known) == [1, 2, 4, 6]
    fast = network.NamedLink(1e-6, 5e9, "ranks 0, 1", near=True)
    assert worst(network.check([fast, replace(fast, near=False)], "")) == GOOD
    late, narrow = replace(fast, latency=1e-3), replace(fast, near=False, bandwidth=1e8)
    assert network.check([late], "rest")[0].remedy == "rest"
    assert "TCP" in network.check([narrow], "")[0].remedy
    assert cores.remedy_for_late_messages([rank(i) for i in range(5)]) == "start fewer ranks than cores"
    assert "yield_when_idle" in cores.remedy_for_late_messages([rank(0, library="Open MPI 5.0.11")])


def test_the_table_fits_and_the_lines_tell_all():
    findings = [
        Finding("MPI", GOOD, "fine"),
        Finding("disk", BAD, "full " * 30, "make room"),
        program.optional_packages([rank(0)]),
    ]
    links = [network.NamedLink(1.5e-6, 5.25e9, "ranks 0, 1", near=True)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show.table(findings), show.measured(links), show.summary(findings))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert all(word in text for word in ("-> make room", "1.5 us", "5.25 GB/s", "1 bad, 2 good"))
    plain = show.lines(findings, links)
    assert plain[0].split() == ["good", "MPI", "fine"]
    assert plain[2].strip() == "-> make room"
    assert "not installed (extra): torch [torch]" in plain[3]


def test_ranks_are_named_in_spans():
    assert [named(ranks, 6) for ranks in ([3], [0, 1, 2, 5], range(6))] == ["rank 3", "ranks 0-2, 5", "all 6 ranks"]
