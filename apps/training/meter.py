"""The meter of a run: speed, utilisation, communication by axis, and memory of each rank.

The training loop measures each step with it. It writes ``run.json`` through the run directory, and ``trace.json`` with
`Trace`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from colossal_mpi import comm, ledger
from colossal_mpi.apps import environment
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training.trace import Trace
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.analysis import hardware_flop, model_flop
from colossal_mpi.machine import measure_flops
from colossal_mpi.platform import backend


class Meter:
    """Measures the steps of a run, and writes the facts about machine and model to the run directory.

    Parameters
    ----------
    trainer : Trainer
        The trainer of the run.
    directory : RunDirectory
        The run directory, in which rank 0 writes ``run.json``, and ``trace.json`` if steps are traced.
    steps : collection of int
        Numbers of the steps to trace, from 1.

    Attributes
    ----------
    work : int
        Number of the task's units (tokens or images) in a step.
    flop : dict of str to int
        ``model_flop`` and ``hardware_flop`` of a step; empty for a model that cannot be counted.
    peak : float
        Flop/s of all ranks together, to which utilisation is relative.
    moved : Record
        The communication of the last step.

    Notes
    -----
    **Communication:** gathers of small objects; and for a quarter of a second matrix products on all ranks, unless the
    configuration or the run directory knows the peak.
    """

    def __init__(self, trainer: Trainer, directory: RunDirectory, steps: Collection[int] = ()) -> None:
        self.trainer, self.grid = trainer, trainer.grid
        training, task = trainer.config.training, trainer.task
        self.work = training.batch * task.per_sample
        try:
            self.flop = {f.__name__: f(trainer.model, training.batch, task.length) for f in (model_flop, hardware_flop)}
        except OptionError:  # a layer without a rule for its flop
            self.flop = {}
        facts = self._facts(directory)
        self.peak = float(facts["peak_flops"])
        with comm.agreed(self.grid):
            if self.grid.rank == 0:
                directory.write_facts(facts)
        self.moved = ledger.Record()
        self.trace = Trace(self.grid, directory.trace, steps)

    def _facts(self, directory: RunDirectory) -> dict[str, Any]:
        config, task = self.trainer.config, self.trainer.task
        facts: dict[str, Any] = {"machine": environment.describe(self.grid)}
        known = comm.share(directory.facts() if self.grid.rank == 0 else None, self.grid)
        peak = {"peak_flops": config.run.peak_flops, "peak_of": "run.peak_flops"}
        if not config.run.peak_flops:
            dtype, ranks = config.parallel.dtype, self.grid.size
            peak = {"peak_of": f"products in {dtype} on {ranks} rank{'s' * (ranks > 1)} at once, as measured"}
            same = all(known.get(key) == value for key, value in (facts | peak).items())
            peak["peak_flops"] = known["peak_flops"] if same else measure_flops(self.grid, dtype)
        return (
            facts
            | peak
            | self.flop
            | {
                "task": task.name,
                "about": task.about,
                "unit": task.unit,
                "per": task.per,
                "parameters": self.trainer.parameters,
                "grid": dict(self.grid.axes),
                "kernels": self.trainer.kernels,
            }
        )

    @contextmanager
    def measure(self, step: int) -> Iterator[dict[str, Any]]:
        """Measure the step inside the context; when it ends, the yielded dict holds the measurements of this rank.

        They are ``seconds``, ``tokens_per_second`` (or another unit of the task), ``words_received`` and
        ``words_by_axis`` in array elements, ``seconds_by_axis`` of communication, and the utilisations ``mfu`` and
        ``hfu``: model flop and hardware flop over the flop that the peak allows.

        Parameters
        ----------
        step : int
            Number of the step, from 1.

        Yields
        ------
        dict of str to object
            Empty until the context ends.

        Notes
        -----
        **Communication:** none, except for steps that are traced: a gather on rank 0.
        """
        row: dict[str, Any] = {}
        begun = time.perf_counter()
        with ledger.record() as self.moved:
            yield row
        ended = time.perf_counter()
        row |= self._row(ended - begun)
        self.trace.add(step, self.moved, begun, ended)

    def _row(self, seconds: float) -> dict[str, Any]:
        shares = {"mfu": "model_flop", "hfu": "hardware_flop"}
        return {
            "seconds": seconds,
            f"{self.trainer.task.unit}_per_second": self.work / seconds,
            "words_received": self.moved.words,
            "words_by_axis": self.moved.by_axis(),
            "seconds_by_axis": seconds_by_axis(self.moved),
            **{key: self.flop[name] / seconds / self.peak for key, name in shares.items() if name in self.flop},
        }

    def ranks(self) -> dict[str, Any]:
        """Return, on rank 0, memory and communication of all ranks, in the order of the ranks.

        Returns
        -------
        dict
            ``ranks``: ``memory`` in bytes, the greatest of the process so far, and ``words`` and ``seconds`` of the
            last step by axis. Empty on the other ranks.

        Notes
        -----
        **Communication:** one gather of small objects on rank 0.
        """
        moved = self.moved
        here: dict[str, Any] = {
            "memory": environment.peak_memory(),
            "words": moved.by_axis(),
            "seconds": seconds_by_axis(moved),
        }
        held = backend.device_memory(self.grid.device)
        here |= {} if held is None else {"device_memory": held}
        rows = self.grid.comm(tuple(self.grid.axes)).gather(here)
        return {} if rows is None else {"ranks": {key: [row[key] for row in rows] for key in rows[0]}}


def seconds_by_axis(moved: ledger.Record) -> dict[str, float]:
    """Return the seconds of communication of this rank, by group of axes."""
    sums: dict[str, float] = {}
    for event in moved.events:
        sums[event.axis] = sums.get(event.axis, 0.0) + event.seconds
    return {axis: round(seconds, 6) for axis, seconds in sums.items()}
