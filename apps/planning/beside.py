"""The forecast of a run that is over, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from colossal_mpi.apps.planning.candidates import with_settings
from colossal_mpi.apps.planning.forecast import forecast
from colossal_mpi.apps.planning.measure import measure
from colossal_mpi.apps.text import binary, duration
from colossal_mpi.apps.training.trainer import Trainer


def predicted(trainer: Trainer, peak: float) -> dict[str, Any] | None:
    """Return, on rank 0, what a dry run says of that rank: ``words``, ``memory`` of arrays in bytes, ``seconds``.

    Parameters
    ----------
    trainer : Trainer
    peak : float
        flop/s of all ranks in products.

    **Communication:** that of `measure`.
    """
    grid = trainer.grid
    machine = measure(grid, trainer.config.parallel.dtype, peak)
    if grid.rank:
        return None
    config = with_settings(trainer.config, dict(grid.axes), trainer.config.parallel.tensor)
    found = forecast(config, machine)
    return {"words": found.stages[0].words, "memory": found.stages[0].peak, "seconds": found.seconds}


def line(told: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], grown: int) -> str:
    """Return the forecast of rank 0 and what was measured there, in a line.

    Parameters
    ----------
    told : mapping
        That `predicted` has returned.
    rows : sequence of mapping
        The metrics of the steps.
    grown : int
        Bytes by which the process has grown since before there was a model.
    """
    words, seconds = rows[-1]["words_received"], median(row["seconds"] for row in rows)
    return (
        f"predicted and measured, rank 0: words of a step {told['words']:,} and {words:,}; step "
        f"{duration(told['seconds'])} and {duration(seconds)}; memory of arrays {binary(told['memory'])}, by which the "
        f"process grew {binary(grown)}"
    )
