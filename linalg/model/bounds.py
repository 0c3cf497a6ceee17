"""Words that no algorithm can do without.

References
----------
Al Daas, Ballard, Grigori, Kumar, Rouse: Tight memory-independent parallel matrix multiplication communication lower
bounds, SPAA 2022. Smith, Lowery, Langou, van de Geijn: A tight I/O lower bound for matrix multiplication, 2019.
"""

from __future__ import annotations

import math


def lower_bound(m: int, n: int, k: int, ranks: int) -> float:
    """Return the words that some rank must receive in an m x n x k product, whatever memory it has.

    Al Daas et al. 2022, theorem 3, for data that is stored once and evenly. With the sizes in order, largest first:
    one dimension is cut up to p = m/n ranks, two up to mn/k^2, three beyond.
    """
    m, n, k = sorted((m, n, k), reverse=True)
    if k == 0:
        return 0.0
    if ranks <= m / n:
        touched = (m * n + m * k) / ranks + n * k
    elif ranks <= m * n / k**2:
        touched = 2 * math.sqrt(m * n * k**2 / ranks) + m * n / ranks
    else:
        touched = 3 * (m * n * k / ranks) ** (2 / 3)
    return max(0.0, touched - (m * n + m * k + n * k) / ranks)


def memory_bound(m: int, n: int, k: int, ranks: int, memory: float) -> float:
    """Return the words that some rank with `memory` words must receive: ``2mnk / (p sqrt(memory)) - 2 memory``."""
    return max(0.0, 2 * m * n * k / (ranks * math.sqrt(memory)) - 2 * memory)
