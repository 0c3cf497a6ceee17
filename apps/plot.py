"""Plots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training and validation loss, in nats per token, over the steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=0.9, color="#7fa7d0", label="training")
    held = [row for row in rows if "val_loss" in row]
    points = [row["step"] for row in held], [row["val_loss"] for row in held]
    axes.plot(*points, "o-", color="#c0392b", label="validation")
    if held:
        label, end = f"{held[-1]['val_loss']:.3f}", (points[0][-1], points[1][-1])
        axes.annotate(label, end, (0, 12), textcoords="offset points", ha="right")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
