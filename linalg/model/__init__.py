"""What a product costs before it runs: words, messages, flop, memory and time, and the choice that costs least.

``matmul(algorithm="auto")``, ``linalg.explain`` and ``best_grid`` call this package. It uses the same maps and layouts
as ``linalg.contraction``, so that predicted words equal those of the ledger.
"""
