"""The first training steps of one configuration in float64 on one rank and in every mode, side by side.

Run as a program on the ranks of one mode, it does the steps and writes a JSON row; without a reference it writes the
gradients of its last step, with one it compares to them. `modes` starts all of these and returns the rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import comm, ledger
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import launch
from colossal_mpi.apps.training.train import make_grid
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import LaunchError
from colossal_mpi.grid import world_rank
from colossal_mpi.layout import index_of
from colossal_mpi.platform import backend

CASES: list[tuple[str, str, dict[str, int]]] = [
    ("one rank", "none", {"data": 1}),
    ("1d", "1d", {"col": 4}),
    ("2d", "2d", {"row": 2, "col": 2}),
    ("2.5d", "2.5d", {"depth": 2, "row": 2, "col": 2}),
    ("3d", "3d", {"row": 2, "col": 2, "depth": 2}),
    ("ring", "none", {"seq": 4}),
    ("ulysses", "none", {"ulysses": 4}),
]
"""Name, mode and grid of what the demo compares; the first is the reference."""


def first_steps(config: configs.Config, steps: int, reference: Path) -> dict[str, Any]:
    """Do the first steps; return losses, words and the greatest gradient difference to the reference.

    The difference of a parameter's gradient is relative to its greatest element, or to 1e-3 of the model's if that is
    larger: some exact gradients are zero. Each rank compares the blocks that it stores.
    """
    grid = make_grid(config)
    trainer, losses = Trainer(config, grid), []
    for step in range(steps):
        with ledger.record() as moved:
            losses.append(trainer.gradients(step))
            gradients = {p.name: p.reduce() for p in trainer.optimizer.parameters}
            trainer.optimizer.step(trainer.learning_rate(step))
    row: dict[str, Any] = {"losses": losses, "words_per_step": sum(comm.collect(moved.words, grid))}
    if not reference.exists():
        np.savez(reference, **{name: backend.to_host(g.local) for name, g in gradients.items()})  # type: ignore[arg-type]
    with np.load(reference) as exact:
        top = max(abs(exact[name]).max() for name in gradients)
        worst = max(_difference(g, exact[name], 1e-3 * top) for name, g in gradients.items())
    return row | {"max_gradient_difference": max(comm.collect(worst, grid))}


def _difference(gradient: DistArray, exact: np.ndarray, floor: float) -> float:
    mine = backend.to_host(gradient.local) - exact[index_of(gradient.box)]
    return float(np.max(abs(mine), initial=0) / max(abs(exact).max(), floor))


def modes(config: str, directory: Path, steps: int = 3) -> dict[str, dict[str, Any]]:
    """Start the first steps of `config` in every mode of `CASES`, one after the other; return a row for each.

    Raises
    ------
    LaunchError
        If one of them fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    reference = directory / "reference.npz"
    reference.unlink(missing_ok=True)
    rows = {}
    for name, tensor, axes in CASES:
        out, ranks = directory / f"{name.replace(' ', '-')}.json", int(np.prod(list(axes.values())))
        command = [
            sys.executable,
            "-m",
            "colossal_mpi.apps.training.compare",
            config,
            json.dumps(axes),
            tensor,
            str(steps),
            str(reference),
            str(out),
        ]
        code = launch.run(ranks, command)
        if code:
            raise LaunchError(f"the comparison of {name} failed with exit code {code}")
        rows[name] = {**json.loads(out.read_text()), "grid": axes, "ranks": ranks}
    return rows


def main(config: str, axes: str, tensor: str, steps: str, reference: str, out: str) -> None:
    """Do the part of one mode."""
    settings = [configs.grid_setting(json.loads(axes)), f'parallel.tensor="{tensor}"', 'parallel.dtype="float64"']
    row = first_steps(configs.load(config, settings), int(steps), Path(reference))
    if world_rank() == 0:
        Path(out).write_text(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
