"""Adapters have the gradients that the chain rule gives, in every mode, and nothing else is trained."""

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, OptionError, comm, ledger, random
from colossal_mpi.layers import Parallelism
from colossal_mpi.layers.lora import add_adapters, linears, merge_adapters
from colossal_mpi.layers.models import GPT
from colossal_mpi.layers.optim import AdamW
from colossal_mpi.layers.pipeline import Pipeline, partition
from colossal_mpi.layers.recompute import recompute
from colossal_mpi.linalg.contraction import parse
from tests.cases import host
from tests.layers.test_pairs import CONFIG, Feed
from tests.reference import sequence_case as case
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.modes import FEW

NAMES = ["gpt-positions", "llama-shared", "llama-documents", "experts", "bert"]
RANK, ALPHA = 3, 7.0
GRIDS = [*FEW, {"data": 3}, {"col": 3}, {"seq": 2, "row": 1, "col": 2}, {"ulysses": 2, "col": 2}, {"row": 2, "col": 3}]


def adapted(model, targets=("*.*",)):
    """Add adapters, and make B random: with B = 0 the gradient of A is 0."""
    for low in add_adapters(model, RANK, ALPHA, targets):
        b = low.b.weight
        b.value = random.normal(b.shape, b.parallelism.grid, b.value.layout, 5, b.name).astype(b.dtype)


def factors_of(gradient, low):
    """Return the gradients of A and B by the chain rule, from that of the weight ``W + alpha / rank A B``."""
    sub = parse(low.joined)
    a, b = host(low.a.weight.value), host(low.b.weight.value)
    scaled = ALPHA / RANK * gradient
    return np.einsum(f"{sub.c},{sub.b}->{sub.a}", scaled, b), np.einsum(f"{sub.c},{sub.a}->{sub.b}", scaled, a)


def prepare(path):
    """Write loss and gradients of each model, from one rank whose adapters are merged: its weights are trained."""
    for name in NAMES:
        kept = {}

        def merged(model, kept=kept):
            adapted(model)
            kept.update({linear.name: linear.adapter for linear in linears(model) if linear.adapter})
            merge_adapters(model)

        loss, gradients = case.run(name, Parallelism(Grid(MPI.COMM_SELF)), change=merged)
        found = {}
        for linear, low in kept.items():
            if f"{linear}.weight" in gradients:
                of_a, of_b = factors_of(host(gradients[f"{linear}.weight"]), low)
                found |= {low.a.weight.name: of_a, low.b.weight.name: of_b}
        np.savez(path / f"{name}.npz", loss=loss, **found)


@pytest.mark.prepare(prepare)
@pytest.mark.grids(*GRIDS)
def test_gradients_are_those_of_the_chain_rule(grid, prepared):
    p = case.parallelism(grid)
    for name in NAMES:
        loss, gradients = case.run(name, p, change=adapted)
        exact = dict(np.load(prepared / f"{name}.npz"))
        reference = float(exact.pop("loss"))
        assert abs(loss - reference) <= 1e-12 * reference, name
        mine = {key: block_and_index(g) for key, g in gradients.items() if key in exact}
        assert mine.keys() == exact.keys()
        assert all(abs(g).max() > 1e-9 for g in exact.values())
        assert difference(mine, exact) <= 1e-10, name
        assert not [key for key in gradients if "lora" not in key]


@pytest.mark.prepare(prepare)
@pytest.mark.parametrize("options", [{"zero": 1}, {"zero": 2, "keep_gathered": False}, {"zero": 3}], ids=str)
@pytest.mark.grids({"data": 2, "col": 2}, {"data": 2, "row": 1, "col": 2})
def test_zero_and_stored_operands_and_microbatches(grid, prepared, options):
    p = case.parallelism(grid, **options)
    for name in ("gpt-positions", "experts"):
        loss, gradients = case.run(name, p, change=adapted, microbatches=3)
        exact = dict(np.load(prepared / f"{name}.npz"))
        if name == "experts":
            assert difference({key: block_and_index(g) for key, g in gradients.items()}, exact) <= 1e-10
        else:
            assert abs(loss - float(exact.pop("loss"))) <= 1e-12 * loss
            assert difference({key: block_and_index(gradients[key]) for key in exact}, exact) <= 1e-10


@pytest.mark.grids({"pipe": 2, "col": 2}, {"pipe": 3}, {"data": 2, "row": 1, "col": 2})
def test_steps_change_adapters_alone_and_equal_those_of_one_rank(grid):
    from tests.layers.test_pairs import stage_grid

    def train(grid, again=None):
        p = Parallelism(stage_grid(grid), case.mode_of(stage_grid(grid)))
        model = GPT(replace(CONFIG, layers=3), p)
        added = add_adapters(model, RANK, ALPHA, ["*.attention.*", "*.mlp.up"])
        assert added
        if again:
            recompute(model, again)
        pipeline = Pipeline(partition(model, grid), grid)
        optimizer = AdamW(pipeline.parameters(), lr=1e-2, clip=0.5, eps=1e-3)
        before = {q.name: host(q.value).copy() for q in pipeline.parameters() if q.frozen}
        numbers = [(pipeline.step(Feed(p, step)), optimizer.step()) for step in range(2)]
        assert all(np.array_equal(host(q.value), before[q.name]) for q in pipeline.parameters() if q.frozen)
        assert all(q.grad is None for q in pipeline.parameters())
        assert all("lora" in name for name in optimizer.moments)
        return np.array(numbers), {q.name: block_and_index(q.value) for q in optimizer.parameters}

    exact, weights = train(Grid(MPI.COMM_SELF))
    whole = {name: block for name, (block, _) in weights.items()}
    for again in (None, "selective", "full"):
        numbers, mine = train(grid, again)
        assert np.allclose(numbers, exact, rtol=1e-10, atol=0)
        assert difference(mine, whole) <= 1e-9
    assert any(abs(block).max() > 0 for name, block in whole.items() if "lora_b" in name)


@pytest.mark.grids({"data": 2, "col": 2}, {"row": 2, "col": 2}, {"row": 2, "col": 1, "depth": 2})
def test_initial_values_are_the_same_bits_and_b_is_zero(grid):
    found = []
    for p in (case.parallelism(grid), Parallelism(Grid(MPI.COMM_SELF))):
        model = case.MODELS["llama-shared"](p)
        add_adapters(model, RANK, ALPHA)
        found.append({q.name: q.value.gather() for q in model.parameters() if not q.frozen})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert np.array_equal(value, found[1][name])
        assert np.any(value) == ("lora_a" in name)


@pytest.mark.grids({"row": 2, "col": 2})
def test_no_gradient_of_a_frozen_weight_is_reduced(grid):
    """The backward pass moves what products move, without a word for the gradients of frozen weights."""
    p = case.parallelism(grid)

    def words(change):
        with ledger.record() as moved:
            _, gradients = case.run("llama-shared", p, change=change)
        del gradients
        return sum(comm.collect(moved.words, grid))

    assert words(lambda model: add_adapters(model, 1, 1.0, ["*.0.attention.q"])) < words(lambda model: None)


def test_what_cannot_be_adapted_is_refused():
    model = case.MODELS["llama-shared"](Parallelism(Grid(MPI.COMM_SELF)))
    with pytest.raises(OptionError, match=r"adapters for \*\.qkv: no product of the Llama has such a name; use"):
        add_adapters(model, 2, 1.0, ["*.qkv"])
    with pytest.raises(OptionError, match="adapters of rank 0: use 1 or more"):
        add_adapters(model, 0, 1.0)
    assert not any(q.frozen for q in model.parameters())
    model = case.MODELS["gpt"](Parallelism(Grid(MPI.COMM_SELF)))
    add_adapters(model, 2, 1.0, ["*"])
    with pytest.raises(OptionError, match="the adapter of head cannot be merged: another layer has the same weight"):
        merge_adapters(model)
