"""Check of the MPI library, its launcher, its thread level, and its access to GPU memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpi4py import MPI

from colossal_mpi.apps.doctor.facts import Facts, nodes
from colossal_mpi.apps.doctor.finding import BAD, GOOD, WARNING, Finding
from colossal_mpi.errors import ColossalError
from colossal_mpi.platform import cuda_aware
from colossal_mpi.runtime import guards, launcher

_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


def check(facts: Sequence[Facts]) -> list[Finding]:
    """Return findings about the library, the launcher and the thread level."""
    return [_library(facts[0]), _launcher(facts), _threads(facts)]


def _library(one: Facts) -> Finding:
    major, minor = MPI.Get_version()
    built = Path(MPI.__file__).name.split(".")[1]  # MPI.mpich.cpython-...: mpi4py's wheels have one for each ABI
    abi = f"ABI of {built}" if built in ("mpich", "openmpi", "impi") else "mpi4py built for it"
    text = f"{one['library']}, MPI {major}.{minor}, {abi}"
    files = list(dict.fromkeys(os.path.realpath(path) for path in one["libraries"]))
    folders = {os.path.dirname(path) for path in files}
    if len(folders) > 1:
        remedy = "build every package that uses MPI against one library: pip install --no-binary=mpi4py,h5py ..."
        return Finding("MPI", BAD, f"{text}; several MPI libraries are loaded: {', '.join(files)}", remedy)
    return Finding("MPI", GOOD, ", ".join([text, *files[:1]]))


def _launcher(facts: Sequence[Facts]) -> Finding:
    wrong = guards.mismatch()
    if wrong:
        return Finding("launcher", BAD, *wrong)
    hosts = len(nodes(facts))
    if len(facts) > 1:
        return Finding("launcher", GOOD, f"{len(facts)} ranks on {hosts} node{'s' if hosts > 1 else ''}")
    return alone(os.environ)


def alone(env: Mapping[str, str]) -> Finding:
    """Return the finding of a process that runs alone: how to start several."""
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in env and tasks not in ("", "1"):
        return Finding(
            "launcher", WARNING, f"one process alone in an allocation of {tasks} tasks", "start it with srun"
        )
    try:
        right = launcher.mpiexec_command(2, ["true"], env=env)[0][0]
    except ColossalError as problem:
        return Finding("launcher", WARNING, *str(problem).rsplit(": ", 1))
    first = shutil.which("mpiexec", path=env.get("PATH", os.defpath))
    if first and not launcher.can_start(first, MPI.get_vendor()[0]):
        text = f"alone; {first}, first on PATH, belongs to another MPI library than {guards.library()}"
        text += ": each of its ranks would be alone"
        return Finding("launcher", WARNING, text, f"start with {right}, or `colossal-mpi run -n 4 ...`")
    return Finding("launcher", GOOD, f"one process alone; {right} starts more")


def _threads(facts: Sequence[Facts]) -> Finding:
    least = min(one["threads"] for one in facts)
    if least == MPI.THREAD_MULTIPLE:
        return Finding("threads", GOOD, "MPI may be called from any thread (multiple)")
    remedy = "leave mpi4py.rc.thread_level at 'multiple'; if the library gives no more, build it with threads"
    return Finding("threads", WARNING, f"MPI's thread level is {_LEVELS[least]}: no other thread may call it", remedy)


def aware(device: str, world: MPI.Comm) -> Finding:
    """Return whether MPI reads GPU memory, and how that is known. Collective: see `cuda_aware.agreed`."""
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        found = cuda_aware.agreed(device, world, node)
    except ColossalError as problem:  # all ranks have the same wrong variable
        return Finding("CUDA", BAD, *str(problem).split(": ", 1))
    finally:
        node.Free()
    if device == "cpu" or found.aware:
        return Finding("CUDA", GOOD, str(found) if device != "cpu" else f"no GPU is used: {found.reason}")
    remedy = "for speed, an MPI that is built with CUDA and mpi4py built against it (--no-binary=mpi4py)"
    return Finding("CUDA", WARNING, str(found), remedy)
