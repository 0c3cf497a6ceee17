"""Plans: the grids, modes and schedules that a run can have on a number of ranks, and the cost of a training step.

``apps.cli`` calls it for ``colossal-mpi plan``, for ``train --dry-run``, and for the forecast that a run prints beside
its measurements. It runs the trainer of ``apps.training`` on meta grids (`layers.analysis`) with the clock of a
`colossal_mpi.machine.Machine`.

Words: an *estimate* comes from dry runs of models of one and two blocks and is cheap enough for every candidate; a
*forecast* comes from a dry run of the step itself; both state the *cost* of a step on one rank or stage.
"""

from colossal_mpi.apps.planning.commands import PlanOptions, checked_options, dry_run, forecast_of_run, plan
from colossal_mpi.apps.planning.machine import GivenRates

__all__ = ["GivenRates", "PlanOptions", "checked_options", "dry_run", "forecast_of_run", "plan"]
