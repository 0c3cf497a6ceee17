"""What a training step costs: flop, saved memory, and a prediction of both with words from a dry run.

The planner, the meter of a run and the doctor call it. It runs the real layers on meta arrays and never repeats their
formulas, except for the flop of a product.
"""
