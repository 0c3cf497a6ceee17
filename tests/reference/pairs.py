"""Training cases that cover every compatible pair of modes and options; they are generated, not picked by hand."""

import itertools
import math
from dataclasses import dataclass

MOST = 8
"""Greatest number of ranks of a case."""
PIPES = [({}, "1f1b"), *[({"pipe": n}, how) for n in (2, 3, 4) for how in ("1f1b", "interleaved", "zero-bubble")]]
DATA = [{}, {"data": 2}, {"data": 3}, {"data": 4}]
SEQUENCES = [
    ({}, "ring"),
    *[({"seq": n}, how) for n in (2, 3, 4) for how in ("ring", "ulysses")],
    ({"seq": 2, "ulysses": 2}, "ring"),
]
TENSORS = [
    ({}, "none"),
    *[({"col": n}, "1d") for n in (2, 3, 4)],
    *[({"row": m, "col": n}, "2d") for m, n in ((2, 2), (1, 2), (2, 1), (2, 3), (3, 1))],
    *[({"depth": 2, "row": m, "col": n}, "2.5d") for m, n in ((1, 2), (1, 1), (2, 1), (2, 2))],
    *[({"row": m, "col": n, "depth": 2}, "3d") for m, n in ((1, 2), (2, 1), (1, 1), (2, 2))],
]


@dataclass(frozen=True)
class Case:
    """One training case: the axes of its grid, and its modes and options."""

    axes: tuple[tuple[str, int], ...]
    schedule: str = "1f1b"
    sequence: str = "ring"
    tensor: str = "none"
    zero: int = 0
    recompute: bool = False

    @property
    def parts(self):
        """Return the names of the modes and options that the case combines."""
        named = {"pipe": "pipe", "data": "data", "seq": self.sequence, "ulysses": "ulysses"}
        found = [name for axis, name in named.items() if axis in dict(self.axes)]
        found += [name for name in (self.tensor, self.schedule) if name not in ("none", "1f1b")]
        found += [f"zero{self.zero}"] * bool(self.zero) + ["recompute"] * self.recompute
        return sorted(set(found))

    def groups(self, size):
        """Return all combinations of `size` of the case's modes and options."""
        return set(itertools.combinations(self.parts, size))

    def __str__(self):
        grid = [f"{axis}{n}" for axis, n in self.axes]
        return "-".join([*grid, *[part for part in self.parts if part not in ("pipe", "data", "ring")]])


def everything():
    """Return all training cases on 2 to `MOST` ranks."""
    found = []
    for (pipe, schedule), data, (seq, sequence), (axes, tensor) in itertools.product(PIPES, DATA, SEQUENCES, TENSORS):
        grid = {**pipe, **data, **seq, **axes}
        if 1 < math.prod(grid.values()) <= MOST:
            zeros = range(4) if data else (0,)
            of_grid = tuple(grid.items()), schedule, sequence, tensor
            found += [Case(*of_grid, zero, again) for zero in zeros for again in (False, True)]
    return found


def chosen(least):
    """Return cases on at least `least` grids that together cover every pair and many triples.

    The choice is greedy: each time it takes the case with the most new pairs, and among equals the one on a new grid,
    with the most new triples and pairs of axes.
    """
    pool, cases, seen = everything(), [], set()
    missing = set().union(*[case.groups(2) for case in pool])
    while missing or len({case.axes for case in cases}) < least:
        best = max(
            pool, key=lambda case: (len(case.groups(2) & missing), case.axes not in seen, len(_traits(case) - seen))
        )
        cases.append(best)
        missing -= best.groups(2)
        seen |= {best.axes} | _traits(best)
    return cases


def _traits(case):
    """Return triples of parts, and pairs of axes with their sizes."""
    return case.groups(3) | set(itertools.combinations(case.axes, 2))
