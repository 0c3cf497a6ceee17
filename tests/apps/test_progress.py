"""A run shows lines without a terminal and a bar at one, and writes event files for TensorBoard where it can."""

import importlib.util
import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from colossal_mpi.apps.config import load
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training import progress, train
from colossal_mpi.errors import ConfigError

EVENTS = importlib.util.find_spec("tensorboardX") is not None


@pytest.fixture
def run(tmp_path):
    """Return the configuration of a run of ten steps, its directory and a stand-in for its trainer."""
    settings = ["training.steps=10", "training.log_every=4", f"run.directory={tmp_path / 'run'}"]
    config, directory = load("demo", settings), RunDirectory(tmp_path / "run")
    directory.create(config, overwrite=False)
    task = SimpleNamespace(name="GPT", unit="tokens", per="token", about="text")
    parts = {"task": task, "parameters": 7, "grid": "Grid()", "kernels": "torch", "before": 0}
    parts |= {"restored": {"config": config.model_dump()}, "data_change": str}
    return config, directory, SimpleNamespace(config=config, samples=lambda step: 16 * step, **parts)


def row(step, **more):
    return {"step": step, "loss": 4.0 / step, "tokens_per_second": 1000.0, **more}


def test_lines_come_at_the_first_step_every_few_steps_and_with_a_validation(run, capsys, monkeypatch):
    _, directory, trainer = run
    monkeypatch.setattr(progress.time, "perf_counter", iter(range(0, 1000, 60)).__next__)
    report = progress.Report(trainer, directory, done=2)
    for step in range(3, 11):
        report.step(row(step, **({"val_loss": 1.5} if step == 9 else {})))
    report.close()
    said, at, *lines = capsys.readouterr().out.splitlines()
    assert said.startswith("GPT of 7 parameters")
    assert at == "goes on after step 2 and 32 samples"
    assert [line.split()[1] for line in lines] == ["3/10", "4/10", "8/10", "9/10"]
    assert lines[0].endswith("loss 1.333  1,000 tokens/s  7:00 left")
    assert lines[3].endswith("validation 1.500")
    assert [json.loads(line)["step"] for line in directory.metrics.read_text().splitlines()] == list(range(3, 11))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_at_a_terminal(run, monkeypatch):
    _, directory, trainer = run
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=terminal, force_terminal=True, width=100))
    report = progress.Report(trainer, directory, done=0)
    report.step(row(1))
    report.step(row(2))
    report.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "2/10 loss 2.000  1,000 tokens/s" in shown
    assert "step " not in shown


@pytest.mark.skipif(not EVENTS, reason="tensorboardX is not installed")
def test_event_files_hold_the_metrics_and_go_with_the_run(run):
    config, directory, trainer = run
    trainer.config = load("demo", ["run.tensorboard=true"])
    report = progress.Report(trainer, directory, done=0)
    report.step(row(1, val_loss=2.5))
    report.close()
    (file,) = directory.events.iterdir()
    content = file.read_bytes()
    assert all(name in content for name in (b"loss", b"val_loss", b"tokens_per_second"))
    directory.create(config, overwrite=True)
    assert list(directory.events.iterdir()) == []


def test_event_files_without_their_package_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = ["run.tensorboard=true", "parallel.grid={}", "parallel.tensor=none", "parallel.kernels=reference"]
    config = load("demo", [*settings, f"run.directory={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"pip install colossal-mpi\[tensorboard\]"):
        train.start(config)
    assert list(tmp_path.iterdir()) == []
