"""``colossal-mpi bench gemm`` makes its rows, checks results, and skips what does not fit. No test asserts a time."""

import json
import subprocess
import sys

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi.apps.bench import harness, node, timing
from colossal_mpi.apps.bench.attention import Attention
from colossal_mpi.apps.bench.distributed import best_sizes
from colossal_mpi.apps.bench.gemm import NAMES, Gemm
from colossal_mpi.apps.bench.product import TOLERANCE, NumPy, Part, Problem, fill, residual
from colossal_mpi.errors import ColossalError
from colossal_mpi.linalg import ALGORITHMS

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli"]
OURS = [*ALGORITHMS, "auto"]
SMALL = Problem(65, 33, 47, np.dtype("float64"))


def bench(*arguments, run=()):
    command = [*CLI, *run, "bench", "gemm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Run a benchmark of a small and an absurd size on four ranks, and return its results."""
    folder = tmp_path_factory.mktemp("bench")
    files = "--json", folder / "made" / "rows.json", "--plot", folder / "made" / "gemm.png"
    done = bench("--size", "65,33,47", "--size", "10000000", "--repeat", 2, *files)
    assert done.returncode == 0, done.stderr
    return done, json.loads(files[1].read_text()), files[3]


def test_rows_have_the_names_and_figures(result):
    _, rows, _ = result
    small = {row["name"]: row for row in rows if row["m"] == 65}
    assert [name for name in small if name != "scalapack"] == [name for name in NAMES if name != "scalapack"]
    for row in small.values():
        assert (row["m"], row["n"], row["k"], row["dtype"], row["ranks"]) == (65, 33, 47, "float64", 4)
        assert (row["error"], row["repeats"]) == (None, 2)
        assert 0 < row["seconds"] <= row["median_seconds"]
        assert row["gflops"] == pytest.approx(2e-9 * 65 * 33 * 47 / row["seconds"])
        assert row["ratio"] == pytest.approx(small["numpy"]["seconds"] / row["seconds"])
        assert 0 < row["residual"] <= TOLERANCE
    assert all(small[name]["words"] > 0 for name in OURS)


def test_scalapack_is_measured_where_it_is_found(result):
    done, rows, _ = result
    found = [row for row in rows if row["name"] == "scalapack" and row["m"] == 65]
    if not found:
        assert "scalapack: no lib" in done.stdout
        pytest.skip("no ScaLAPACK that fits the MPI in use")
    assert found[0]["grid"] == {"row": 2, "col": 2}
    assert found[0]["note"] in ("nb=64", "nb=128", "nb=256")


def test_an_absurd_size_is_reported_and_the_others_go_on(result):
    done, rows, _ = result
    absurd = [row for row in rows if row["m"] == 10_000_000]
    assert {row["name"] for row in absurd} >= {"numpy", *OURS}
    assert all(row["seconds"] is None and "out of memory: needs" in row["error"] for row in absurd)
    assert "numpy: out of memory: needs 2.13 PiB on one rank" in done.stdout


def test_the_table_the_plot_and_the_plain_line_are_there(result):
    done, _, picture = result
    assert "65 x 33 x 47 float64 on 4 ranks, 2 interleaved repeats" in done.stdout
    assert all(f" {name} " in done.stdout for name in OURS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stderr.count("$ ") == 1
    assert "-n 4" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "complex64", "complex128"])
def test_every_dtype_is_right_and_complex_flop_are_four_times_as_many(tmp_path, dtype):
    done = bench("--size", 40, "--ranks", 2, "--dtype", dtype, "--repeat", 1, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "rows.json").read_text()):
        assert (row["dtype"], row["error"]) == (dtype, None)
        assert row["gflops"] * row["seconds"] == pytest.approx((8 if "complex" in dtype else 2) * 40**3 / 1e9)


def test_a_job_under_mpiexec_uses_its_ranks(tmp_path):
    names = "--algorithm", "summa", "--algorithm", "numpy"
    run = "run", "-n", "3", *CLI
    done = bench("--size", 7, "--repeat", 1, *names, "--json", tmp_path / "rows.json", run=run)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["name"], row["ranks"]) for row in rows] == [("summa", 3), ("numpy", 3)]


def test_nothing_that_could_be_run_is_a_failure(tmp_path):
    done = bench("--size", 10**9, "--ranks", 1, "--json", tmp_path / "rows.json")
    assert done.returncode == 1
    assert all(row["error"] for row in json.loads((tmp_path / "rows.json").read_text()))


@pytest.mark.parametrize(
    ("name", "m", "ranks", "expected"),
    [
        ("summa", 4000, 4, {"row": 2, "col": 2}),
        ("summa", 2000, 8, {"row": 2, "col": 4}),
        ("summa", 8000, 8, {"row": 4, "col": 2}),
        ("1d-column", 4000, 4, {"col": 4}),
        ("1d-row", 4000, 5, {"col": 5}),
        ("3d", 4000, 8, {"row": 2, "col": 2, "depth": 2}),
        ("auto", 4000, 1, {"row": 1, "col": 1, "depth": 1}),
    ],
)
def test_the_best_grid_of_an_algorithm(name, m, ranks, expected):
    assert best_sizes(name, Problem(m, 4000, 4000, np.dtype("float64")), ranks) == expected


@pytest.mark.parametrize("name", [name for name, preset in ALGORITHMS.items() if len(preset.axes) == 3])
def test_three_axes_on_four_ranks_use_depth(name):
    sizes = best_sizes(name, Problem(64, 64, 64, np.dtype("float64")), 4)
    assert sizes["depth"] >= 2


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_every_algorithm_has_a_grid_of_any_number_of_ranks(ranks):
    for name in ALGORITHMS:
        assert np.prod(list(best_sizes(name, SMALL, ranks).values())) == ranks


def whole(shape, name):
    m, n = shape
    return Part(fill(((0, m), (0, n)), shape, np.dtype("float64"), name), slice(None), slice(None))


def test_one_wrong_element_shows_in_the_residual():
    a, b = whole((65, 47), "a"), whole((47, 33), "b")
    c = Part(a.block @ b.block, slice(None), slice(None))
    assert residual((a, b, c), SMALL) < TOLERANCE
    c.block[64, 32] += 1e-12
    assert residual((a, b, c), SMALL) > TOLERANCE


def test_blocks_are_those_of_one_random_matrix():
    everything = fill(((0, 600), (0, 700)), (600, 700), np.dtype("complex64"), "a")
    block = fill(((13, 590), (7, 650)), (600, 700), np.dtype("complex64"), "a", "F")
    assert np.array_equal(block, everything[13:590, 7:650])
    assert block.flags.f_contiguous
    assert abs(everything.mean()) < 0.01


def compete():
    rows = Gemm(ranks=1, algorithm=["numpy", "summa"], repeat=2).measure_one(SMALL)
    return {row["name"]: row for row in rows}


def test_a_wrong_product_is_reported_and_not_timed(monkeypatch):
    monkeypatch.setattr(NumPy, "work", lambda self: self._arrays[2].fill(1))
    rows = compete()
    assert rows["numpy"]["error"].startswith("wrong: ||CX - A(BX)|| is ")
    assert (rows["numpy"]["seconds"], rows["numpy"]["repeats"]) == (None, 0)
    assert rows["summa"]["error"] is None


def test_operands_that_do_not_fit_together_are_made_for_each_turn(monkeypatch):
    made, prepare = [], NumPy.prepare
    monkeypatch.setattr(NumPy, "prepare", lambda self: made.append(1) or prepare(self))
    monkeypatch.setattr(harness, "fit", lambda competitors: len(competitors) < 2)
    assert all(row["error"] is None and row["repeats"] == 2 for row in compete().values())
    assert len(made) == 3


def test_memory_that_is_not_there_after_all_is_a_row(monkeypatch):
    def fails(self):
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr(NumPy, "prepare", fails)
    rows = compete()
    assert rows["numpy"]["error"] == "out of memory: Unable to allocate 1 TiB"
    assert rows["summa"]["error"] is None


def test_memory_is_counted_on_every_rank_of_the_node(monkeypatch):
    one = NumPy(SMALL)
    need = 8 * (65 * 47 + 47 * 33 + 65 * 33)
    monkeypatch.setattr(node, "available_memory", lambda: need)
    assert harness.fit([one])
    assert not harness.fit([one, one])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("step", [timing.agreed, lambda work: timing.timed(work, MPI.COMM_WORLD)], ids=["made", "run"])
def test_one_rank_without_memory_is_known_to_all(step):
    def work():
        if MPI.COMM_WORLD.rank == 1:
            raise MemoryError

    with pytest.raises(ColossalError, match="^out of memory$"):
        step(work)


@pytest.mark.ranks(3)
def test_the_time_is_that_of_the_group_and_known_to_all():
    group = MPI.COMM_WORLD.Split(0 if MPI.COMM_WORLD.rank < 2 else MPI.UNDEFINED)
    taken = timing.timed(lambda: None, None if group == MPI.COMM_NULL else group)
    assert len(set(MPI.COMM_WORLD.allgather(taken))) == 1
    assert taken > 0


def test_attention_is_measured_and_what_cannot_be_is_refused(tmp_path, capsys):
    assert Attention(sequence=[64, 512], heads=4, groups=2, width=8, json=tmp_path / "rows.json").run() == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["sequence"] for row in rows] == [64, 512]
    assert rows[1]["scores"] == 512 * 512 * 4 * 4
    assert 0 < rows[0]["peak"] < rows[1]["peak"]
    assert all(row["seconds"] > 0 for row in rows)
    assert "bytes a token" in capsys.readouterr().out
    with pytest.raises(ColossalError, match="groups that divide heads"):
        Attention(heads=4, groups=3)
    with pytest.raises(ColossalError, match="--dtype float16: use float32 or float64"):
        Attention(dtype="float16")
