"""Every task trains equally on any grid, resumes bitwise, and draws the same samples for any microbatches."""

import json
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.layers.pipeline import stage_grid
from tests.cases import host
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.modes import FEW, mode_of

TRAINING = {"steps": 6, "batch": 5, "microbatches": 2, "warmup": 2, "evaluate_batches": 2, "lr": 1e-2}
SMALL = {"layers": 1, "hidden": 15, "heads": 3}
EXPERTS = {"experts": 3, "expert_balance": 0.3, "expert_z_loss": 0.1}
TASKS = {
    "gpt": {"model": {**SMALL, "context": 11, "dropout": 0.2}},
    "llama": {"model": {"kind": "llama", "layers": 1, "hidden": 16, "heads": 4, "inner": 7, "context": 11}},
    "experts": {"model": {**SMALL, "context": 11, "std": 0.3, **EXPERTS}},
    "bert": {"model": {"kind": "bert", **SMALL, "context": 13, "dropout": 0.2}},
    "bert-pairs": {"model": {"kind": "bert", **SMALL, "context": 13, "next_sentence": True}},
    "vit": {"model": {"kind": "vit", **SMALL, "patch": 3, "dropout": 0.2, "drop_path": 0.2}, "data": {"shift": 1}},
}
GRIDS = (*FEW, {"seq": 3}, {"seq": 2, "ulysses": 2}, {"pipe": 2, "seq": 2})


def trainer(name, grid, dtype="float64", zero=0, **training):
    parallel = {
        "zero": zero,
        "grid": dict(grid.axes),
        "tensor": mode_of(stage_grid(grid)) or "none",
        "dtype": dtype,
        "kernels": "reference",
    }
    table = {**TASKS[name], "training": TRAINING | training, "parallel": parallel}
    return Trainer(configs.validate(table, name), grid)


def three_steps(name, grid, **training):
    """Return the losses of three steps, then validation and sample."""
    run = trainer(name, grid, **training)
    losses = [run.step(step)["loss"] for step in range(3)]
    return {"losses": losses, **run.validate(), "sample": list(run.task.sample(3))}


def prepare(path: Path):
    for name in TASKS:
        (path / f"{name}.json").write_text(json.dumps(three_steps(name, Grid(MPI.COMM_SELF))))


@pytest.mark.prepare(prepare)
@pytest.mark.grids(*GRIDS)
def test_three_steps_are_the_same_on_any_grid(grid, prepared):
    """One grid takes every other task, the next grid the others."""
    for name in list(TASKS)[GRIDS.index(dict(grid.axes)) % 2 :: 2]:
        exact, mine = json.loads((prepared / f"{name}.json").read_text()), three_steps(name, grid)
        assert set(mine) == set(exact)
        for key in exact:
            assert np.allclose(mine[key], exact[key], rtol=1e-10, atol=0), (name, key)
        assert len(set(mine["losses"])) == 3


def own_losses(grid):
    """Return the rows of three steps of a GPT with experts."""
    run = trainer("experts", grid, optimizer="muon")
    return [run.step(step) for step in range(3)]


def prepare_own_losses(path: Path):
    (path / "own.json").write_text(json.dumps(own_losses(Grid(MPI.COMM_SELF))))


@pytest.mark.prepare(prepare_own_losses)
@pytest.mark.grids({"data": 2, "col": 2}, {"pipe": 2, "data": 2}, {"data": 3})
def test_what_experts_add_to_the_loss_is_reported_and_optimised(grid, prepared):
    exact, mine = json.loads((prepared / "own.json").read_text()), own_losses(grid)
    for row, reference in zip(mine, exact, strict=True):
        assert set(row) == {"loss", "expert_balance", "expert_z_loss", "gradient_norm", "learning_rate"}
        assert all(abs(row[key] - reference[key]) <= 1e-9 * reference[key] for key in row)
        assert row["expert_balance"] >= 0.3 * 2  # top_k at perfect balance
        assert row["expert_z_loss"] > 0


def expert_gradients(grid, **options):
    """Return the losses and the gradients of a step of a GPT with experts."""
    run = trainer("experts", grid, **options)
    loss = run.gradients(0)
    gradients = {q.name: block_and_index(q.reduce()) for q in run.optimizer.parameters}
    return {"loss": loss, **run.own}, gradients


def prepare_expert_gradients(path: Path):
    losses, gradients = expert_gradients(Grid(MPI.COMM_SELF), microbatches=1)
    (path / "losses.json").write_text(json.dumps(losses))
    np.savez(path / "gradients.npz", **{name: block for name, (block, _) in gradients.items()})


@pytest.mark.prepare(prepare_expert_gradients)
@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.grids(
    {"data": 2},
    {"pipe": 2},
    {"pipe": 2, "data": 2},
    {"data": 2, "col": 2},
    {"row": 2, "col": 2},
    {"row": 1, "col": 2, "depth": 2},
)
def test_experts_have_the_gradients_of_one_rank_and_one_microbatch(grid, prepared, zero):
    exact = json.loads((prepared / "losses.json").read_text())
    losses, gradients = expert_gradients(grid, microbatches=3, zero=zero)
    assert losses == pytest.approx(exact, rel=1e-12)
    assert difference(gradients, dict(np.load(prepared / "gradients.npz"))) <= 1e-10


@pytest.mark.grids({"data": 2, "col": 2}, {"pipe": 2, "row": 2})
def test_averages_are_validated_and_saved(grid, shared_path):
    whole, plain = trainer("gpt", grid, average=0.5), trainer("gpt", grid)
    by_hand = {q.name: host(q.value).copy() for q in plain.optimizer.parameters}
    for step in range(3):
        assert whole.step(step) == plain.step(step)
        keep = min(0.5, (1 + step) / (10 + step))
        by_hand = {q.name: keep * by_hand[q.name] + (1 - keep) * host(q.value) for q in plain.optimizer.parameters}
    raw = plain.validate()
    whole.save(shared_path / "step", 3)
    second = trainer("gpt", grid, average=0.5)
    assert second.restore(shared_path / "step") == 3
    assert whole.step(3) == second.step(3) == plain.step(3)
    assert second.validate() == whole.validate() != raw
    keep = min(0.5, 4 / 13)
    for q in plain.optimizer.parameters:
        q.value.local[...] = keep * by_hand[q.name] + (1 - keep) * host(q.value)
    assert plain.validate()["val_loss"] == pytest.approx(whole.validate()["val_loss"], rel=1e-12)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.grids({"data": 2, "col": 2})
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(grid, name, shared_path):
    whole, second = (trainer(name, grid, dtype="float32") for _ in range(2))
    for step in range(2):
        whole.step(step)
    whole.save(shared_path / "step", 2)
    assert second.restore(shared_path / "step") == 2
    for step in (2, 3):
        assert second.step(step) == whole.step(step)
    for mine, other in zip(second.optimizer.parameters, whole.optimizer.parameters, strict=True):
        assert np.array_equal(host(mine.value), host(other.value)), mine.name


@pytest.mark.parametrize("name", TASKS)
def test_microbatches_change_nothing(name):
    grid = Grid(MPI.COMM_SELF)
    one, three = three_steps(name, grid, microbatches=1), three_steps(name, grid, microbatches=3)
    assert np.allclose(one["losses"], three["losses"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name):
    grid = Grid(MPI.COMM_SELF)
    runs = [three_steps(name, grid, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0]["losses"] != runs[2]["losses"]


LEARNS = {"patch": 4, "layers": 2, "hidden": 64, "heads": 4, "std": 0.1}


@pytest.mark.grids({})
def test_a_vit_names_the_digits(grid):
    assert accuracy_on_digits(grid) >= 0.95


@pytest.mark.long
@pytest.mark.deadline(180)
@pytest.mark.grids({"row": 2, "col": 2})
def test_a_vit_names_the_digits_on_four_ranks(grid):
    assert accuracy_on_digits(grid) >= 0.95


def accuracy_on_digits(grid):
    """Return the share of held-out digits that a small ViT names after 150 steps."""
    training = {"steps": 150, "batch": 64, "microbatches": 1, "warmup": 30, "lr": 2e-3}
    parallel = {"grid": dict(grid.axes), "tensor": mode_of(stage_grid(grid)) or "none"}
    table = {"model": {"kind": "vit", **LEARNS}, "data": {"validation": 0.2}, "training": training}
    run = Trainer(configs.validate({**table, "parallel": parallel}, "digits"), grid)
    for step in range(150):
        run.step(step)
    return run.validate()["val_accuracy"]
