"""A training run: its tasks, trainer, run directory, progress, metrics and traces.

The command ``train`` calls it, and so do the demo, the planner's trials and the benchmark of optimizers. It builds a
model from a configuration, steps it through ``layers.pipeline`` and saves it with ``colossal_mpi.checkpoint``.
"""
