"""The cost of a training step before it runs: flop by the rules of layers; memory, words and time by dry runs.

``apps.planning``, the meter of ``apps.training`` and users who plan a model call it. It runs the real layers, optimizer
and schedule on meta arrays and repeats none of their formulas, except for the flop of a product.
"""

from colossal_mpi.layers.analysis.cost import StepCost, TokenData, cost_of_step, dry_run, stage_grids, step_costs
from colossal_mpi.layers.analysis.flops import Flop, StreamShape, flop_of, hardware_flop, model_flop

__all__ = [
    "Flop",
    "StepCost",
    "StreamShape",
    "TokenData",
    "cost_of_step",
    "dry_run",
    "flop_of",
    "hardware_flop",
    "model_flop",
    "stage_grids",
    "step_costs",
]
