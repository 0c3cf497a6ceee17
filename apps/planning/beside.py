"""The forecast of a run's step, which ``colossal-mpi train`` prints beside what it has measured."""

from __future__ import annotations

from typing import Any

from colossal_mpi.apps.planning.candidates import with_settings
from colossal_mpi.apps.planning.forecast import forecast
from colossal_mpi.apps.planning.measure import measure
from colossal_mpi.apps.training.trainer import Trainer


def predicted(trainer: Trainer, peak: float) -> dict[str, Any] | None:
    """Return, on rank 0, the forecast of a step of a run: ``words`` and ``memory`` of rank 0 and ``seconds`` of a step.

    Parameters
    ----------
    trainer : Trainer
        Of the run, on its grid.
    peak : float
        Flop/s of all ranks in products.

    Returns
    -------
    dict or None
        ``words`` in array elements that rank 0 receives, ``memory`` in bytes of its arrays at the peak, ``seconds`` of
        a step; None on the other ranks.

    **Communication:** that of `measure`.
    """
    grid = trainer.grid
    machine = measure(grid, trainer.config.parallel.dtype, peak)
    if grid.rank:
        return None
    config = with_settings(trainer.config, dict(grid.axes), trainer.config.parallel.tensor)
    found = forecast(config, machine)
    return {"words": found.stages[0].words, "memory": found.stages[0].peak, "seconds": found.seconds}
