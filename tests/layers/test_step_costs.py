"""The cost of a step that a dry run predicts equals the memory and words that a real step takes."""

import tracemalloc

import pytest
from mpi4py import MPI

from colossal_mpi import Grid, GridError, comm, ledger, meta
from colossal_mpi.layers import Parallelism, recompute
from colossal_mpi.layers.analysis import TokenData, step_costs
from colossal_mpi.layers.analysis.flops import hardware_flop
from colossal_mpi.layers.analysis.memory import microbatch_bytes, saved_bytes
from colossal_mpi.layers.models import GPT, GPTConfig, Llama, LlamaConfig
from colossal_mpi.layers.optim import SGD, AdamW, Muon
from colossal_mpi.layers.pipeline import PIPE, Pipeline, partition, stage_grid
from tests.reference.modes import mode_of

SIZES = {"vocabulary": 61, "layers": 3, "hidden": 40, "heads": 10, "inner": 77, "positions": 19}
MODELS = {
    "gpt": lambda dtype: lambda p: GPT(GPTConfig(**SIZES, dropout=0.1, dtype=dtype), p),
    "llama": lambda dtype: lambda p: Llama(LlamaConfig(**SIZES, groups=5, dtype=dtype), p),
}
BATCH, LENGTH, MICROBATCHES = 9, 19, 3
CASES = [
    ("gpt", {}),
    ("llama", {"keep_gathered": False}),
    ("gpt", {"kinds": "full", "zero": 1}),
    ("llama", {"kinds": "selective", "zero": 2}),
    ("gpt", {"zero": 3, "dtype": "float16"}),
    ("llama", {"kinds": ("attention", "mlp"), "dtype": "bfloat16", "zero": 1, "optimizer": Muon}),
]


def feed_of(dtype):
    return lambda p: TokenData(p, SIZES["hidden"], BATCH, LENGTH, MICROBATCHES, dtype)


def measured(grid, tensor, model, dtype, kinds="none", schedule="1f1b", chunks=1, optimizer=AdamW, **modes):
    """Return the memory and words of a real step on this rank, by name."""
    p = Parallelism(stage_grid(grid), tensor, **modes)
    pipeline = Pipeline(
        partition(recompute(MODELS[model](dtype)(p), kinds, schedule == "zero-bubble"), grid, chunks), grid, schedule
    )
    optimizer, feed = optimizer(pipeline.parameters()), feed_of(dtype)(p)
    weights = [q.value for q in optimizer.parameters]
    state = [*optimizer.state().values(), *(w for w in optimizer.weights().values() if w.dtype != dtype)]
    saved, gradients = microbatch_bytes(pipeline, feed)
    with ledger.record() as moved:
        pipeline.step(feed)
        optimizer.step()
    found = {"weights": saved_bytes(weights), "state": saved_bytes(state), "saved": saved, "gradients": gradients}
    return found | {"words": moved.words}


def check(grid, cases):
    """Compare what all ranks measure with predictions, each of which one rank makes while others make theirs."""
    tensor, told = mode_of(stage_grid(grid)), []
    for model, options in cases:
        mine = measured(grid, tensor, model, options.get("dtype", "float32"), **without_dtype(options))
        told.append(comm.collect((grid.coords.get(PIPE, 0), mine), grid))
    for everyone, (model, options) in list(zip(told, cases, strict=True))[grid.rank :: grid.size]:
        dtype = options.get("dtype", "float32")
        predicted = step_costs(MODELS[model](dtype), feed_of(dtype), grid.axes, tensor, **without_dtype(options))
        for stage, prediction in enumerate(predicted):
            first = next(found for place, found in everyone if place == stage)
            for name, value in first.items():
                allowed = 0 if name in ("words", "weights", "state") else 0.02 * value
                assert abs(getattr(prediction, name) - value) <= allowed, (name, stage, value, prediction)
            assert prediction.peak >= prediction.weights + prediction.state + prediction.activations
            if options.get("kinds", "none") == "none" and grid.size == 1:
                assert prediction.flops == hardware_flop(MODELS[model](dtype)(Parallelism(grid)), BATCH, LENGTH)


def without_dtype(options):
    return {name: value for name, value in options.items() if name != "dtype"}


@pytest.mark.grids({}, {"col": 3}, {"row": 2, "col": 2}, {"depth": 2, "row": 1, "col": 2}, {"data": 2, "row": 2})
def test_memory_and_words_of_a_step(grid):
    check(grid, CASES)


@pytest.mark.grids({"pipe": 2, "data": 2}, {"pipe": 2, "row": 2, "col": 2})
def test_memory_and_words_of_stages(grid):
    cases = [("gpt", {}), ("llama", {"schedule": "zero-bubble", "kinds": "full", "zero": 1})]
    interleaved = {"schedule": "interleaved", "chunks": 2, "dtype": "float16", "keep_gathered": False}
    check(grid, [*cases, ("gpt", interleaved)])


def traced_peak(model, feed, options):
    """Return the peak of memory of a step on one rank in bytes, for arrays and Python's objects."""
    tracemalloc.start()
    try:
        p = Parallelism(Grid(MPI.COMM_SELF), None, options.get("keep_gathered", True))
        pipeline = Pipeline([recompute(model(p), options.get("kinds", "none"))], p.grid)
        optimizer, mine = AdamW(pipeline.parameters()), feed(p)
        for q in optimizer.parameters:
            assert q.value.size  # it is made now
        tracemalloc.reset_peak()
        pipeline.step(mine)
        optimizer.step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kinds", ["none", "selective", "full"])
def test_the_peak_of_a_step_is_that_of_numpy(kinds, dtype):
    config = GPTConfig(vocabulary=256, layers=4, hidden=192, heads=4, positions=192, dtype=dtype)

    def feed(p):
        return TokenData(p, 192, 8, 192, 1, dtype)

    (predicted,) = step_costs(lambda p: GPT(config, p), feed, {}, kinds=kinds)
    actual = traced_peak(lambda p: GPT(config, p), feed, {"kinds": kinds})
    assert abs(predicted.peak - actual) <= 0.02 * actual


def test_a_model_far_larger_than_this_machine():
    """For blocks of Llama 3 8B on 256 ranks, weights, state and saved activations equal their closed forms."""
    config, axes = LlamaConfig(layers=8, dtype="bfloat16"), {"pipe": 4, "data": 8, "col": 8}

    def feed(p):
        return TokenData(p, 4096, 64, 8192, 4, "bfloat16")

    predicted = step_costs(lambda p: Llama(config, p), feed, axes, "1d", zero=1, kinds="full")
    block = 2 * 4096 + 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    assert [p.coords["pipe"] for p in predicted] == [0, 1, 2, 3]
    total = 8 * block + 2 * 128256 * 4096 + 4096
    assert sum(p.weights for p in predicted) == pytest.approx(2 * total / 8, rel=1e-3)
    assert sum(p.state for p in predicted) == pytest.approx(12 * total / 64, rel=1e-3)
    assert [p.live for p in predicted] == [4, 3, 2, 1]
    inputs = 2 * 8192 * 4096 * 2 / 8  # bytes of two samples of a microbatch, cut over col
    assert predicted[1].saved == pytest.approx(inputs * len_of_stage(predicted[1], block), rel=0.01)


def len_of_stage(prediction, block):
    """Return the number of blocks of a stage that holds only blocks."""
    return round(prediction.weights / (2 * block / 8))


@pytest.mark.grids({"seq": 3}, {"seq": 2, "col": 2})
def test_memory_and_words_of_a_cut_sequence(grid):
    check(grid, [("llama", {"sequence": sequence}) for sequence in ("ring", "ulysses")])


def test_recomputed_blocks_keep_nothing_for_later_unless_asked_to():
    make, axes = MODELS["gpt"]("float32"), {"pipe": 2}
    at_once, deferred = (
        step_costs(make, feed_of("float32"), axes, kinds="full", schedule=schedule)[1].peak
        for schedule in ("1f1b", "zero-bubble")
    )
    assert at_once < 0.9 * deferred


def test_an_optimizer_of_less_state():
    config = GPTConfig(**SIZES)
    one, two = (
        step_costs(lambda p: GPT(config, p), feed_of("float32"), {"data": 4}, zero=1, optimizer=make)[0]
        for make in (SGD, AdamW)
    )
    assert two.state == 2 * one.state


def test_planned_grids_have_no_memory():
    with meta.tally() as tally:
        grid = Grid.meta(5, data=4, row=1000)
        assert dict(grid.coords) == {"data": 0, "row": 5}
        block = grid.empty((10**6, 10**6), "float64")
        assert tally.now == tally.peak == 8 * 10**12
        assert block[3:5, :].memory is block.memory
        del block
        assert (tally.now, tally.peak) == (0, 8 * 10**12)
    with pytest.raises(GridError, match="the rank must be from 0 to 7, not 8"):
        Grid.meta(8, row=8)
