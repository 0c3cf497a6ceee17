"""A benchmark refuses wrong options in one message, before it measures anything."""

import pytest

from tests.command_line import call


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("gemm", ["--size", "8,8"], "--size '8,8': write M,N,K"),
        ("gemm", ["--size", "0"], "--size '0': write M,N,K"),
        ("gemm", ["--size", "big"], "--size 'big': write M,N,K"),
        ("gemm", ["--ranks", "0"], "--ranks 0: a job has at least one rank"),
        ("gemm", ["--dtype", "int8"], "--dtype int8: use one of float64"),
        ("gemm", ["--algorithm", "cannon"], "--algorithm cannon: use one of numpy, scalapack, 1d-column"),
        ("gemm", ["--repeat", "0"], "--repeat 0: at least one round"),
        ("gemm", ["--json", "/dev/null/rows.json"], "cannot write /dev/null/rows.json"),
        ("gemm", ["--nonsense"], "nonsense"),
        ("train", ["--heads", "3"], "--heads 3 do not divide --hidden 256: use"),
        ("train", ["--layers", "0"], "--layers 0: at least 1, for example --layers 4"),
        ("train", ["--kernels", "numpy"], "--kernels numpy: use one of pytorch, reference, torch"),
        ("train", ["--repeat", "0"], "--repeat 0: at least one round"),
        ("train", ["--json", "/dev/null/rows.json"], "cannot write /dev/null/rows.json"),
        ("train", ["--grid", "row:2"], "--grid 'row:2': write axis=size"),
        ("train", ["--tensor", "4d"], "tensor='4d': use one of"),
        ("pipeline", ["--stages", "1"], "--stages 1: at least 2, for example --stages 2"),
        ("pipeline", ["--layers", "3"], "--layers 3: at least 4"),
        ("pipeline", ["--heads", "3"], "--heads 3 do not divide --hidden 256"),
        ("pipeline", ["--microbatches", "9"], "--microbatches 9: at most --batch, 8"),
        ("pipeline", ["--repeat", "0"], "--repeat 0: at least one round"),
        ("pipeline", ["--json", "/dev/null/rows.json"], "cannot write /dev/null/rows.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_message(command, arguments, message):
    done = call("bench", command, *arguments)
    assert done.returncode == 1
    assert done.stderr.count("colossal_mpi: error:") == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
