"""Plots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TRAINING, _VALIDATION, _SHARES = "#7fa7d0", "#c0392b", ("#2e8b57", "#8e5ea2")


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Return the measures of a validation that are shares of the samples, by name."""
    names = [name for name in row if name.startswith("val_") and name != "val_loss"]
    return {name.removeprefix("val_").replace("_", " "): row[name] for name in names}


def plot_run(rows: list[dict[str, Any]], per: str, path: Path) -> None:
    """Draw the losses, in nats per `per`, over the steps into a PNG, and below them what is a share of the samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = [row for row in rows if "val_loss" in row]
    names = list(shares(held[-1])) if held else []
    size, heights = (7, 4.2 + 1.8 * bool(names)), [2.4, 1] if names else [1]
    figure, panels = pyplot.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights, figsize=size, dpi=130, layout="constrained"
    )
    loss = panels[0, 0]
    loss.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=0.9, color=_TRAINING, label="training")
    steps = [row["step"] for row in held]
    _held_out(loss, steps, [row["val_loss"] for row in held], "validation", _VALIDATION, "{:.3f}")
    loss.set(ylabel=f"loss (nats per {per})")
    for i, name in enumerate(names):
        percent, color = [100 * shares(row)[name] for row in held], _SHARES[i % len(_SHARES)]
        _held_out(panels[1, 0], steps, percent, name, color, "{:.1f} %", above=False)
    if names:
        panels[1, 0].set(ylabel="of the held out (%)")
    panels[-1, 0].set(xlabel="step")
    for axes in panels[:, 0]:
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _held_out(
    axes: Any, steps: list[int], values: list[float], label: str, color: str, form: str, above: bool = True
) -> None:
    axes.plot(steps, values, "o-", color=color, label=label)
    if values:
        at, shift = (steps[-1], values[-1]), (0, 12 if above else -18)
        axes.annotate(form.format(values[-1]), at, shift, textcoords="offset points", ha="right")
