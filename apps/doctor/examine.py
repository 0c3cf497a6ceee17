"""Run the examination: every rank takes part, rank 0 judges and prints."""

from __future__ import annotations

import math
from pathlib import Path

from mpi4py import MPI

from colossal_mpi.apps.doctor import cores, disk, facts, gpus, mpi, network, program, show
from colossal_mpi.apps.doctor.finding import BAD, Finding, worst
from colossal_mpi.apps.doctor.network import NamedLink
from colossal_mpi.errors import OptionError
from colossal_mpi.platform import backend
from colossal_mpi.runtime import guards


def diagnose(directory: Path, seconds: float, json: bool) -> int:
    """Examine this job and print the diagnosis on rank 0. Collective over all ranks.

    Parameters
    ----------
    directory : Path
        The directory for runs. It may be missing; the examination leaves nothing in it.
    seconds : float
        Time for all measurements between ranks, in seconds, 0 or more.
    json : bool
        Whether to print JSON instead of a table.

    Returns
    -------
    int
        1 if a finding is bad, else 0; the same on all ranks.

    Raises
    ------
    LaunchError
        If this process is no rank: a rank started it, or MPI is not initialised.
    OptionError
        If `seconds` is negative, infinite or NaN.

    Notes
    -----
    **Communication:** an allgather of small objects, barriers while files are written, and the messages that are
    measured: pings between rank 0 and some ranks, and allreduces over all ranks.

    Examples
    --------
    >>> code = diagnose(Path("runs"), seconds=4.0, json=False)
    """
    if not 0 <= seconds < math.inf:
        raise OptionError(f"doctor: seconds={seconds}: use a time in seconds, 0 or more, for example 4")
    guards.require_mpi()
    world = MPI.COMM_WORLD
    if guards.mismatch() and guards.launched()[1] != 0:
        return 0  # each process is its own job: only the launcher's rank 0 prints, and fails
    findings, links = examine(world, directory, seconds)
    if world.rank == 0:
        if json:
            print(show.as_json(world.size, findings, links))
        else:
            show.show(findings, links)
    return 1 if world.bcast(worst(findings)) == BAD else 0


def examine(world: MPI.Intracomm, directory: Path, seconds: float) -> tuple[list[Finding], list[NamedLink]]:
    """Return the findings and the measured links on rank 0; the results of other ranks have no meaning."""
    known = world.allgather(facts.gather(world))
    programs = program.check(known)
    if worst(programs) == BAD:  # programs that differ may not even send the same messages
        return [*programs, *mpi.check(known)], []
    device = backend.resolve_device("auto", known[world.rank]["number"])
    found = [*programs, *mpi.check(known), mpi.aware(device, world), *gpus.check(known), *cores.check(known)]
    found += [disk.files(known), *disk.check(directory, world)]
    links = network.measure(known, world, seconds)
    found += network.check(links, cores.remedy_for_late_messages(known))
    return [*found, program.optional_packages(known)], links
