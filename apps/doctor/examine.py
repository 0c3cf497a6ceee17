"""Run all checks: every rank takes part, rank 0 judges and prints."""

from __future__ import annotations

from pathlib import Path

from mpi4py import MPI

from colossal_mpi.apps.doctor import cores, disk, facts, gpus, mpi, network, packages, same, show
from colossal_mpi.apps.doctor.finding import BAD, Finding, worst
from colossal_mpi.apps.doctor.network import NamedLink
from colossal_mpi.platform import backend
from colossal_mpi.runtime import guards


def main(directory: Path, seconds: float, json: bool) -> int:
    """Examine this job and print the diagnosis; return 1 if something is bad, else 0, on all ranks.

    Parameters
    ----------
    directory : Path
        Of the runs.
    seconds : float
        For all measurements between ranks.
    json : bool
        Print JSON.

    **Communication:** small objects, files on the disk, and the messages that are measured.
    """
    world = MPI.COMM_WORLD
    if guards.mismatch() and guards.launched()[1] != 0:
        return 0  # each is a job of its own: the one that the launcher calls rank 0 speaks, and fails
    findings, links = examine(world, directory, seconds)
    if world.rank == 0:
        if json:
            print(show.as_json(world.size, findings, links))
        else:
            show.show(findings, links)
    return 1 if world.bcast(worst(findings)) == BAD else 0


def examine(world: MPI.Intracomm, directory: Path, seconds: float) -> tuple[list[Finding], list[NamedLink]]:
    """Return what was found, on rank 0; other ranks return what is of no use."""
    known = world.allgather(facts.mine(world))
    program = same.check(known)
    if worst(program) == BAD:  # programs that differ may not even send the same messages
        return [*program, *mpi.check(known)], []
    device = backend.resolve_device("auto", known[world.rank]["number"])
    found = [*program, *mpi.check(known), mpi.aware(device, world), *gpus.check(known), *cores.check(known)]
    found += [disk.files(known), *disk.check(directory, world)]
    links = network.measure(known, world, seconds)
    found += network.check(links, cores.quieter(known))
    return [*found, packages.check(known)], links
