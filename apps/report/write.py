"""Write a report: every picture as a PNG file, and the page.

The package exports `write`; `curves`, `bars` and `timeline` draw the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from colossal_mpi import files
from colossal_mpi.apps.report import bars, curves, style, timeline
from colossal_mpi.apps.report.page import page
from colossal_mpi.apps.report.runs import Run, read
from colossal_mpi.apps.report.style import NothingRecordedError, Picture
from colossal_mpi.apps.run_directory import PLOTS, RunDirectory
from colossal_mpi.errors import ConfigError

PICTURES: dict[str, tuple[str, Callable[[Sequence[Run]], Picture]]] = {
    "loss": ("Loss", curves.loss),
    "measures": ("Validation measures", curves.measures),
    "speed": ("Speed", curves.speed),
    "utilisation": ("Utilisation", curves.utilisation),
    "rate": ("Learning rate", curves.rate),
    "gradient": ("Gradient norm", curves.gradient),
    "scale": ("Loss scale", curves.scale),
    "memory": ("Memory of each rank", bars.memory),
    "words": ("Communication by axis", bars.words),
    "timeline": ("Timeline", timeline.timeline),
}
assert tuple(PICTURES) == PLOTS


def write(paths: Sequence[Path], output: Path | None = None) -> tuple[Path, list[tuple[str, str]]]:
    """Write the report of a run, or of several runs on the same axes.

    Parameters
    ----------
    paths : sequence of Path
        The directories of the runs.
    output : Path, optional
        The directory to write to. By default ``report`` in the directory of the run; for several runs
        ``report/comparison`` in the directory of the first one.

    Returns
    -------
    page : Path
        The HTML page.
    lacking : list of (str, str)
        The titles of the pictures that could not be made, each with the reason.

    Raises
    ------
    ConfigError
        If a run cannot be read or the report cannot be written.

    Examples
    --------
    >>> page, lacking = write([Path("runs/demo"), Path("runs/other")], Path("comparison"))
    """
    runs = read(paths)
    with style.styled():
        pictures, lacking = _draw(runs)
        report = RunDirectory(paths[0]).page.parent
        target = output or (report if len(runs) == 1 else report / "comparison")
        try:
            target.mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                files.write_new(target / f"{picture.name}.png", style.png(picture.figure))
            file = target / "index.html"
            files.write_new(file, page(runs, pictures, lacking))
        except OSError as problem:
            raise ConfigError(f"the report cannot be written to {target}: {problem.strerror}") from None
    return file, lacking


def _draw(runs: Sequence[Run]) -> tuple[list[Picture], list[tuple[str, str]]]:
    pictures, lacking = [], []
    for title, draw in PICTURES.values():
        try:
            pictures.append(draw(runs))
        except NothingRecordedError as problem:
            lacking.append((title, str(problem)))
    return pictures, lacking
