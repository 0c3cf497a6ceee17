"""``colossal-mpi bench pipeline`` writes rows and a picture, and refuses wrong options. No test asserts a time."""

import json
import subprocess
import sys

import pytest

from colossal_mpi.apps.bench.pipeline import Bar, bubble, makespan

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", "pipeline"]
SMALL = ["--layers", "4", "--hidden", "20", "--heads", "5", "--sequence", "7", "--batch", "5", "--vocabulary", "19"]


def bench(*arguments):
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_rows_table_and_picture(tmp_path):
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "stages.png")]
    done = bench(*SMALL, "--microbatches", "4", "--simulate", "6", "--repeat", "2", *files)
    assert done.returncode == 0, done.stderr
    rows = {row["schedule"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["gpipe", "1f1b", "interleaved", "zero-bubble"]
    for row in rows.values():
        assert (row["error"], row["repeats"], row["stages"], row["hidden"]) == (None, 2, 2, 20)
        assert 0 < row["bubble"] <= row["median_bubble"] < 1
        assert 0 < row["seconds"] <= row["median_seconds"]
        f, b, w = (row[f"{kind}_seconds"] for kind in ("forward", "backward", "weight"))
        assert min(f, b, w) > 0
        if row["schedule"] == "gpipe":  # 6 stages, 12 microbatches, in the closed form for equal stages
            waits = 5 * (f + b)
            assert row["simulated_bubble_of_more"] == pytest.approx(waits / (12 * (f + b + w) + waits))
    assert "GPT of 4 layers, width 20, 5 x 7 tokens in 4 microbatches on 2 stages, 2 interleaved repeats" in done.stdout
    assert (tmp_path / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_the_bubble_is_the_share_in_which_nothing_is_computed():
    bars = [Bar(0, "forward", 0, 1.0, 2.0), Bar(1, "forward", 0, 2.0, 3.0), Bar(0, "backward", 0, 4.0, 5.0)]
    assert makespan(bars) == 4
    assert bubble(bars) == 1 - 3 / 8
