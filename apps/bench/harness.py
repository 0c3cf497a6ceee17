"""The harness of the benchmarks: competitors take turns, and a result is checked before its time counts.

A benchmark is a `Benchmark` with its options; it makes `Competitor` objects and turns them into rows. The harness
starts the ranks, lets the competitors take turns, prints the table, and writes the JSON file and the plot.
"""

from __future__ import annotations

import json
import statistics
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import threadpoolctl
from mpi4py import MPI
from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps import launch
from colossal_mpi.apps.bench import node, timing
from colossal_mpi.apps.command import Command
from colossal_mpi.apps.files import check_writable, write_result
from colossal_mpi.apps.text import binary
from colossal_mpi.errors import ColossalError, ConfigError
from colossal_mpi.grid import world_rank, world_size
from colossal_mpi.runtime import require_mpi

Row: TypeAlias = dict[str, Any]
"""The result of one competitor. Keys that begin with an underscore are not written to the JSON file."""
_FEWEST, _USUAL, _MOST = 3, 10, 100  # rounds
_SHORT, _LONG = 1.0, 20.0  # seconds of running after which the usual, and the fewest, rounds are enough
_NOISE = 0.05  # share of the cores; a warning says if other programs use more
_RANKS = 4  # ranks to start by default


class Competitor:
    """One way to do the work of a benchmark, and its results so far, the same on all ranks.

    A subclass overrides `work` and, where it needs them, `prepare`, `check`, `forget` and `alone`.

    Parameters
    ----------
    name : str
        Name in the table.
    group : MPI.Intracomm or None
        The ranks that work, the first ones of the job; None on the other ranks, which sleep.
    members : int
        Number of ranks that work.

    Attributes
    ----------
    seconds : list of float
        Time of each turn, on the slowest rank.
    error : str or None
        The reason why it has no time.
    """

    threads = 1
    """Threads of each of its ranks."""
    warm_up = 1
    """Runs before the check."""

    def __init__(self, name: str, group: MPI.Intracomm | None, members: int) -> None:
        self.name, self.group, self.members = name, group, members
        self.seconds = list[float]()
        self.error: str | None = None

    @property
    def need(self) -> int:
        """The bytes that one of its ranks holds at most: operands, result and workspace."""
        return 0

    def prepare(self) -> None:
        """Make on one of its ranks what a run needs, untimed. It communicates nothing."""

    def work(self) -> None:
        """Do the work on one of its ranks, and keep the result."""
        raise NotImplementedError

    def check(self) -> str | None:
        """Return why the result of the last run is wrong, the same on all ranks; None if it is right."""
        return None

    def forget(self) -> None:
        """Free operands and result."""

    def alone(self) -> AbstractContextManager[None]:
        """Return a context that holds during a run, for example with more threads."""
        return nullcontext()

    def run(self) -> float:
        """Do the work once and return its seconds. Collective over all ranks."""
        with self.alone():
            return timing.timed(self.work, self.group)

    def make_ready(self) -> None:
        """Prepare on the ranks that work; all ranks fail together. Collective over all ranks."""
        timing.agreed(self.prepare if self.group is not None else lambda: None)

    def enter(self) -> bool:
        """Say whether the nodes have the memory that it needs; if not, say so in `error`."""
        if not fit([self]):
            ranks = f"each of {self.members} ranks" if self.members > 1 else "one rank"
            free = MPI.COMM_WORLD.bcast(node.available_memory())
            self.error = f"out of memory: needs {binary(self.need)} on {ranks}, and the node has {binary(free)} left"
        return self.error is None

    def qualify(self, keep: bool) -> None:
        """Run untimed to warm up, and check the result."""

        def action() -> None:
            self.make_ready()
            for _ in range(self.warm_up):
                self.run()
            self.error = self.check()

        self._guarded(action, keep)

    def turn(self, keep: bool) -> None:
        """Run once and keep the time.

        Parameters
        ----------
        keep : bool
            Whether operands and result stay in memory until the next turn.
        """

        def action() -> None:
            if not keep:
                self.make_ready()
            self.seconds.append(self.run())

        self._guarded(action, keep)

    def _guarded(self, action: Callable[[], None], keep: bool) -> None:
        try:
            action()
        except ColossalError as problem:
            self.error = str(problem)
        if self.error is not None or not keep:
            self.forget()

    def figures(self, **amounts: float) -> Row:
        """Return best and median of the time and of the rates, None without a time, and the rest of a row.

        Parameters
        ----------
        **amounts : float
            The amount of work of a turn by the name of its rate per second: ``tokens_per_second=1024``.
        """
        best, median = (min(self.seconds), statistics.median(self.seconds)) if self.timed else (None, None)
        row: Row = {"seconds": best, "median_seconds": median}
        for name, amount in amounts.items():
            row[name] = amount / best if best else None
            row[f"median_{name}"] = amount / median if median else None
        return {**row, "repeats": len(self.seconds), "error": self.error}

    @property
    def timed(self) -> bool:
        """True if it has a time that counts."""
        return self.error is None and bool(self.seconds)


def fit(competitors: Sequence[Competitor]) -> bool:
    """Say whether the memory of every node holds the operands of all competitors at once, the same on all ranks."""
    need = sum(one.need * sum(rank < one.members for rank in node.ranks()) for one in competitors)
    return all(MPI.COMM_WORLD.allgather(need <= node.available_memory()))


def compete(
    competitors: Sequence[Competitor], repeat: int | None, after_round: Callable[[], None] = lambda: None
) -> float | None:
    """Let competitors take turns. Collective over all ranks.

    Parameters
    ----------
    competitors : sequence of Competitor
        All of them; one that does not fit the memory, fails or is wrong gets an error and no more turns.
    repeat : int, optional
        Number of rounds. By default 10 rounds, more until each has run for 1 s, and fewer, at least 3, once each has
        run for 20 s; never more than 100.
    after_round : callable
        Called after each round.

    Returns
    -------
    float or None
        The share of the cores that other programs used meanwhile; None where the system does not say.
    """
    held = [one for one in competitors if one.enter()]
    keep = fit(held)  # if not, each turn makes its operands again
    for one in held:
        one.qualify(keep)
    meter = node.NoiseMeter()
    while not _enough(running := [one for one in held if one.error is None], repeat):
        for one in running:
            one.turn(keep)
        after_round()
    foreign = meter.foreign()
    for one in held:
        one.forget()
    return foreign


def _enough(running: Sequence[Competitor], repeat: int | None) -> bool:
    if not running:
        return True
    rounds, ran = len(running[0].seconds), min(sum(one.seconds) for one in running)
    if repeat is not None:
        return rounds >= repeat
    return rounds >= _MOST or (rounds >= _USUAL and ran >= _SHORT) or (rounds >= _FEWEST and ran >= _LONG)


def with_ratios(rows: Sequence[Row], base: Row | None) -> list[Row]:
    """Return rows with their speed relative to that of a base row, best and median; None without a time."""
    pairs = {"seconds": "ratio", "median_seconds": "median_ratio"}
    ratios = [
        {ratio: base[key] / row[key] if base and base[key] and row[key] else None for key, ratio in pairs.items()}
        for row in rows
    ]
    return [{**row, **more} for row, more in zip(rows, ratios, strict=True)]


@dataclass(frozen=True)
class Column:
    """A column of the table of a benchmark."""

    title: str
    text: Callable[[Row], str]
    left: bool = False
    """True if its texts are flush left."""


def number(title: str, key: str, form: str, absent: str = "-", scale: float = 1, unit: str = "") -> Column:
    """Return a column of numbers.

    Parameters
    ----------
    title : str
        The title of the column.
    key : str
        The key of the number in a row.
    form : str
        Format of the number, as in an f-string.
    absent : str
        Text in place of a missing number.
    scale : float
        Factor to multiply the number with.
    unit : str
        Text after the number.
    """
    return Column(title, lambda row: absent if row.get(key) is None else f"{scale * row[key]:{form}}{unit}")


def show(title: str, columns: Sequence[Column], rows: Sequence[Row], notes: Sequence[str], width: int = 120) -> None:
    """Print a table of the rows without an error, then the errors, the notes and a warning of noise.

    Parameters
    ----------
    title : str
        The line above the table.
    columns : sequence of Column
        The columns; the first one names the row.
    rows : sequence of dict
        The rows.
    notes : sequence of str
        The lines below the table.
    width : int
        Columns of the terminal that the table may use: a narrower terminal wraps it rather than losing figures.
    """
    console = Console(markup=False, soft_wrap=True, highlight=False)
    console.width = max(console.width, width)
    console.print(f"\n{title}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        if row.get("error") is None:
            table.add_row(*(column.text(row) for column in columns))
    if table.row_count:
        console.print(table)
    for row in rows:
        if row.get("error") is not None:
            console.print(f"{columns[0].text(row)}: {row['error']}")
    for note in notes:
        console.print(note)
    foreign = next((row["foreign"] for row in rows if row.get("foreign") is not None), 0.0)
    if foreign >= _NOISE:
        warning = f"other programs used {foreign:.0%} of the cores meanwhile: measure again when they rest"
        console.print(warning, style="bold")


def write(rows: Sequence[Row], path: Path | None) -> None:
    """Write the rows as a JSON list. A regular file gets all of them, or stays as it was."""
    if path is None:
        return
    plain = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    write_result(path, json.dumps(plain, indent=1) + "\n")


@contextmanager
def figure(path: Path, down: int, across: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Yield a figure of matplotlib and its panels ``[down, across]``, and write it to a PNG, PDF or SVG file.

    Parameters
    ----------
    path : Path
        The file.
    down, across : int
        Number of panels.
    size : (float, float)
        Width and height in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, panels = pyplot.subplots(down, across, figsize=size, dpi=130, squeeze=False, layout="constrained")
    yield made, panels
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    made.savefig(path)
    pyplot.close(made)


class Benchmark(Command):
    """A benchmark with its options. A subclass is a dataclass and has a field ``json``, and perhaps ``plot``."""

    name: ClassVar[str]
    """The word after ``colossal-mpi bench``."""

    @property
    @abstractmethod
    def job_size(self) -> int:
        """The number of ranks that it runs on."""

    @abstractmethod
    def measure(self) -> Iterator[list[Row]]:
        """Yield the rows of each table, on all ranks. Collective over all ranks."""

    @abstractmethod
    def show(self, rows: list[Row]) -> None:
        """Print a table, on rank 0."""

    def draw(self, rows: list[Row], path: Path) -> None:
        """Draw all rows into a file, on rank 0."""
        raise NotImplementedError

    def environment(self) -> AbstractContextManager[dict[str, str]]:
        """Return a context with variables for the ranks to be started."""
        return nullcontext({})

    def passed(self, rows: Sequence[Row]) -> bool:
        """Say whether the exit code is 0."""
        return all(row.get("error") is None for row in rows)

    def run(self) -> int:
        """Run the benchmark, on ranks that are started for it unless this is such a job already."""
        if world_size() != self.job_size:
            command = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", self.name, *self.arguments()]
            with self.environment() as settings:
                return launch.run(self.job_size, command, settings=settings)
        require_mpi()
        rows, json_file, picture = list[Row](), getattr(self, "json", None), getattr(self, "plot", None)
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            for found in self.measure():
                rows += found
                if world_rank() == 0:
                    self.show(found)
                    write(rows, json_file)
        if world_rank() == 0 and picture is not None:
            self.draw(rows, picture)
        return 0 if self.passed(rows) else 1


def job_size_of(ranks: int | None) -> int:
    """Return the number of ranks that ``--ranks`` asks for: 4 by default, and the ranks of the job under mpiexec.

    Raises
    ------
    ConfigError
        If it is below 1, or differs from the number of ranks of the job.
    """
    world = world_size()
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks {ranks}: a job has at least one rank, for example --ranks 4")
    if world == 1:
        return _RANKS if ranks is None else ranks
    if ranks not in (None, world):
        raise ConfigError(f"--ranks {ranks} in a job of {world} ranks: leave it out, or run this outside of mpiexec")
    return world


def check_common(benchmark: Command, repeat: int | None = None, example: int = 5) -> None:
    """Raise `ConfigError` if the number of rounds is below 1, or if the JSON file or the plot cannot be written."""
    if repeat is not None and repeat < 1:
        raise ConfigError(f"--repeat {repeat}: at least one round has to run, for example --repeat {example}")
    for path in (getattr(benchmark, "json", None), getattr(benchmark, "plot", None)):
        check_writable(path)
