"""Pipeline parallelism: schedules as data, their proof and simulation, and the stage that carries them out.

The trainer and the planner partition a model and build a `Pipeline` of it. A stage calls the layers' forward and
backward passes in the order of its schedule, exchanges activations with its neighbours through ``comm``, and reduces
gradients with ``layers.overlap``.
"""

from colossal_mpi.layers.pipeline.partition import PIPE, parameter_names, partition, stage_grid
from colossal_mpi.layers.pipeline.pipeline import Pipeline
from colossal_mpi.layers.pipeline.schedule import (
    SCHEDULES,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    ScheduleKind,
    program,
    register_schedule,
)
from colossal_mpi.layers.pipeline.simulation import Interval, Verification, makespan, simulate, verify
from colossal_mpi.layers.pipeline.stage import ArraySpec, StepData

__all__ = [
    "PIPE",
    "SCHEDULES",
    "ArraySpec",
    "BackwardInput",
    "BackwardWeight",
    "Forward",
    "Instruction",
    "Interval",
    "Pipeline",
    "ScheduleKind",
    "StepData",
    "Verification",
    "makespan",
    "parameter_names",
    "partition",
    "program",
    "register_schedule",
    "simulate",
    "stage_grid",
    "verify",
]
