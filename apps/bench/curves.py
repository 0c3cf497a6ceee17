"""The picture of `colossal_mpi.apps.bench.optimizers`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLORS = ("#5b6770", "#c0392b", "#4a7fb5", "#2e8b57", "#8e5ea2", "#d08c2f")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the validation losses over the steps, those of each optimizer's best rate thick, and the last over the rate.

    Parameters
    ----------
    rows : sequence of dict
        With ``case``, ``steps``, ``val_loss`` and ``final``.
    path : path
        PNG, PDF or SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["case"]["optimizer"] for row in rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=130, layout="constrained")
    for name, color in zip(names, _COLORS * len(names), strict=False):
        mine = [row for row in rows if row["case"]["optimizer"] == name]
        _curves(left, mine, color)
        _finals(right, mine, color)
    steps = rows[0]["case"]["steps"]
    left.set(xlabel="step", ylabel="validation loss (nats)", title="over the steps; thick: the best rate")
    right.set(xlabel="learning rate", title=f"after {steps} steps", xscale="log")
    _ticks(right, [row["case"]["lr"] for row in rows])
    _zoom(left, rows)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _means(rows: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Return for each rate the mean over the seeds of the final loss, infinity where one has none."""
    found: dict[float, list[float]] = {}
    for row in rows:
        found.setdefault(row["case"]["lr"], []).append(math.inf if row["final"] is None else row["final"])
    return {lr: sum(losses) / len(losses) for lr, losses in found.items()}


def _curves(axes: Any, rows: Sequence[dict[str, Any]], color: str) -> None:
    means = _means(rows)
    best, labelled = min(means, key=lambda lr: means[lr]), False
    for row in rows:
        case = row["case"]
        if case["lr"] != best:
            axes.plot(row["steps"], row["val_loss"], color=color, lw=0.8, alpha=0.4, zorder=1)
            continue
        label = None if labelled else f"{case['optimizer']}, lr {best:g}: {means[best]:.3f}"
        axes.plot(row["steps"], row["val_loss"], color=color, lw=2.0, label=label, zorder=2)
        labelled = True


def _finals(axes: Any, rows: Sequence[dict[str, Any]], color: str) -> None:
    means = _means(rows)
    rates = sorted(lr for lr in means if math.isfinite(means[lr]))
    axes.plot(rates, [means[lr] for lr in rates], "o-", color=color, label=rows[0]["case"]["optimizer"])


def _ticks(axes: Any, rates: Sequence[float]) -> None:
    at = sorted(set(rates))
    axes.set_xticks(at, [f"{lr:g}" for lr in at], size=8, rotation=45)
    axes.minorticks_off()


def _zoom(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Leave out what is above the losses of the first third, of which the differences at the end would be too small."""
    seen = [
        loss
        for row in rows
        for step, loss in zip(row["steps"], row["val_loss"], strict=True)
        if 4 * step >= row["case"]["steps"] and math.isfinite(loss)
    ]
    if seen:
        low, high = min(seen), sorted(seen)[int(0.98 * (len(seen) - 1))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
