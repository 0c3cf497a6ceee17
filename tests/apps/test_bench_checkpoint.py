"""``colossal-mpi bench checkpoint`` measures all that it claims, leaves no files, and refuses what it cannot do."""

import json
import os
import subprocess
import sys

import pytest

from colossal_mpi import ConfigError
from colossal_mpi.apps.bench.checkpoint import Checkpoint
from colossal_mpi.runtime.launcher import child_environment


def test_it_times_saving_and_loading_beside_plain_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "colossal_mpi.apps.cli",
        "bench",
        "checkpoint",
        "--ranks",
        "2",
        "--repeat",
        "1",
    ]
    command += ["--size", "0.01", "--directory", str(tmp_path / "disk"), "--json", str(tmp_path / "rows.json")]
    env = child_environment(os.environ)
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert len(rows) == 7
    assert all(row["seconds"] > 0 for row in rows.values())
    for name in ("save", "load, cold", "load, warm"):
        assert rows[name]["ratio"] > 0
        assert rows[name]["bytes"] == pytest.approx(0.01 * 2**30, rel=0.05)
    assert rows["save in the background"]["stall"] > 0
    assert "training waited" in result.stdout
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0.0}, "--size 0.0: GiB of the state"),
        ({"repeat": 0}, "--repeat 0: at least one round"),
        ({"ranks": 0}, "--ranks 0: a job has at least one rank"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        Checkpoint(**{"ranks": 4, "directory": tmp_path, **values})
