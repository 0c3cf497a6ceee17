"""The partition of a model into the chunks of pipeline stages, by the costs of its layers.

The trainer, the planner and ``generate`` call `partition` and hand the chunks to a `Pipeline`. Stage i of p holds the
chunks i, i + p, ... of the model, as in Megatron's interleaved schedule; without interleaving it holds one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from colossal_mpi.errors import OptionError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.layer import Layer

PIPE = "pipe"
"""The axis of the grid along which a model is cut into stages."""


def stage_grid(grid: Grid) -> Grid:
    """Return the grid of this rank's stage: the grid without its axis ``pipe``.

    Parameters
    ----------
    grid : Grid
        Grid of the whole model. Without an axis ``pipe`` it is one stage.

    Returns
    -------
    Grid
        The sub-grid of the ranks with this rank's coordinate on ``pipe``, or `grid` itself.
    """
    return grid.at(**{PIPE: grid.coords[PIPE]}) if PIPE in grid.axes else grid


def partition(model: Sequential, grid: Grid, chunks: int = 1, costs: Sequence[float] | None = None) -> list[Sequential]:
    """Return the chunks of a model that this rank's stage holds.

    Parameters
    ----------
    model : Sequential
        Model that every stage constructs in full, with its layers on the grid that `stage_grid` returns. A weight is
        made when it is first used, so that no stage makes the weights of another one.
    grid : Grid
        Grid of the whole model. Without an axis ``pipe`` it is one stage.
    chunks : int
        Number of chunks on each stage: 2 or more for interleaved schedules.
    costs : sequence of float, optional
        Cost of each layer of the model, in any unit. By default it is the number of weights, except for the first
        layer, whose rows are only looked up: it costs nothing.

    Returns
    -------
    list of Sequential
        Chunks in the order of the model, each of contiguous layers. The costliest chunk of all stages costs as little
        as possible.

    Raises
    ------
    OptionError
        If there are more chunks than layers.

    Examples
    --------
    >>> model = GPT(config, Parallelism(stage_grid(grid)))
    >>> pipeline = Pipeline(partition(model, grid), grid)
    """
    stages, stage = grid.axes.get(PIPE, 1), grid.coords.get(PIPE, 0)
    return [Sequential(*layers) for layers in _layers_of_chunks(model, stages, chunks, costs)[stage]]


def parameter_names(model: Sequential, grid: Grid, chunks: int = 1) -> list[list[str]]:
    """Return the names of each stage's parameters, which `Pipeline` would otherwise gather from the stages.

    Parameters
    ----------
    model : Sequential
        The whole model, as `partition` takes it.
    grid : Grid
        Grid of the whole model.
    chunks : int
        Number of chunks on each stage.

    Returns
    -------
    list of list of str
        For each stage the sorted names of the parameters that its chunks hold.
    """
    return [
        sorted({q.name for chunk in stage for layer in chunk for q in layer.parameters()})
        for stage in _layers_of_chunks(model, grid.axes.get(PIPE, 1), chunks)
    ]


def _layers_of_chunks(
    model: Sequential, stages: int, chunks: int = 1, costs: Sequence[float] | None = None
) -> list[list[list[Layer]]]:
    """Return the layers of each chunk of each stage."""
    if costs is None:
        costs = [
            sum(math.prod(q.shape) for q in layer.parameters()) if i else 0 for i, layer in enumerate(model.layers)
        ]
    ranges = balanced_ranges(list(costs), stages * chunks)
    return [[[model.layers[i] for i in ranges[c * stages + stage]] for c in range(chunks)] for stage in range(stages)]


def balanced_ranges(costs: list[float], parts: int) -> list[range]:
    """Cut a list of layers into contiguous ranges, the costliest of which costs as little as possible.

    Parameters
    ----------
    costs : list of float
        Cost of each layer, 0 or more.
    parts : int
        Number of ranges: stages times chunks.

    Raises
    ------
    OptionError
        If there are more parts than layers.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise OptionError(f"{n} layers cannot be cut into {parts} parts: use from 1 to {n}")
    # least[k][j]: the smallest greatest cost of the first j layers in k parts, and where the last part begins.
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    least = {1: {j: (total[j], 0) for j in range(1, n + 1)}}
    for k in range(2, parts + 1):
        least[k] = {
            j: min((max(least[k - 1][i][0], total[j] - total[i]), i) for i in range(k - 1, j)) for j in range(k, n + 1)
        }
    cuts, j = [n], n
    for k in range(parts, 0, -1):
        j = least[k][j][1]
        cuts.append(j)
    cuts.reverse()
    return [range(a, b) for a, b in pairwise(cuts)]
