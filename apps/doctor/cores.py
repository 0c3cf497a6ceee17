"""Check of ranks and BLAS threads against the cores of each node."""

from __future__ import annotations

import math
from collections.abc import Sequence

from colossal_mpi.apps.doctor.facts import Facts, nodes
from colossal_mpi.apps.doctor.finding import BAD, GOOD, WARNING, Finding, named

# 4 ranks on 2 cores were 6.5 times slower with the number of threads that BLAS chooses than with one thread each.
_SLOW = "several times slower than one thread for each rank"


def check(facts: Sequence[Facts]) -> list[Finding]:
    """Return findings about ranks, BLAS threads and other programs: one for each node where something is wrong."""
    groups = nodes(facts)
    ranks = [found for node in groups if (found := _ranks(node, len(facts)))]
    threads = [found for node in groups if (found := _threads(node, len(facts)))]
    busy = [found for node in groups if (found := _busy(node))]
    least = min(cores(node) for node in groups)
    most = max(len(node) for node in groups)
    return [
        *(ranks or [Finding("cores", GOOD, f"{_many(most, 'rank')} and {_many(least, 'core')} on a node")]),
        *(threads or [_good(facts)]),
        *busy,
    ]


def cores(node: Sequence[Facts]) -> int:
    """Return the number of CPUs that the ranks of a node may use together."""
    allowed = len({cpu for one in node for cpu in one["cpus"]})
    quotas = [math.ceil(one["quota"]) for one in node if one["quota"]]
    return max(1, min([allowed, *quotas]))


def remedy_for_late_messages(facts: Sequence[Facts]) -> str:
    """Return the remedy for late messages within a node: a rank may wait for a core."""
    crowded = any(len(node) > cores(node) for node in nodes(facts))
    remedy = "start fewer ranks than cores" if crowded else "see that nothing else runs on the node's cores"
    if facts[0]["library"].startswith("Open MPI"):
        remedy += "; ranks that share cores need OMPI_MCA_mpi_yield_when_idle=1"
    return remedy


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _ranks(node: Sequence[Facts], size: int) -> Finding | None:
    have = cores(node)
    if len(node) <= have:
        return None
    who = named((one["rank"] for one in node), size)
    text = f"{who} share {_many(have, 'core')} of {node[0]['host']}: each message waits for its rank's turn"
    return Finding(
        "cores", WARNING, text, f"start at most {have} there, or bind less tightly (--cpus-per-task, --bind-to none)"
    )


def _busy(node: Sequence[Facts]) -> Finding | None:
    load, have = max(one["load"] for one in node), cores(node)
    if load <= have + len(node):  # the load already counts the ranks themselves
        return None
    text = f"{load:.0f} processes want the {_many(have, 'core')} of {node[0]['host']}: other programs run there"
    return Finding("cores", WARNING, text, "ask the scheduler for whole nodes (--exclusive), or wait")


def _count(one: Facts) -> int:
    return max((threads for _, threads in one["blas"]), default=1)


def _threads(node: Sequence[Facts], size: int) -> Finding | None:
    have, total = cores(node), sum(_count(one) for one in node)
    busy = max(node, key=_count)
    if _count(busy) == 1:
        return None
    share = max(1, have // len(node))
    settings = ", ".join(f"{name}={value}" for name, value in busy["settings"].items())
    remedy = f"export OMP_NUM_THREADS={share}" + (f" instead of {settings}" if settings else "")
    if total > have:
        text = f"{_many(total, 'BLAS thread')} of {named((one['rank'] for one in node), size)} on {_many(have, 'core')}"
        return Finding("BLAS", BAD, f"{text} of {node[0]['host']}: {_SLOW}", remedy)
    narrow = next((one for one in node if _count(one) > len(one["cpus"])), None)
    if narrow:
        text = f"rank {narrow['rank']} has {_count(narrow)} BLAS threads and is bound to {len(narrow['cpus'])} CPU"
        return Finding("BLAS", BAD, f"{text}: {_SLOW}", f"srun --cpus-per-task={_count(narrow)}, or one thread each")
    return None


def _good(facts: Sequence[Facts]) -> Finding:
    names = " and ".join(dict.fromkeys(name for name, _ in facts[0]["blas"])) or "an unnamed BLAS"
    counts = sorted({_count(one) for one in facts})
    threads = f"{counts[0]} to {counts[-1]} threads" if len(counts) > 1 else _many(counts[0], "thread")
    return Finding("BLAS", GOOD, f"{names}, {threads} for each rank")
