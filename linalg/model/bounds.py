"""Lower bounds of the words that any algorithm must move in a product.

`best_grid` and `explain` compare predicted words with them.

References
----------
Al Daas, Ballard, Grigori, Kumar, Rouse: Tight memory-independent parallel matrix multiplication communication lower
bounds, SPAA 2022. Smith, Lowery, Langou, van de Geijn: A tight I/O lower bound for matrix multiplication, 2019.
"""

from __future__ import annotations

import math


def lower_bound(m: int, n: int, k: int, ranks: float) -> float:
    """Return the words that some rank must receive in an m x n x k product, whatever memory it has.

    The bound holds for operands and a result that are each stored once and evenly. Let m >= n >= k be the sorted sizes.
    Algorithms that attain the bound cut one dimension for up to p = m/n ranks, two for up to mn/k^2 ranks, and three
    for more.

    Parameters
    ----------
    m, n, k : int
        Global sizes, in any order.
    ranks : float
        Number of ranks.

    Returns
    -------
    float
        Words (array elements).

    References
    ----------
    Al Daas et al.: Tight memory-independent parallel matrix multiplication communication lower bounds, SPAA 2022,
    theorem 3.

    Examples
    --------
    >>> linalg.lower_bound(64, 64, 64, ranks=8)
    1536.0
    """
    m, n, k = sorted((m, n, k), reverse=True)
    if k == 0:
        return 0.0
    if ranks <= m / n:
        accessed = (m * n + m * k) / ranks + n * k
    elif ranks <= m * n / k**2:
        accessed = 2 * math.sqrt(m * n * k**2 / ranks) + m * n / ranks
    else:
        accessed = 3 * (m * n * k / ranks) ** (2 / 3)
    return max(0.0, accessed - (m * n + m * k + n * k) / ranks)


def memory_bound(m: int, n: int, k: int, ranks: int, memory: float) -> float:
    """Return the words that some rank must receive if its memory is limited: ``2mnk / (p sqrt(memory)) - 2 memory``.

    Parameters
    ----------
    m, n, k : int
        Global sizes.
    ranks : int
        Number of ranks p.
    memory : float
        Words (array elements) that a rank can hold.

    Returns
    -------
    float
        Words (array elements).

    References
    ----------
    Smith, Lowery, Langou, van de Geijn: A tight I/O lower bound for matrix multiplication, 2019.
    """
    return max(0.0, 2 * m * n * k / (ranks * math.sqrt(memory)) - 2 * memory)
