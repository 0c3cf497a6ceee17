"""The files of a run: links are not followed, names are text, and a disk that fails is one error on all ranks."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from colossal_mpi import CheckpointError, ConfigError
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import files
from colossal_mpi.apps.report import write
from colossal_mpi.apps.run_directory import RunDirectory
from tests.command_line import RUN, call
from tests.core.test_files import files_of_at_most

SMALL = f"""
[model]
layers = 1
hidden = 8
heads = 1
context = 8
[training]
steps = 4
batch = 4
warmup = 0
sample = 0
evaluate_every = 1000
evaluate_batches = 1
checkpoint_every = 1
[parallel]
kernels = "reference"
grid = {{ data = GRID }}
zero = 1
{RUN}
"""


def recorded(path, steps=3):
    """Make the directory of a run that has done some steps, without training."""
    directory = RunDirectory(path)
    directory.create(configs.load("demo"), overwrite=False)
    for step in range(steps):
        row = {"step": step + 1, "loss": 1.0, "tokens_per_second": 3.0, "seconds": 0.1, "val_loss": 1.0}
        directory.append(row | {"words_by_axis": {}, "seconds_by_axis": {}})
    directory.release()
    return directory


def test_a_resumed_run_writes_into_no_file_that_links_of_its_directory_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(SMALL.replace("GRID", "1"))
    assert call("train", "c.toml", "--set", "training.steps=2").returncode == 0
    victims = {}
    for name in ("lock", "run.json", "sample.txt", "trace.json", "metrics.jsonl", "config.toml"):
        path, victims[name] = tmp_path / "run" / name, tmp_path / f"victim-{name}"
        shutil.copy(path, victims[name]) if path.exists() else victims[name].write_text("precious")
        path.unlink(missing_ok=True)
        path.symlink_to(victims[name])
    before = {name: victim.read_bytes() for name, victim in victims.items()}
    resumed = call("train", "--resume", "run", "--set", "training.steps=4")
    assert resumed.returncode == 0, resumed.stderr
    assert {name: victim.read_bytes() for name, victim in victims.items()} == before
    assert [row["step"] for row in RunDirectory("run").rows()] == [1, 2, 3, 4]


def test_a_link_out_of_the_checkpoints_is_not_the_latest(tmp_path):
    directory = recorded(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (directory.checkpoints / "latest").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="latest is a link out of .*checkpoints"):
        directory.latest()


def test_metrics_on_a_full_disk_are_an_error_and_keep_whole_lines(tmp_path):
    directory = recorded(tmp_path / "run")
    size = directory.metrics.stat().st_size
    with (
        files_of_at_most(size + 9),
        pytest.raises(ConfigError, match="metrics.jsonl cannot be written: File too"),
    ):
        directory.append({"step": 4, "loss": 1.0})
    assert directory.metrics.stat().st_size == size
    with files_of_at_most(9), pytest.raises(ConfigError, match="run.json cannot be written: File too large"):
        directory.write_facts({"about": "a run of many steps"})
    with files_of_at_most(100), pytest.raises(ConfigError, match="the report cannot be written .*: File too large"):
        write([directory.path])


@pytest.mark.parametrize("name", ["a$b$c", "x$\\frac$", "z^{", "q%s%n", "r$$", "a[/b]x", "<b>"])
def test_the_name_of_a_run_is_text_in_reports_and_on_the_terminal(tmp_path, name):
    recorded(tmp_path / name)
    recorded(tmp_path / "other")
    made = call("report", tmp_path / name, tmp_path / "other", "--output", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert name.rpartition("/")[2].replace("<b>", "&lt;b&gt;") in (tmp_path / "out" / "index.html").read_text()
    shown = call("inspect", tmp_path / name / "nothing")
    assert f"{name}/nothing" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_results_go_to_devices_and_replace_files(tmp_path):
    files.write_result(tmp_path / "rows.json", json.dumps([1]))
    files.write_result(tmp_path / "rows.json", json.dumps([2]))
    assert (tmp_path / "rows.json").read_text() == "[2]"
    files.write_result(type(tmp_path)("/dev/null"), "x")
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        files.write_result(type(tmp_path)("/dev/full"), "x")


FAULT = """
import errno, os, shutil
from colossal_mpi.apps.training.trainer import Trainer

plain, original = {name: getattr(os, name) for name in ("open", "pwrite", "fsync", "close")}, Trainer.step
here = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))) == RANK
MARK = os.path.abspath("run")


def of_the_run(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}").startswith(MARK)


def fail(name):
    def failing(first, *rest, **options):
        if name == "open":
            writes = rest and rest[0] & (os.O_WRONLY | os.O_RDWR)
            hit = writes and os.path.abspath(os.fspath(first)).startswith(MARK)
        else:
            hit = of_the_run(first)
        result = plain[name](first, *rest, **options) if name == "close" or not hit else None
        if hit:
            raise OSError(CODE, os.strerror(CODE))
        return result
    return failing


def step(self, number, *rest):
    if here and number == 2:
        if "CALL" == "vanish":
            shutil.rmtree("run")
        else:
            setattr(os, "CALL", fail("CALL"))
    return original(self, number, *rest)


Trainer.step = step
"""
CASES = [
    (1, "pwrite", "ENOSPC", "No space left on device"),
    (1, "fsync", "EIO", "Input/output error"),
    (0, "open", "EROFS", "Read-only file system"),
    (0, "vanish", "ENOENT", "No such file or directory"),
    pytest.param(1, "open", "EROFS", "Read-only file system", marks=pytest.mark.long),
    pytest.param(1, "close", "EIO", "Input/output error", marks=pytest.mark.long),
    pytest.param(0, "pwrite", "EIO", "Input/output error", marks=pytest.mark.long),
    pytest.param(0, "fsync", "EIO", "Input/output error", marks=pytest.mark.long),
    pytest.param(1, "vanish", "ENOENT", "No such file or directory", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("rank", "name", "code", "reason"), CASES)
def test_a_disk_that_fails_on_one_rank_is_one_error_and_the_run_goes_on_later(tmp_path, rank, name, code, reason):
    (tmp_path / "c.toml").write_text(SMALL.replace("GRID", "2"))
    text = FAULT.replace("== RANK", f"== {rank}").replace("CALL", name).replace("CODE", f"errno.{code}")
    (tmp_path / "fault.py").write_text(text)
    words = ["-m", "colossal_mpi.apps.cli", "run", "-n", "2", "colossal-mpi", "train", "c.toml"]
    command = [sys.executable, *words, "--set", 'run.plugins=["fault.py"]']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode not in (0, 124), ended.stderr
    assert ended.stderr.count("colossal_mpi: error: ") == 1, ended.stderr
    assert f"cannot be written: {reason}" in ended.stderr
    assert "Traceback" not in ended.stderr
    if name != "vanish":
        assert os.path.exists(tmp_path / "run" / "checkpoints" / "latest" / "manifest.json")
