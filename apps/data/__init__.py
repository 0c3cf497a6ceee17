"""Training data: text and images, tokenizers, token stores, and samples by their global number.

The tasks of ``apps.training`` read their batches here; the command ``data`` prepares and inspects token stores. Samples
are functions of the seed and their number, so that they are the same on every grid.
"""
