"""``make demo``: train a GPT on four ranks, then show that every mode does the same steps and what it moves."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps import launch
from colossal_mpi.apps.files import write_output
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training import compare

CONFIG, RANKS = "demo", 4
TARGET = 2.3
"""The loss to reach, in nats per byte. The bigram entropy of the corpus is 2.45, so that attention has to work."""


def main() -> int:
    """Run the demo and return an exit code."""
    console, directory = Console(markup=False, soft_wrap=True), RunDirectory("runs/demo")
    console.print("Training a GPT on four MPI ranks, weights and activations cut 2 x 2", style="bold")
    command = [sys.executable, "-m", "colossal_mpi.apps.cli", "train", CONFIG, "--overwrite"]
    code = launch.run(RANKS, [*command, "--set", f"run.directory={directory.path}"])
    if code:
        return code
    console.print("\nThe first steps in float64, on one rank and in every mode", style="bold")
    rows = compare.modes(CONFIG, directory.path / "compare")
    console.print(_table(rows))
    summary = _summary(directory, rows)
    path = directory.path / "summary.json"
    write_output(path, json.dumps(summary, indent=1))
    good = summary["val_loss"] < TARGET and summary["max_gradient_difference"] < 1e-10
    console.print(
        f"validation loss {summary['val_loss']:.3f} nats per byte in {summary['seconds']:.0f} s "
        f"({'below' if summary['val_loss'] < TARGET else 'NOT below'} {TARGET}); greatest gradient difference "
        f"{summary['max_gradient_difference']:.1e}"
    )
    console.print(
        f"report {directory.page}\nplot {directory.plot}\nmetrics {directory.metrics}\ncheckpoint "
        f"{directory.checkpoints / directory.latest().name}\nsummary {path}"
    )
    return 0 if good else 1


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    caption = "words: array elements received in a step by all ranks together"
    table = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("mode", "grid", "loss 1", "loss 3", "gradients", "words"):
        table.add_column(column, justify="left" if column in ("mode", "grid") else "right", no_wrap=True)
    for name, row in rows.items():
        grid = ",".join(f"{axis}={size}" for axis, size in row["grid"].items() if size > 1) or "-"
        losses = [f"{loss:.6f}" for loss in (row["losses"][0], row["losses"][-1])]
        difference = f"{row['max_gradient_difference']:.1e}" if name != "one rank" else "reference"
        table.add_row(name, grid, *losses, difference, f"{row['words_per_step']:,}")
    return table


def _summary(directory: RunDirectory, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    metrics = directory.rows()
    return {
        "val_loss": metrics[-1]["val_loss"],
        "first_loss": metrics[0]["loss"],
        "seconds": sum(row["seconds"] for row in metrics),
        "max_gradient_difference": max(row["max_gradient_difference"] for row in rows.values()),
        "words_per_step": {name: row["words_per_step"] for name, row in rows.items()},
        "losses": {name: row["losses"] for name, row in rows.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
