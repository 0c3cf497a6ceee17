"""In what two checkpoints differ, whatever grids they were written on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from colossal_mpi import comm
from colossal_mpi.checkpoint.contents import Reader
from colossal_mpi.errors import CheckpointError
from colossal_mpi.grid import Grid


@dataclass(frozen=True)
class Difference:
    """An array, or a value, that is not the same in both."""

    name: str
    what: str
    """In words: only in one, of another shape or dtype, or other elements."""
    elements: int = 0
    """How many differ."""
    absolute: float = 0.0
    """The greatest difference; infinite where one is no number and the other is."""
    relative: float = 0.0
    """That over the greatest magnitude in the first."""


def differences(first: Path, second: Path, grid: Grid) -> list[Difference]:
    """Return what is not the same in two checkpoints, on all ranks; each compares its share of the elements.

    Raises
    ------
    CheckpointError
        On all ranks, if one of them cannot be read.

    Notes
    -----
    **Communication:** small messages only.
    """
    with comm.agreed(grid, CheckpointError), Reader(first) as a, Reader(second) as b:
        found = list(_heads(a, b))
        known = {difference.name for difference in found}
        common = [name for name in a.entries if name in b.entries and name not in known]
        mine = _elements(a, b, common, grid)
    return sorted([*found, *_merged(comm.collect(mine, grid))], key=lambda difference: difference.name)


def _heads(a: Reader, b: Reader) -> Iterator[Difference]:
    """Yield what the manifests tell of."""
    for name in sorted({*a.entries, *b.entries, *a.manifest["values"], *b.manifest["values"]}):
        one, two = _head(a, name), _head(b, name)
        if one is None or two is None:
            yield Difference(name, "only in the first" if two is None else "only in the second")
        elif one != two:
            yield Difference(name, f"{one}, {two}")


def _head(reader: Reader, name: str) -> str | None:
    if name in reader.entries:
        entry = reader.entries[name]
        return f"{entry['dtype']}{tuple(entry['shape'])}"
    value = reader.manifest["values"].get(name)
    return None if value is None else str(value["value"])


@dataclass(frozen=True)
class _Seen:
    """Of some elements: how many differ, the greatest difference, the greatest magnitude in the first."""

    elements: int = 0
    absolute: float = 0.0
    magnitude: float = 0.0

    def with_(self, x: np.ndarray, y: np.ndarray) -> _Seen:
        wide = np.complex128 if x.dtype.kind == "c" else np.float64
        differs = (x != y) & ~((x != x) & (y != y))
        apart = np.abs(x[differs].astype(wide) - y[differs].astype(wide))
        apart = np.where(np.isnan(apart), np.inf, apart)
        sizes = np.abs(x.astype(wide))
        return _Seen(
            self.elements + int(differs.sum()),
            max(self.absolute, float(apart.max(initial=0.0))),
            max(self.magnitude, float(sizes[np.isfinite(sizes)].max(initial=0.0))),
        )

    def plus(self, other: _Seen) -> _Seen:
        return _Seen(
            self.elements + other.elements,
            max(self.absolute, other.absolute),
            max(self.magnitude, other.magnitude),
        )


def _elements(a: Reader, b: Reader, names: list[str], grid: Grid) -> dict[str, _Seen]:
    work = [(name, box) for name in names for box in a.boxes(name)]
    seen: dict[str, _Seen] = {}
    for name, box in work[grid.rank :: grid.size]:
        seen[name] = seen.get(name, _Seen()).with_(a.read(name, box), b.read(name, box))
    return seen


def _merged(told: list[dict[str, _Seen]]) -> Iterator[Difference]:
    whole: dict[str, _Seen] = {}
    for some in told:
        for name, seen in some.items():
            whole[name] = whole.get(name, _Seen()).plus(seen)
    for name, seen in whole.items():
        if seen.elements:
            relative = seen.absolute / seen.magnitude if seen.magnitude else float("inf")
            yield Difference(name, "other elements", seen.elements, seen.absolute, relative)
