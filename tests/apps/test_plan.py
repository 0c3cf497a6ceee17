"""Plans: what is predicted is what a run takes, and the search returns ways that fit."""

import json
import re
import subprocess
import sys
import tracemalloc

import pytest

from colossal_mpi import ConfigError, Grid, comm, ledger
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.planning import plan, show
from colossal_mpi.apps.planning.candidates import grids, most_even, with_settings
from colossal_mpi.apps.planning.dry import timeline
from colossal_mpi.apps.planning.forecast import forecast, sampled
from colossal_mpi.apps.planning.rates import Given, size_of
from colossal_mpi.apps.planning.search import USABLE, search
from colossal_mpi.apps.planning.trial import trial
from colossal_mpi.apps.trainer import Trainer
from colossal_mpi.errors import ColossalError
from colossal_mpi.layers.pipeline import PIPE
from colossal_mpi.machine import Link, Machine

LINK = Link(50e-6, 2e9)
MACHINE = Machine(40e9, 30e9, 5e-6, 2e-4, LINK, LINK, 4, overlap=False)
WAYS = {
    (("row", 2), ("col", 2)): ("2d", {}),
    (("data", 2), ("col", 2)): ("1d", {"zero": 1, "recompute": "selective"}),
    (("data", 4),): ("none", {"zero": 3, "microbatches": 3}),
    (("pipe", 2), ("data", 2)): ("none", {"schedule": "interleaved", "virtual_stages": 2, "microbatches": 5}),
    (("pipe", 4),): ("none", {"schedule": "zero-bubble", "microbatches": 4, "recompute": "full"}),
    (("seq", 2), ("ulysses", 2)): ("none", {"microbatches": 2}),
}


def config_of(axes, tensor="none", model=(), **settings):
    loaded = configs.load("demo", ["parallel.kernels=reference", "training.batch=15", *model])
    return with_settings(loaded, dict(axes), tensor, **settings)


@pytest.mark.grids(*map(dict, WAYS))
def test_words_are_those_of_the_ledger_and_memory_that_of_arrays(grid):
    tensor, settings = WAYS[tuple(grid.axes.items())]
    config = config_of(grid.axes, tensor, **settings)
    grid = Grid(grid.comm(tuple(grid.axes)), "cpu", **grid.axes)
    grid.shares = False  # blocks that neighbours read in place need no copies, and are not NumPy's memory
    trainer = Trainer(config, grid)
    trainer.step(0)
    tracemalloc.start()  # what is there before is known: weights and the optimizer's state
    with ledger.record() as moved:
        trainer.step(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    told = comm.collect((grid.coords.get(PIPE, 0), moved.by_axis(), len(moved.events), peak), grid)
    found = forecast(config, MACHINE)
    for stage, cost in enumerate(found.stages):
        _, words, messages, most = next(one for one in told if one[0] == stage)
        assert {axis: n for axis, n in cost.words_by_axis.items() if n} == {axis: n for axis, n in words.items() if n}
        assert cost.messages == messages
        most += cost.run.weights + cost.run.state
        assert abs(cost.peak - most) <= 0.05 * most, (stage, cost.peak, most)


@pytest.mark.parametrize("axes", [*WAYS, ()])
def test_a_sample_of_a_step_foretells_the_whole(axes):
    tensor, settings = WAYS.get(axes, ("none", {}))
    config = config_of(axes or (("data", 1),), tensor, **settings, **({} if axes else {"microbatches": 5}))
    short, whole = sampled(config, MACHINE), forecast(config, MACHINE)
    assert abs(short.words - whole.words) <= 0.07 * whole.words  # microbatches are of 15 / 4 samples, and of 4
    assert abs(short.peak - whole.peak) <= 0.25 * whole.peak  # zero-bubble keeps what weight products need longer
    assert abs(short.seconds - whole.seconds) <= 0.12 * whole.seconds


def test_a_step_of_one_stage_is_the_sum_of_what_is_done():
    one = forecast(config_of((("data", 4),)), MACHINE)
    (cost,) = one.stages
    assert one.bubble == pytest.approx(0, abs=1e-12)
    assert one.seconds == pytest.approx(cost.busy) == pytest.approx(cost.run.seconds)
    faster = forecast(one.config, Machine(80e9, 60e9, 2.5e-6, 1e-4, Link(25e-6, 4e9), LINK, 4, overlap=False))
    assert faster.seconds == pytest.approx(one.seconds / 2)


def test_stages_wait_as_the_schedule_says():
    """(p - 1) / (m + p - 1) of the time, if stages are alike and messages take none."""
    axes, link = (("pipe", 5),), Link(0.0, float("inf"))
    machine = Machine(1e6, float("inf"), 0.0, 0.0, link, link, 5)
    one = forecast(config_of(axes, model=["model.vocabulary=256"], schedule="1f1b", microbatches=5), machine)
    assert 4 / 9 - 0.12 < one.bubble < 4 / 9 + 0.12
    lines = timeline(one.spans, 5)
    assert [line.plain.strip()[0] for line in lines] == list("01234")
    assert all(sign in lines[0].plain for sign in "12345abcde")


def test_the_shapes_of_a_mode_are_even():
    assert most_even(16, 2) == [4, 4]
    assert most_even(16, 3) == [2, 2, 4]
    assert most_even(6, 3) is None
    config = config_of((("data", 1),))
    found = grids(config, 8, sequences=False)
    assert ({"depth": 2, "row": 2, "col": 2}, "2.5d") in found
    assert ({"pipe": 2, "data": 4}, "none") in found
    assert not any("seq" in axes or "ulysses" in axes for axes, _ in found)
    assert ({"seq": 8}, "none") in grids(config, 8, sequences=True)
    assert all(axes.get("pipe", 1) <= config.model.layers for axes, _ in found)


def searched(ranks, memory=float("inf"), settings=()):
    return search(configs.load("demo", list(settings)), ranks, MACHINE, memory, 4, lambda done, of: None)


def test_the_search_returns_what_fits_the_fastest_first():
    free = searched(4)
    assert [one.seconds for one in free.best] == sorted(one.seconds for one in free.best)
    assert len(free.best) == 4 <= free.grids <= free.priced
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
    (line,) = show.explained(found, 1 << 20, "demo")
    assert "none fits into 90% of 1.00 MiB" in line
    assert "take more ranks" in line


def test_few_samples_are_cut_along_the_sequence():
    assert searched(4, settings=["training.batch=2"]).sequences


@pytest.mark.grids({"data": 4})
def test_a_trial_does_the_steps(grid):
    ways = [config_of((("data", 4),)), config_of((("pipe", 2), ("col", 2)), "1d", microbatches=2)]
    taken = trial(ways, 2)
    assert len(taken) == 2
    assert all(seconds > 0 for seconds in taken)


def options(**changes):
    given = {
        "source": "demo",
        "settings": [],
        "ranks": 4,
        "memory": None,
        "given": Given(),
        "count": 3,
        "rounds": 0,
        "file": None,
    }
    return plan.checked(**(given | changes))


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
        plan.main(options(given=Given(flops=-1.0)))
    assert size_of("80GiB") == 80 << 30


def cli(*words):
    command = [sys.executable, "-m", "colossal_mpi.apps.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_plan_for_another_machine(tmp_path):
    rates = ["--flops", "400e12", "--bandwidth", "25e9", "--gpu-memory", "80GiB", "--ranks-per-node", "4"]
    rows = tmp_path / "plan.json"
    result = cli("plan", "demo", "--ranks", "8", *rates, "--show", "2", "--json", str(rows))
    assert result.returncode == 0, result.stderr
    told = json.loads(rows.read_text())
    assert told["machine"]["flops"] == 400e12
    assert len(told["ways"]) == 2
    (command,) = re.findall(r"\$ mpiexec -n 8 colossal-mpi (train demo .*)", result.stdout)
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
