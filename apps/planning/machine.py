"""The machine that a plan is for: measured where the program runs, or described by the user.

The commands of this package call `machine_of`. It takes the rates of ``colossal_mpi.machine.measure`` and calibrates
them: `calibrate` runs small programs of layers and divides their time by what a dry run counts in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import threadpoolctl
from mpi4py import MPI
from pydantic import ByteSize, TypeAdapter, ValidationError

from colossal_mpi import distarray
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.text import si, significant
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import GELU, AdamW, Context, Layer, LayerNorm, Parallelism, Sequential, kernels
from colossal_mpi.layers.analysis import dry_run
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layout import Layout
from colossal_mpi.machine import FREE_LINK, Clock, Link, Machine, measure, median_difference, median_seconds

_FLOP_PER_BYTE, _CALL, _PRODUCT = 200, 5e-6, 50e-6
"""Assumptions about an accelerator: flop of products per byte of memory, seconds of a kernel's launch, and seconds of
Python for a product."""
_NEAR, _FAR = Link(5e-6, 150e9), Link(10e-6, 25e9)
"""Links that are assumed where none can be measured: NVLink, and one 200 Gbit/s port for each rank."""
_RANKS_PER_NODE = 8

_TINY = GPTConfig(vocabulary=8, layers=2, hidden=8, heads=2, positions=8)
"""A model so small that its step takes only overheads."""
_ROWS, _WIDTH = 2048, 512
"""The shape of an array whose passes take the time of its bytes."""
_CALLS = Machine(float("inf"), float("inf"), 1.0, 0.0, FREE_LINK, FREE_LINK, 1)
_PRODUCTS = replace(_CALLS, call=0.0, product=1.0)
_BYTES = replace(_CALLS, call=0.0, memory=1.0)
"""Machines on which only an operation, only a product, or only a byte of an array takes time, one second each."""

Program = Callable[[Parallelism], Callable[[], Any]]
"""Makes an action that can be repeated."""


@dataclass(frozen=True)
class GivenRates:
    """The user's figures for the ranks of a machine; None where the user gives none.

    Parameters
    ----------
    flops : float, optional
        Flop/s of products.
    memory_bandwidth : float, optional
        Bytes/s of a rank's memory.
    latency : float, optional
        Seconds of a message.
    bandwidth : float, optional
        Bytes/s that a rank receives from other nodes.
    near_bandwidth : float, optional
        Bytes/s that a rank receives from its own node.
    ranks_per_node : int, optional
        Ranks on a node.
    """

    flops: float | None = None
    memory_bandwidth: float | None = None
    latency: float | None = None
    bandwidth: float | None = None
    near_bandwidth: float | None = None
    ranks_per_node: int | None = None


def machine_of(config: Config, ranks: int, given: GivenRates) -> tuple[Machine, str]:
    """Return a machine, and a phrase that says where its rates come from.

    Without ``flops`` it is the machine on which this program runs, measured by all ranks of the job; a rank that is
    alone measures as one of `ranks` with a core each. With ``flops`` it is another machine, and rates that the user
    does not give are assumed.

    Raises
    ------
    ConfigError
        If a rate is not positive and finite.
    """
    for name, value in vars(given).items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"plan: --{name.replace('_', '-')} {value:g}: rates are above 0 and finite")
    if given.flops:
        assumed = Machine(given.flops, given.flops / _FLOP_PER_BYTE, _CALL, _PRODUCT, _NEAR, _FAR, _RANKS_PER_NODE)
        return _with(assumed, given), "given, the rest as of GPUs"
    grid = Grid(None, config.parallel.device, data=world_size())
    kernels.use(config.parallel.kernels, grid)
    with threadpoolctl.threadpool_limits(1) if grid.size < ranks else nullcontext():
        measured = calibrate(measure(grid, config.parallel.dtype), grid)
    if grid.size == 1:
        measured = replace(measured, near=_NEAR, far=_FAR)
    return _with(measured, given), "measured here" + (", links assumed" if grid.size == 1 else "")


def _with(machine: Machine, given: GivenRates) -> Machine:
    """Return a machine with the user's rates in place of measured or assumed ones."""
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


def calibrate(machine: Machine, grid: Grid) -> Machine:
    """Return a machine with the memory rate and the overheads that layers have on it.

    `measure` times bare operations on arrays. In a training step Python runs between them, and an activation computes
    more than an addition. The memory rate is taken from the passes of a norm and an activation, the overhead of an
    operation from the update of a model so small that it takes no other time, and the overhead of a product from
    the rest of that model's step.

    Notes
    -----
    **Communication:** gathers of numbers.
    """
    alone = Parallelism(Grid(MPI.COMM_SELF, grid.device.partition(":")[0]))
    kernels.use(kernels.of(grid).name, alone.grid)
    memory = _count(_norm_and_activation, _BYTES) / median_seconds(grid, _norm_and_activation(alone))
    passes, step = _tiny_passes(alone), _tiny_step(alone)
    calls = {program: _count(program, _CALLS) for program in (_tiny_passes, _tiny_step)}
    call = max(0.0, median_difference(grid, step, passes, 2)) / (calls[_tiny_step] - calls[_tiny_passes])
    rest = max(0.0, median_seconds(grid, passes, 2) - calls[_tiny_passes] * call)
    return replace(machine, memory=memory, call=call, product=rest / _count(_tiny_passes, _PRODUCTS))


def _count(program: Program, unit: Machine) -> float:
    """Return the number of units that a program takes: its seconds on a machine on which a unit takes one second."""
    with dry_run(Clock(unit, {}, {})) as tally:
        assert tally.clock is not None
        action = program(Parallelism(Grid.meta()))
        action()  # makes the weights
        before = tally.clock.now()
        action()
        return tally.clock.now() - before


def _passes(layer: Layer, p: Parallelism, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    """Return the forward and backward pass of a layer on zeros, which returns the block of its output."""
    x = distarray.zeros(shape, p.grid, Layout(*[None] * len(shape)), dtype)

    def passes() -> Any:
        y, cache = layer.forward(x, Context())
        layer.backward(y, cache)
        return y.local

    return passes


def _tiny_passes(p: Parallelism) -> Callable[[], Any]:
    return _passes(GPT(_TINY, p), p, (1, _TINY.positions), "int64")


def _tiny_step(p: Parallelism) -> Callable[[], Any]:
    model = GPT(_TINY, p)
    passes, optimizer = _passes(model, p, (1, _TINY.positions), "int64"), AdamW(model.parameters())

    def step() -> Any:
        y = passes()
        optimizer.step()
        return y

    return step


def _norm_and_activation(p: Parallelism) -> Callable[[], Any]:
    return _passes(Sequential(LayerNorm(_WIDTH, p, "norm"), GELU()), p, (_ROWS, _WIDTH), "float32")


def about(machine: Machine) -> str:
    """Return the rates of a rank as a phrase."""
    links = [f"{_microseconds(x.latency)} and {si(x.bandwidth, 'B/s')}" for x in (machine.near, machine.far)]
    return (
        f"{si(machine.flops, 'flop/s')} of products, {si(machine.memory, 'B/s')} of memory, "
        f"{_microseconds(machine.call)} a call and {_microseconds(machine.product)} a product besides; a message "
        f"{links[0]} within {machine.ranks_per_node} ranks of a node, {links[1]} between nodes"
    )


def _microseconds(seconds: float) -> str:
    return f"{significant(seconds * 1e6)} us"


def bytes_of(text: str) -> int:
    """Return the bytes of a size such as ``80GiB``.

    Raises
    ------
    ConfigError
        If the text is not a size.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"{text!r} is no size in bytes: write for example 80GiB or 512MB") from None
