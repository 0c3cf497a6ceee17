"""The first training steps of one configuration in float64, on one rank and in every mode.

The demo calls `modes`, which starts this module as a program on the ranks of each mode. The program does the steps and
writes a row as JSON: the first one writes the gradients of its last step, and the others compare theirs to them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colossal_mpi import comm, ledger
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import launch
from colossal_mpi.apps.training.train import make_grid
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import LaunchError
from colossal_mpi.grid import world_rank
from colossal_mpi.layers import MODES, SEQUENCE_MODES
from colossal_mpi.layout import index_of
from colossal_mpi.platform import backend


class Case(NamedTuple):
    """A way to run the comparison: its name, the modes, and the axes of its grid."""

    name: str
    tensor: str
    sequence: str
    axes: dict[str, int]


def cases() -> list[Case]:
    """Return one rank, which is the reference, then every tensor mode and every sequence mode on a small grid."""
    found = [Case("one rank", "none", "ring", {"data": 1})]
    for mode in MODES.values():
        if mode.axes:
            size = 4 if len(mode.axes) == 1 else 2
            found.append(Case(mode.name, mode.name, "ring", dict.fromkeys(mode.axes, size)))
    for sequence in SEQUENCE_MODES.values():
        axis = sequence.ring[0] if sequence.ring else sequence.heads[-1]
        found.append(Case(sequence.name, "none", sequence.name, {axis: 4}))
    return found


def first_steps(config: configs.Config, steps: int, reference: Path) -> dict[str, Any]:
    """Do the first steps; return losses, words, and the greatest difference of a gradient to the reference.

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
    difference = backend.to_host(gradient.local) - exact[index_of(gradient.box)]
    return float(np.max(abs(difference), initial=0) / max(abs(exact).max(), floor))


def modes(config: str, directory: Path, steps: int = 3) -> dict[str, dict[str, Any]]:
    """Start the first steps of `config` in every mode, one after the other; return a row for each.

    Raises
    ------
    LaunchError
        If one of them fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    reference = directory / "reference.npz"
    reference.unlink(missing_ok=True)
    rows = {}
    for name, tensor, sequence, axes in cases():
        out, ranks = directory / f"{name.replace(' ', '-')}.json", int(np.prod(list(axes.values())))
        command = [
            sys.executable,
            "-m",
            "colossal_mpi.apps.training.compare",
            config,
            json.dumps(axes),
            tensor,
            sequence,
            str(steps),
            str(reference),
            str(out),
        ]
        code = launch.run(ranks, command)
        if code:
            raise LaunchError(f"the comparison of {name} failed with exit code {code}")
        rows[name] = {**json.loads(out.read_text()), "grid": axes, "ranks": ranks}
    return rows


def main(config: str, axes: str, tensor: str, sequence: str, steps: str, reference: str, out: str) -> None:
    """Do the steps of one mode on its ranks, and write the row."""
    modes_of = [f'parallel.tensor="{tensor}"', f'parallel.sequence="{sequence}"']
    settings = [configs.grid_setting(json.loads(axes)), *modes_of, 'parallel.dtype="float64"']
    row = first_steps(configs.load(config, settings), int(steps), Path(reference))
    if world_rank() == 0:
        Path(out).write_text(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
