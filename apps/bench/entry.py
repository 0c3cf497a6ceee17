"""A competitor's way through a benchmark: memory, correctness, turns, and its row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from colossal_mpi import ledger
from colossal_mpi.apps.bench import memory, timing
from colossal_mpi.apps.bench.competitors import Competitor
from colossal_mpi.apps.bench.operands import TOLERANCE, residual
from colossal_mpi.apps.bench.options import Problem
from colossal_mpi.apps.text import binary
from colossal_mpi.errors import ColossalError


class Entry:
    """A competitor and how it has done, the same on all ranks.

    Attributes
    ----------
    seconds : list of float
        Of the slowest rank, for each turn.
    error : str or None
        Why it has no time.
    words : int or None
        Array elements that the busiest rank receives in a product, by the ledger.
    residual : float or None
        See `operands.residual`.
    """

    def __init__(self, competitor: Competitor) -> None:
        self.competitor, self.seconds = competitor, list[float]()
        self.error: str | None = None
        self.words: int | None = None
        self.residual: float | None = None

    def enters(self) -> bool:
        """Say whether its memory is there."""
        if not fits([self]):
            members, free = self.competitor.members, MPI.COMM_WORLD.bcast(memory.available())
            ranks = f"each of {members} ranks" if members > 1 else "one rank"
            need = binary(self.competitor.need)
            self.error = f"out of memory: needs {need} on {ranks}, and the node has {binary(free)} left"
        return self.error is None

    def qualify(self, keep: bool) -> None:
        """Do the product untimed: once to warm up, once to see what it moves and whether it is right."""
        self._guarded(self._qualify, keep)
        if self.residual is not None and not self.residual <= TOLERANCE:
            self.error = (
                f"wrong: ||CX - A(BX)|| is {self.residual:.3g} eps ||A(BX)||, and {TOLERANCE:g} eps are allowed"
            )
            self.competitor.forget()

    def turn(self, keep: bool) -> None:
        """Do the product and keep its time; `keep` says whether the operands stay in memory between turns."""
        self._guarded(self._turn if keep else self._turn_afresh, keep)

    def _guarded(self, action: Any, keep: bool) -> None:
        try:
            action()
        except ColossalError as problem:
            self.error = str(problem)
        if self.error is not None or not keep:
            self.competitor.forget()

    def _qualify(self) -> None:
        self._prepare()
        self._run()
        with ledger.record() as moved:
            self._run()
        self.words = max(MPI.COMM_WORLD.allgather(moved.words)) if self.competitor.counted else None
        p, held = self.competitor.problem, self.competitor.pieces() if self.competitor.inside else None
        self.residual = MPI.COMM_WORLD.bcast(residual(held, p.m, p.n, p.k, p.dtype))

    def _turn(self) -> None:
        self.seconds.append(self._run())

    def _turn_afresh(self) -> None:
        self._prepare()
        self._turn()

    def _prepare(self) -> None:
        timing.agreed(self.competitor.prepare if self.competitor.inside else lambda: None)

    def _run(self) -> float:
        with self.competitor.alone():
            return timing.timed(self.competitor.run, self.competitor.group)

    def row(self, ranks: int) -> dict[str, Any]:
        """Return the result as a row."""
        competitor, flop, ran = self.competitor, self.competitor.problem.flop, self.error is None
        best, median = (min(self.seconds), statistics.median(self.seconds)) if ran else (None, None)
        return blank(competitor.name, competitor.problem, ranks) | {
            "threads": competitor.threads,
            "grid": dict(competitor.grid),
            "note": competitor.note,
            "seconds": best,
            "median_seconds": median,
            "gflops": flop / best / 1e9 if best else None,
            "median_gflops": flop / median / 1e9 if median else None,
            "words": self.words,
            "residual": self.residual,
            "repeats": len(self.seconds),
            "error": self.error,
        }


def blank(name: str, problem: Problem, ranks: int, error: str | None = None) -> dict[str, Any]:
    """Return the row of a competitor that has not run."""
    return {
        "name": name,
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "dtype": str(problem.dtype),
        "ranks": ranks,
        "threads": 1,
        "grid": {},
        "note": "",
        **dict.fromkeys(("seconds", "median_seconds", "gflops", "median_gflops", "words", "residual")),
        "repeats": 0,
        "foreign": None,
        "error": error,
    }


def fits(entries: Sequence[Entry]) -> bool:
    """Say, alike on all ranks, whether the memory of every node holds all of these at once."""
    need = sum(
        entry.competitor.need * sum(r < entry.competitor.members for r in memory.neighbours()) for entry in entries
    )
    return all(MPI.COMM_WORLD.allgather(need <= memory.available()))
