"""What a run records of its steps besides losses: speed, utilisation, communication by axis, memory of each rank."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from colossal_mpi import comm, ledger
from colossal_mpi.apps import environment
from colossal_mpi.apps.training.run_directory import RunDirectory
from colossal_mpi.apps.training.trace import Trace
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.analysis import hardware_flop, model_flop
from colossal_mpi.machine import measure_flops
from colossal_mpi.platform import backend


class Meter:
    """Measures the steps of a run, and writes down where they are done.

    Parameters
    ----------
    trainer : Trainer
    directory : RunDirectory
        Of rank 0, which writes ``run.json``, and ``trace.json`` if steps are traced.
    steps : collection of int
        Numbers of the steps that are traced, from 1.

    **Communication:** gathers of small objects, and products on all ranks for a quarter of a second, unless the
    configuration or the run directory knows the peak.
    """

    def __init__(self, trainer: Trainer, directory: RunDirectory, steps: Collection[int] = ()) -> None:
        self.trainer, self.grid = trainer, trainer.grid
        training, task = trainer.config.training, trainer.task
        self.work = training.batch * task.per_sample
        try:
            self.flop = {f.__name__: f(trainer.model, training.batch, task.length) for f in (model_flop, hardware_flop)}
        except OptionError:  # a model of one's own
            self.flop = {}
        facts = self._facts(directory)
        self.peak = float(facts["peak_flops"])
        with comm.agreed(self.grid):
            if self.grid.rank == 0:
                directory.write_facts(facts)
        self.moved = ledger.Record()
        """Of the last step."""
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
        """Measure the step inside the context; what is recorded of it is in the dict when it ends.

        That is, as this rank sees it, ``seconds``, ``tokens_per_second`` (or another of the task's units),
        ``words_received`` and ``words_by_axis`` in array elements, ``seconds_by_axis`` spent on communication, and
        ``mfu`` and ``hfu``, model and hardware flop over those that the peak allows.

        **Communication:** none, but for steps that are traced.
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
        """Return, on rank 0, what is recorded of all ranks now and then, in their order.

        Returns
        -------
        dict
            ``ranks``: ``memory`` in bytes, the greatest resident so far, and of the last step ``words`` and ``seconds``
            by axis. Empty on the other ranks.

        **Communication:** one gather of small objects on rank 0.
        """
        moved = self.moved
        mine: dict[str, Any] = {
            "memory": environment.peak_memory(),
            "words": moved.by_axis(),
            "seconds": seconds_by_axis(moved),
        }
        held = backend.device_memory(self.grid.device)
        mine |= {} if held is None else {"device_memory": held}
        told = self.grid.comm(tuple(self.grid.axes)).gather(mine)
        return {} if told is None else {"ranks": {key: [one[key] for one in told] for key in told[0]}}


def seconds_by_axis(moved: ledger.Record) -> dict[str, float]:
    """Return the seconds that this rank itself spent on communication over each group of axes."""
    sums: dict[str, float] = {}
    for event in moved.events:
        sums[event.axis] = sums.get(event.axis, 0.0) + event.seconds
    return {axis: round(seconds, 6) for axis, seconds in sums.items()}
