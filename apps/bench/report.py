"""Tables, rows and plots of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps.bench.options import PEERS, Problem

_COLUMNS = ("name", "grid", "best s", "median s", "GFlop/s", "median", "ratio", "median", "words/rank")
_NOISE = 0.05  # of the cores, from which on times are worth a warning


def best_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the best row of each name, with the ratios to NumPy's: ScaLAPACK competes once for each block size."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        rival = best.setdefault(row["name"], row)
        if rival["error"] or (row["error"] is None and row["seconds"] < rival["seconds"]):
            best[row["name"]] = row
    base = best.get("numpy", {})
    for row in best.values():
        for key, ratio in (("seconds", "ratio"), ("median_seconds", "median_ratio")):
            row[ratio] = base[key] / row[key] if base.get(key) and row[key] else None
    return list(best.values())


def show(problem: Problem, ranks: int, rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """Print the table of one product, the competitors without a time, and what is to be said about ScaLAPACK."""
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, 120)  # a narrow terminal wraps the table rather than losing figures
    repeats = max((row["repeats"] for row in rows), default=0)
    console.print(f"\n{problem} on {ranks} ranks, {repeats} interleaved repeats", markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("name", "grid") else "right", no_wrap=True)
    for row in (row for row in rows if row["error"] is None):
        table.add_row(row["name"], place(row), *_figures(row))
    if table.row_count:
        console.print(table)
    for row in (row for row in rows if row["error"] is not None):
        console.print(f"{row['name']}: {row['error']}", markup=False)
    for note in notes:
        console.print(note, markup=False)
    console.print("ratio: to numpy's speed; words: array elements that the busiest rank receives")
    warn_of_noise(console, rows)


def warn_of_noise(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Say so if other programs used so much of the cores that the times are worth little."""
    foreign = next((row["foreign"] for row in rows if row["foreign"] is not None), 0.0)
    if foreign >= _NOISE:
        console.print(
            f"[bold]other programs used {foreign:.0%} of the cores meanwhile: measure again when they rest[/]"
        )


def place(row: dict[str, Any]) -> str:
    """Return where a competitor ran: its grid, its threads, its block size."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}" if row["name"] == "numpy" else ""
    grid = ",".join(f"{axis}={size}" for axis, size in row["grid"].items())
    return " ".join(word for word in (grid, row["note"], threads) if word) or "1 rank"


def _figures(row: dict[str, Any]) -> list[str]:
    ratios = [f"{row[key]:.3f}" if row[key] else "-" for key in ("ratio", "median_ratio")]
    return [
        *(f"{row[key]:.4g}" for key in ("seconds", "median_seconds")),
        *(f"{row[key]:.1f}" for key in ("gflops", "median_gflops")),
        *ratios,
        "-" if row["words"] is None else f"{row['words']:,}",
    ]


def write(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Write the rows as a JSON list."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed of every competitor, best and median, one panel for each size, into a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["m"], row["n"], row["k"]), []).append(row)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    bars = max(map(len, panels.values()))
    figure, axes = pyplot.subplots(
        down,
        across,
        figsize=(1 + 5 * across, 1 + down * (0.8 + 0.34 * bars)),
        dpi=130,
        squeeze=False,
        layout="constrained",
    )
    for ax, (size, found) in zip(axes.flat, panels.items(), strict=False):
        _panel(ax, size, found)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.suptitle(f"matrix product in {rows[0]['dtype']}, {rows[0]['ranks']} ranks: best (bar) and median (line)")
    figure.savefig(path)
    pyplot.close(figure)


def _panel(ax: Any, size: Sequence[int], rows: Sequence[dict[str, Any]]) -> None:
    heights = [row["gflops"] or 0 for row in rows]
    colors = ["#b8bec6" if row["name"] in PEERS else "#4a7fb5" for row in rows]
    ax.barh(range(len(rows)), heights, 0.72, color=colors)
    top = max(heights) or 1
    for y, row in enumerate(rows):
        if row["error"] is not None:
            ax.text(0.01 * top, y, row["error"].partition(":")[0], va="center", size=8, color="#c0392b")
            continue
        ax.plot([row["median_gflops"]] * 2, [y - 0.36, y + 0.36], color="#22313f", lw=1.5)
        ratio = f"  {row['ratio']:.2f}x" if row["ratio"] and row["name"] != "numpy" else ""
        label = ax.text(row["gflops"] + 0.01 * top, y, f"{row['gflops']:.1f}{ratio}", va="center", size=8)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # over the line of NumPy
        if row["name"] == "numpy":
            ax.axvline(row["gflops"], color="#8a939c", ls="--", lw=0.8, zorder=0)
    ax.set_yticks(range(len(rows)), [f"{row['name']}  {place(row)}" for row in rows], size=8)
    ax.set(xlim=(0, 1.22 * top), xlabel="GFlop/s", title=" x ".join(f"{n:,}" for n in size))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
