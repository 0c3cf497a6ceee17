"""The machine that is planned for: measured where the program runs, or as it is told."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import threadpoolctl
from pydantic import ByteSize, TypeAdapter, ValidationError

from colossal_mpi.apps.config import Config
from colossal_mpi.apps.planning.measure import measure
from colossal_mpi.apps.text import si, significant
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import kernels
from colossal_mpi.meta.machine import Link, Machine

_FLOP_PER_BYTE, _CALL, _PRODUCT = 200, 5e-6, 50e-6
"""Of accelerators: flop of products for a byte of memory, seconds of a kernel's launch and of a product's Python."""
_NEAR, _FAR = Link(5e-6, 150e9), Link(10e-6, 25e9)
"""Links that are assumed where there is nothing to measure: NVLink, and one 200 Gbit/s port for each rank."""
_RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Given:
    """What is said of the ranks of a machine; None of what is not."""

    flops: float | None = None
    memory_bandwidth: float | None = None
    latency: float | None = None
    bandwidth: float | None = None
    near_bandwidth: float | None = None
    ranks_per_node: int | None = None


def machine_of(config: Config, ranks: int, given: Given) -> tuple[Machine, str]:
    """Return a machine and where its rates are from.

    Without ``flops`` it is the one on which this program runs, all of its ranks together or, alone, one of `ranks` with
    a core for each; with it, another one, of which the rest is assumed where it is not given.

    Raises
    ------
    ConfigError
        If a rate is not positive.
    """
    for name, value in vars(given).items():
        if value is not None and value <= 0:
            raise ConfigError(f"plan: --{name.replace('_', '-')} {value:g}: rates are above 0")
    if given.flops:
        base = Machine(given.flops, given.flops / _FLOP_PER_BYTE, _CALL, _PRODUCT, _NEAR, _FAR, _RANKS_PER_NODE)
        return _with(base, given), "given, the rest as of GPUs"
    grid = Grid(None, config.parallel.device, data=world_size())
    kernels.use(config.parallel.kernels, grid)
    with threadpoolctl.threadpool_limits(1) if grid.size < ranks else nullcontext():
        found = measure(grid, config.parallel.dtype)
    if grid.size == 1:
        found = replace(found, near=_NEAR, far=_FAR)
    return _with(found, given), "measured here" + (", links assumed" if grid.size == 1 else "")


def _with(machine: Machine, given: Given) -> Machine:
    """Return a machine with what is given in the place of what is not."""
    near, far = (
        Link(given.latency or link.latency, bandwidth or link.bandwidth)
        for link, bandwidth in ((machine.near, given.near_bandwidth), (machine.far, given.bandwidth))
    )
    return replace(
        machine,
        memory=given.memory_bandwidth or machine.memory,
        near=near,
        far=far,
        ranks_per_node=given.ranks_per_node or machine.ranks_per_node,
    )


def about(machine: Machine) -> str:
    """Return the rates of a rank in words."""
    links = [f"{micro(x.latency)} and {si(x.bandwidth, 'B/s')}" for x in (machine.near, machine.far)]
    return (
        f"{si(machine.flops, 'flop/s')} of products, {si(machine.memory, 'B/s')} of memory, {micro(machine.call)} a "
        f"call and {micro(machine.product)} a product besides; a message {links[0]} within "
        f"{machine.ranks_per_node} ranks of a node, {links[1]} between nodes"
    )


def micro(seconds: float) -> str:
    """Return a short time in words."""
    return f"{significant(seconds * 1e6)} us"


def size_of(text: str) -> int:
    """Return the bytes of a size such as ``80GiB``.

    Raises
    ------
    ConfigError
        If it is none.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"{text!r} is no size in bytes: write for example 80GiB or 512MB") from None
