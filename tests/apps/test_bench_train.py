"""``colossal-mpi bench train`` writes rows, and all competitors train the same model. No test asserts a time."""

import json
import subprocess
import sys

import pytest

from colossal_mpi.apps.bench import train
from colossal_mpi.apps.bench.train import Ours, Train

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", "train"]
SMALL = ["--layers", "2", "--hidden", "20", "--heads", "5", "--sequence", "7", "--batch", "3", "--vocabulary", "19"]

pytest.importorskip("torch")


def bench(*arguments):
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("where", [[], ["--grid", "row=2,col=2", "--tensor", "2d"]], ids=["1", "2x2"])
def test_rows_and_table(tmp_path, where):
    done = bench(*SMALL, *where, "--repeat", "2", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["pytorch", "reference", "torch"]
    for row in rows.values():
        assert (row["error"], row["repeats"], row["hidden"]) == (None, 2, 20)
        assert 0 < row["seconds"] <= row["median_seconds"]
        assert row["tokens_per_second"] == pytest.approx(21 / row["seconds"])
        assert row["ratio"] == pytest.approx(rows["pytorch"]["seconds"] / row["seconds"])
        assert row["loss_difference"] <= train.TOLERANCE
    assert rows["reference"]["loss_difference"] > 0
    assert "GPT of 2 layers, width 20, 5 heads, 3 x 7 tokens of 19, float32, 2 interleaved repeats" in done.stdout
    assert all(f" {name} " in done.stdout for name in rows)
    assert not where or " 2d row=2,col=2 " in done.stdout


def test_another_model_is_reported(monkeypatch, capsys):
    step = Ours.step
    monkeypatch.setattr(Ours, "step", lambda self: step(self) * 1.01)
    sizes = {"layers": 1, "hidden": 6, "heads": 2, "sequence": 5, "batch": 2, "vocabulary": 11}
    assert Train(**sizes, kernels=["reference", "pytorch"], repeat=1).run() == 1
    assert "reference: wrong: its losses differ from PyTorch's by 1.0e-02" in capsys.readouterr().out
