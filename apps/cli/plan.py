"""``colossal-mpi plan``: find the fastest way to train a model on a number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from colossal_mpi.apps import config as configs
from colossal_mpi.apps import planning
from colossal_mpi.apps.command import Command, JsonFile, Settings


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Find the fastest grid, modes and schedule for a model, and explain them.

    Dry runs price the candidates, on this machine or, with --flops, on another one.
    """

    example = "colossal-mpi plan llama --ranks 64 --gpu-memory 80GiB --flops 400e12 --bandwidth 25e9"

    config: Annotated[
        str, typer.Argument(help=f"A TOML file, or one that comes with the package: {configs.shipped()}.")
    ]
    ranks: Annotated[int | None, typer.Option(help="Ranks to plan for; by default the ranks of this job.")] = None
    memory: Annotated[
        str | None, typer.Option("--memory", "--gpu-memory", help="Memory of a rank: 80GiB; by default no limit.")
    ] = None
    flops: Annotated[float | None, typer.Option(help="flop/s of a rank; by default it is measured.")] = None
    memory_bandwidth: Annotated[float | None, typer.Option(help="Bytes/s of a rank's memory.")] = None
    bandwidth: Annotated[float | None, typer.Option(help="Bytes/s from other nodes.")] = None
    near_bandwidth: Annotated[float | None, typer.Option(help="Bytes/s from the own node.")] = None
    latency: Annotated[float | None, typer.Option(help="Seconds of a message.")] = None
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks on a node.")] = None
    show: Annotated[int, typer.Option(help="Number of ways to show.")] = 8
    rounds: Annotated[int, typer.Option("--try", help="Run this many steps of each shown way, in turns.")] = 0
    setting: Settings = field(default_factory=list)
    json: JsonFile = None

    def run(self) -> int:
        given = planning.GivenRates(
            self.flops,
            self.memory_bandwidth,
            self.latency,
            self.bandwidth,
            self.near_bandwidth,
            self.ranks_per_node,
        )
        memory, count = self.memory, self.show
        options = planning.checked_options(
            self.config, self.setting, self.ranks, memory, given, count, self.rounds, self.json
        )
        return planning.plan(options)
