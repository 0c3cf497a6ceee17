"""Replicas of weights and optimizer states are compared bit for bit, and a difference is told on all ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from colossal_mpi import Layout, MismatchError, from_global
from colossal_mpi.apps.training.replicas import require_equal_replicas
from tests.cases import refusal
from tests.command_line import RUN, call

SMALL = """
[model]
layers = 1
hidden = 8
heads = 2
context = 8
[training]
steps = 2
batch = 2
sample = 0
"""


@pytest.mark.grids({"data": 2, "row": 2})
def test_a_flipped_bit_of_one_replica_is_named(grid):
    whole = np.arange(35.0).reshape(7, 5)
    arrays = {
        "same": from_global(whole, grid, Layout(None, None)),
        "cut": from_global(whole, grid, Layout("row", None)),
    }
    require_equal_replicas(arrays, grid, "after step 1")
    if grid.rank == 3:
        arrays["cut"].local.view(np.uint64)[1, 2] ^= np.uint64(1)
    kind, text = refusal(lambda: require_equal_replicas(arrays, grid, "after step 2"), grid)
    assert kind is MismatchError
    assert text.startswith("after step 2: the replicas of cut differ: rank 3 from rank 1; 1 of the arrays differ")


@pytest.mark.grids({"data": 3})
def test_the_replica_that_differs_from_most_is_named(grid):
    array = from_global(np.ones(4, np.float16), grid, Layout(None))
    array.local[0] += grid.rank == 0
    _, text = refusal(lambda: require_equal_replicas({"w": array}, grid, "after step 1"), grid)
    assert "rank 0 from ranks 1, 2" in text


def test_a_run_takes_both_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(SMALL + RUN)
    called = call("train", "small.toml", "--check", "--check-replicas", "1")
    assert called.returncode == 0, called.stderr
    assert len([json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]) == 2
    assert "check_replicas = 1" in Path("run/config.toml").read_text()
