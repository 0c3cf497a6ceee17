"""``colossal-mpi bench optimizers`` writes its rows and picture, and continues where it was stopped."""

import json
import subprocess
import sys

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError, Grid
from colossal_mpi.apps.bench import optimizers
from colossal_mpi.apps.bench.optimizers import Optimizers
from colossal_mpi.apps.training.trainer import Trainer

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", "optimizers"]
SMALL = """
[model]
layers = 1
hidden = 12
heads = 3
context = 8
[training]
batch = 4
warmup = 2
evaluate_batches = 1
[parallel]
kernels = "reference"
"""


def test_rows_table_and_picture(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    files = ["--json", "made/rows.json", "--plot", "made/losses.png"]

    def bench(*arguments):
        command = [*CLI, "--config", "small.toml", "--steps", "5", "--every", "2", *arguments, *files]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "made" / "rows.json").read_text())

    shown, rows = bench("--optimizer", "adamw=1e-3,1e38", "--optimizer", "muon=1e-3", "--seed", "0", "--seed", "1")
    assert [(row["case"]["optimizer"], row["case"]["lr"], row["case"]["seed"]) for row in rows] == [
        (name, lr, seed) for name, lr in (("adamw", 1e-3), ("adamw", 1e38), ("muon", 1e-3)) for seed in (0, 1)
    ]
    for row in rows:
        fine = row["case"]["lr"] < 1
        assert (row["final"] is not None) == fine
        assert row["steps"] == [2, 4, 5] or not fine
    assert shown.count("diverged") == 4
    assert (tmp_path / "made" / "losses.png").read_bytes().startswith(b"\x89PNG")
    case = optimizers.Case(str(tmp_path / "small.toml"), (), 5, 2, 1, "muon", 1e-3)
    trainer = Trainer(case.load(), Grid(MPI.COMM_SELF))
    for step in range(5):
        trainer.step(step)
    assert np.isclose(rows[-1]["final"], trainer.validate()["val_loss"], rtol=1e-6)
    more, grown = bench("--optimizer", "sgd=1e-3", "--optimizer", "muon=1e-3")
    assert grown[:6] == rows
    assert [row["case"]["optimizer"] for row in grown[6:]] == ["sgd"]
    assert more.count("seed 0:") == 1
    assert " muon " in more


@pytest.mark.parametrize("text", ["lion", "adamw=", "adamw=x", "adamw=-1", "muon=1e-3,nan"])
def test_what_is_no_optimizer_is_refused(text):
    with pytest.raises(ConfigError, match="write one of adafactor, adamw, lamb, muon, sgd, lars, alone or with rates"):
        optimizers.parse(text)


def test_what_is_no_list_of_losses_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text('[{"name": "numpy"}]')
    (tmp_path / "small.toml").write_text(SMALL)
    files = {"config": str(tmp_path / "small.toml"), "json": tmp_path / "rows.json"}
    with pytest.raises(ConfigError, match="is no list of losses of this benchmark"):
        Optimizers(**files, steps=1, every=1, optimizer=["sgd"]).run()
    with pytest.raises(ConfigError, match="at least 1 of each"):
        Optimizers(steps=0)
    assert len(Optimizers(seed=[3, 3, 4]).cases) == 2 * 2 * len(optimizers.RATES)
