"""A forecast equals the cost that a run measures, and the search returns configurations that fit the memory."""

import json
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError, Grid, comm, ledger
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import planning
from colossal_mpi.apps.planning import GivenRates
from colossal_mpi.apps.planning.candidates import even_factors, grids, with_settings
from colossal_mpi.apps.planning.commands import time_steps
from colossal_mpi.apps.planning.estimate import Estimates
from colossal_mpi.apps.planning.forecast import checkpoint_copies, forecast, sampled_forecast
from colossal_mpi.apps.planning.machine import bytes_of, calibrate
from colossal_mpi.apps.planning.report import explained, timeline
from colossal_mpi.apps.planning.search import USABLE, search
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import ColossalError
from colossal_mpi.layers.overlap import buckets
from colossal_mpi.layers.pipeline import PIPE
from colossal_mpi.layers.pipeline.schedule import BackwardInput, BackwardWeight, Forward
from colossal_mpi.machine import Link, Machine, measure

LINK = Link(50e-6, 2e9)
MACHINE = Machine(40e9, 30e9, 5e-6, 2e-4, LINK, LINK, 4, overlap=False)
WAYS = [
    ({"row": 2, "col": 2}, "2d", {}),
    ({"data": 2, "col": 2}, "1d", {"zero": 1, "recompute": "selective"}),
    ({"data": 4}, "none", {}),
    ({"data": 4}, "none", {"zero": 1, "microbatches": 3}),
    ({"data": 4}, "none", {"zero": 2, "microbatches": 2}),
    ({"data": 4}, "none", {"zero": 3, "microbatches": 3}),
    ({"pipe": 2, "data": 2}, "none", {"schedule": "interleaved", "virtual_stages": 2, "microbatches": 5}),
    ({"pipe": 4}, "none", {"schedule": "zero-bubble", "microbatches": 4, "recompute": "full"}),
    ({"seq": 2, "ulysses": 2}, "none", {"zero": 2, "microbatches": 2}),
]
GRIDS = [dict(axes) for axes in dict.fromkeys(tuple(axes.items()) for axes, *_ in WAYS)]
UNEVEN = ("model.hidden=285", "model.heads=5", "model.context=63", "model.vocabulary=257")
"""Sizes that two and four do not divide."""
BUCKET = "parallel.bucket=65536"


def config_of(axes, tensor="none", model=UNEVEN, **settings):
    loaded = configs.load("demo", ["parallel.kernels=reference", "training.batch=15", BUCKET, *model])
    return with_settings(loaded, dict(axes), tensor, **settings)


@pytest.mark.grids(*GRIDS)
def test_words_are_those_of_the_ledger_and_memory_that_of_arrays(grid, monkeypatch):
    # wait for every bucket at once: how many of those under way have arrived depends on the load of the machine
    monkeypatch.setattr(buckets, "_MOST_IN_FLIGHT", 0)
    configs_here = [config_of(axes, *way, **settings) for axes, *way, settings in WAYS if axes == dict(grid.axes)]
    told = [measured(config, Grid(grid.comm(tuple(grid.axes)), "cpu", **grid.axes)) for config in configs_here]
    for config, everyone in list(zip(configs_here, told, strict=True))[grid.rank :: grid.size]:
        for stage, cost in enumerate(forecast(config, MACHINE).stages):
            _, words, messages, most = next(one for one in everyone if one[0] == stage)
            assert {axis: n for axis, n in cost.words_by_axis.items() if n} == {a: n for a, n in words.items() if n}
            assert cost.messages == messages
            most += cost.run.weights + cost.run.state
            assert abs(cost.peak - most) <= 0.02 * most, (config.parallel, stage, cost.peak, most)


def measured(config, grid):
    """Return the stage, the words by axis, the messages and the peak of memory of a step on each rank."""
    grid.shares = False  # blocks that neighbours read in place are not copied, and are not NumPy's memory
    tracemalloc.start()
    trainer = Trainer(config, grid)
    trainer.step(0)
    before = tracemalloc.get_traced_memory()[0]  # weights, the optimizer's state, and whatever else is alive
    tracemalloc.reset_peak()
    with ledger.record() as moved:
        trainer.step(1)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return comm.collect((grid.coords.get(PIPE, 0), moved.by_axis(), len(moved.events), peak), grid)


@pytest.mark.parametrize(("axes", "tensor", "settings"), [*WAYS, ({"data": 1}, "none", {"microbatches": 5})])
def test_a_sample_of_a_step_foretells_the_whole(axes, tensor, settings):
    config = config_of(axes, tensor, **settings)
    short, whole = sampled_forecast(config, MACHINE), forecast(config, MACHINE)
    count = config.training.microbatches
    larger = -(-15 // count) * count / 15 - 1  # the sampled forecast takes all microbatches to be as large as the first
    once = 0.002 if config.parallel.zero == 3 else 0.0  # vectors are gathered for the first microbatch alone
    assert 0 <= short.words - whole.words <= (larger + once) * whole.words
    assert abs(short.peak - whole.peak) <= 0.25 * whole.peak  # zero-bubble keeps the operands of weight products longer
    assert abs(short.seconds - whole.seconds) <= 0.12 * whole.seconds


def test_a_step_of_one_stage_is_the_sum_of_what_is_done():
    one = forecast(config_of((("data", 4),)), MACHINE)
    (cost,) = one.stages
    assert one.bubble == pytest.approx(0, abs=1e-12)
    assert one.seconds == pytest.approx(cost.busy) == pytest.approx(cost.run.seconds)
    faster = forecast(one.config, Machine(80e9, 60e9, 2.5e-6, 1e-4, Link(25e-6, 4e9), LINK, 4, overlap=False))
    assert faster.seconds == pytest.approx(one.seconds / 2)


def test_stages_wait_as_the_schedule_says():
    """The last stage has most to do; it waits only until its first microbatch arrives and after its last has left."""
    axes, link = (("pipe", 5),), Link(0.0, float("inf"))
    machine = Machine(1e6, float("inf"), 0.0, 0.0, link, link, 5)
    one = forecast(config_of(axes, schedule="1f1b", microbatches=5), machine)
    assert one.stages[-1].busy > max(cost.busy for cost in one.stages[:-1])
    each = [[cost.seconds_of(kind(0, 0)) for kind in (Forward, BackwardInput, BackwardWeight)] for cost in one.stages]
    way = sum(forward + inputs for forward, inputs, _ in each[:-1])  # there and back; weight products come later
    whole = way + one.stages[-1].busy - each[-1][2] + max(each[0][2], each[-1][2] - way)
    assert one.seconds == pytest.approx(whole, rel=1e-12)
    assert one.bubble == pytest.approx(1 - sum(cost.busy for cost in one.stages) / 5 / whole, rel=1e-12)
    lines = timeline(one.spans, 5)
    assert [line.plain.strip()[0] for line in lines] == list("01234")
    assert all(sign in lines[0].plain for sign in "12345abcde")


@pytest.mark.grids({"data": 2, "col": 2})
def test_copies_of_checkpoints_are_foretold(grid):
    config = config_of(grid.axes, "1d", zero=1)
    trainer = Trainer(config, grid)
    trainer.reserve()
    taken = comm.collect(sum(kept.nbytes for kept in trainer.saving._copies.values()), grid)
    assert comm.collect(trainer.copies, grid) == taken
    assert taken[3] < taken[0] == checkpoint_copies(config)[0]  # the first of several replicas writes an array
    for none in ({"background_checkpoints": False}, {"checkpoint_every": config.training.steps}):
        assert checkpoint_copies(with_settings(config, dict(grid.axes), "1d", **none)) == [0]


def test_the_shapes_of_a_mode_are_even():
    assert even_factors(16, 2) == [4, 4]
    assert even_factors(16, 3) == [2, 2, 4]
    assert even_factors(6, 3) is None
    config = config_of((("data", 1),))
    found = grids(config, 8, sequences=False)
    assert ({"depth": 2, "row": 2, "col": 2}, "2.5d") in found
    assert ({"pipe": 2, "data": 4}, "none") in found
    assert not any("seq" in axes or "ulysses" in axes for axes, _ in found)
    assert ({"seq": 8}, "none") in grids(config, 8, sequences=True)
    assert all(axes.get("pipe", 1) <= config.model.layers for axes, _ in found)


def searched(ranks, memory=float("inf"), settings=(), team=None, machine=MACHINE):
    config, team = configs.load("demo", list(settings)), Grid(None, "cpu", ranks=1) if team is None else team
    return search(config, ranks, machine, memory, 4, team, lambda done, of: None)


def told(found):
    return [(one.config, one.seconds, one.peak) for one in found.best]


def test_what_is_left_out_is_not_among_the_best(monkeypatch):
    fast = Link(1e-6, 1e12)
    slow = replace(MACHINE, call=1e-4, memory=1e8, near=fast, far=fast)  # small microbatches and updates take long
    short = searched(4, machine=slow)
    monkeypatch.setattr(Estimates, "lower_bound", lambda self, config: 0.0)
    whole = searched(4, machine=slow)
    assert told(short) == told(whole)
    assert short.estimated < whole.estimated


@pytest.mark.grids({"data": 3})
def test_ranks_that_share_a_search_find_what_one_finds(grid):
    ways = (2, 16 << 20, ["training.batch=4"])
    own = replace(MACHINE, flops=MACHINE.flops / (1 + grid.rank))  # rank 0's counts
    together, one = searched(*ways, grid, own), searched(*ways, Grid(MPI.COMM_SELF, "cpu", ranks=1))
    assert told(together) == told(one)
    assert len(one.best) == 2
    assert (together.grids, together.unfit, together.smallest) == (one.grids, one.unfit, one.smallest)
    assert one.unfit


def test_the_search_returns_what_fits_the_fastest_first():
    free = searched(4)
    assert [one.seconds for one in free.best] == sorted(one.seconds for one in free.best)
    assert len(free.best) == 4 <= free.grids <= free.estimated
    limit = 0.8 * free.best[0].peak / USABLE
    tight = searched(4, limit)
    assert tight.best
    assert all(one.peak <= USABLE * limit for one in tight.best)
    assert tight.best[0].seconds >= free.best[0].seconds
    assert any(one.config.parallel.recompute != "none" or one.config.parallel.zero for one in tight.best)


def test_nothing_fits_into_too_little_memory():
    found = searched(2, 1 << 20)
    assert not found.best
    assert found.sequences
    (line,) = explained(found, 1 << 20, "demo")
    assert "none fits into 90% of 1.00 MiB" in line
    assert "take more ranks" in line


def test_ranks_that_a_model_cannot_fill():
    (line,) = explained(searched(1009), float("inf"), "demo")
    assert "the model cannot fill so many ranks" in line


@pytest.mark.smoke  # with two simulated nodes, of two ranks and one
@pytest.mark.grids({"data": 3})
def test_a_machine_is_measured_on_nodes_of_any_size(grid):
    machine = calibrate(measure(grid, "float32"), grid)
    told = comm.collect((machine.near.bandwidth, machine.far.bandwidth, machine.ranks_per_node), grid)
    assert len(set(told)) == 1
    assert all(rate > 0 for rate in vars(machine).values() if isinstance(rate, float))
    assert machine.near.bandwidth > 0 < machine.far.bandwidth


def test_few_samples_are_cut_along_the_sequence():
    assert searched(4, settings=["training.batch=2"]).sequences


@pytest.mark.grids({"data": 4})
def test_a_trial_does_the_steps(grid):
    ways = [config_of((("data", 4),)), config_of((("pipe", 2), ("col", 2)), "1d", microbatches=2)]
    taken = time_steps(ways, 2)
    assert len(taken) == 2
    assert all(seconds > 0 for seconds in taken)


def options(**changes):
    given = {
        "source": "demo",
        "settings": [],
        "ranks": 4,
        "memory": None,
        "given": GivenRates(),
        "count": 3,
        "rounds": 0,
        "file": None,
    }
    return planning.checked_options(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ranks": 0}, "--ranks 0"),
        ({"count": 0}, "--show 0"),
        ({"rounds": 3}, "this job has 1: mpiexec -n 4"),
        ({"memory": "3 bananas"}, "write for example 80GiB"),
        ({"settings": ["parallel.grid={ data = 0 }"]}, "parallel.grid"),
    ],
)
def test_bad_options_are_refused(changes, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        options(**changes)


def test_rates_that_cannot_be_are_refused():
    with pytest.raises(ColossalError, match="rates are above 0"):
        planning.plan(options(given=GivenRates(flops=-1.0)))
    assert bytes_of("80GiB") == 80 << 30


def cli(*words):
    command = [sys.executable, "-m", "colossal_mpi.apps.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_plan_for_another_machine(tmp_path):
    batch = ["--set", "training.batch=12"]
    rates = [*batch, "--flops", "400e12", "--bandwidth", "25e9", "--gpu-memory", "80GiB", "--ranks-per-node", "4"]
    rows = tmp_path / "plan.json"
    result = cli("plan", "demo", "--ranks", "8", *rates, "--show", "2", "--json", str(rows))
    assert result.returncode == 0, result.stderr
    told = json.loads(rows.read_text())
    assert told["machine"]["flops"] == 400e12
    assert len(told["ways"]) == 2
    (command,) = re.findall(r"\$ mpiexec -n 8 colossal-mpi (train demo .*)", result.stdout)
    assert "--set training.batch=12" in command
    dry = cli(*command.split(), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"{told['ways'][0]['words']:,}" in dry.stdout


def test_a_dry_run_shows_memory_words_and_the_order_of_microbatches(tmp_path):
    grid = ["--grid", "pipe=2,data=2", "--tensor", "none", "--set", "training.microbatches=4"]
    result = cli("train", "demo", *grid, "--dry-run", "--set", f"run.directory={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert "4 ranks, pipe=2,data=2" in result.stdout
    assert "over pipe" in result.stdout
    assert "1 2 3 forward" in result.stdout
    assert not (tmp_path / "run").exists()
