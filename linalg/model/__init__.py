"""The price of a product before it runs: words, messages, flop, memory and time, and the choice that costs least.

``matmul(algorithm="auto")``, ``linalg.explain`` and ``linalg.best_grid`` call this package. It uses the maps and
layouts of ``linalg.contraction``, so that priced words equal the ledger's, and turns them into seconds with a
`colossal_mpi.machine.Machine`.

The *price* of a product counts the words that it moves, its flop and its memory. A training step has a *cost* instead,
see ``apps.planning``.
"""

from colossal_mpi.linalg.model.auto import Option, explain, fastest, options
from colossal_mpi.linalg.model.bounds import lower_bound, memory_bound
from colossal_mpi.linalg.model.grids import GridChoice, best_grid
from colossal_mpi.linalg.model.price import Price, price

__all__ = [
    "GridChoice",
    "Option",
    "Price",
    "best_grid",
    "explain",
    "fastest",
    "lower_bound",
    "memory_bound",
    "options",
    "price",
]
