"""Pipeline parallelism: schedules as data, their check and simulation, and the stage that runs them.

The trainer and the planner build a pipeline of a model. A stage calls the layers' forward and backward passes in the
order of its schedule and exchanges activations with its neighbours through ``comm``.
"""

from colossal_mpi.layers.pipeline.schedule import SCHEDULES, ScheduleKind, register_schedule

__all__ = ["SCHEDULES", "ScheduleKind", "register_schedule"]
