"""Generation of text by a causal model on any grid: the KV cache, sampling, and the loop over new tokens.

The command ``generate`` and the trainer's samples call it. It runs the model's own forward pass, so that any tensor
mode and pipeline generates.
"""
