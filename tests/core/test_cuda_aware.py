"""All ranks agree on whether MPI reads device memory, from a child process that may crash or from MPI's own answers."""

import ctypes
import sys
import time

import pytest

from colossal_mpi import Grid, GridError, comm
from colossal_mpi.platform import backend, cuda_aware
from colossal_mpi.platform.cuda_aware import Awareness, by_memory_kinds, by_query, find, probe
from colossal_mpi.testing import fake
from tests.cases import refusal

YES, NO = Awareness(True, "yes"), Awareness(False, "no")


def child(*lines):
    return [sys.executable, "-c", "\n".join(["import os, signal, time", *lines])]


SAY, DONE = "print('exchanging', flush=True)", "print('done', flush=True)"
CHILDREN = {
    "exchanges": ([SAY, DONE], True, "a child process exchanged device memory"),
    "segfaults": ([SAY, "os.kill(os.getpid(), signal.SIGSEGV)"], False, "exchanged device memory died of SIGSEGV"),
    "other-values": ([SAY, "raise SystemExit(1)"], False, "exchanged device memory ended with status 1"),
    "dies-at-its-end": ([SAY, DONE, "os.kill(os.getpid(), signal.SIGBUS)"], False, "died of SIGBUS"),
    "no-gpu": (["raise SystemExit(1)"], None, ""),
    "dies-before": (["os.kill(os.getpid(), signal.SIGSEGV)"], None, ""),
    "silent": (["pass"], None, ""),
}


@pytest.mark.parametrize(("lines", "aware", "reason"), CHILDREN.values(), ids=CHILDREN)
def test_a_child_tells_by_how_it_ends(lines, aware, reason):
    found = probe(child(*lines), deadline=30)
    assert (found and found.aware) is aware
    assert reason in str(found)


@pytest.mark.parametrize("lines", [[SAY], []], ids=["in-the-exchange", "before"])
def test_a_child_that_hangs_is_killed_at_the_deadline(lines, tmp_path):
    begun = time.monotonic()
    alive = tmp_path / "alive"
    found = probe(child(*lines, "time.sleep(2)", f"open({str(alive)!r}, 'w')", "time.sleep(60)"), deadline=1)
    assert time.monotonic() - begun < 20
    assert str(found).endswith("exchanged device memory did not end in 1 s") if lines else found is None
    time.sleep(1.5)
    assert not alive.exists()


def test_the_real_child_ends_before_the_exchange_without_cupy():
    if backend.resolve_device("auto", 0) != "cpu":
        pytest.skip("there is a GPU")
    assert probe([sys.executable, "-P", str(cuda_aware._PROGRAM), "0"], deadline=60) is None


class Info:
    def __init__(self, kinds):
        self.kinds = kinds

    def Get_info(self):  # noqa: N802
        return self

    def Get(self, key):  # noqa: N802
        assert key == "mpi_memory_alloc_kinds"
        return self.kinds

    def Free(self):  # noqa: N802
        pass


@pytest.mark.parametrize(
    ("kinds", "known"),
    [("mpi,system,cuda:device", True), ("cuda, mpi", True), ("mpi,system,cuda:host", None), ("", None), (None, None)],
)
def test_memory_kinds_tell_only_by_naming_cuda_memory(kinds, known):
    found = by_memory_kinds(Info(kinds))
    assert (found and found.aware) is known


class Library:
    def __init__(self, answer):
        self.MPIX_Query_cuda_support = lambda: answer


def test_the_query_is_asked_where_a_library_has_it():
    without = ctypes.CDLL(None)
    assert not hasattr(without, "MPIX_Query_cuda_support")
    assert by_query([without]) is None
    assert by_query([without, Library(1), Library(0)]) == Awareness(True, "MPIX_Query_cuda_support says 1")
    assert by_query([without, Library(0)]) == Awareness(False, "MPIX_Query_cuda_support says 0")


def test_the_library_that_mpi4py_loaded_is_found():
    assert len(cuda_aware.loaded_libraries()) > 1


ORDER = {
    "child": ((YES, NO, NO), 1),
    "child-says-no": ((NO, YES, YES), 1),
    "memory-kinds": ((None, YES, NO), 2),
    "query": ((None, None, NO), 3),
    "nothing": ((None, None, None), 3),
}


@pytest.mark.parametrize(("answers", "questions"), ORDER.values(), ids=ORDER)
def test_the_first_answer_decides(monkeypatch, answers, questions):
    monkeypatch.setattr(cuda_aware, "_known", {})
    monkeypatch.delenv(cuda_aware.VARIABLE, raising=False)
    asked = []
    for name, answer in zip(("probe", "by_memory_kinds", "by_query"), answers, strict=True):
        monkeypatch.setattr(cuda_aware, name, lambda _, name=name, answer=answer: asked.append(name) or answer)
    found = find("cuda:0")
    expected = answers[questions - 1]
    assert found == expected if expected else not found.aware
    assert find("cuda:1") is found
    assert asked == ["probe", "by_memory_kinds", "by_query"][:questions]


def test_the_users_setting_decides_and_must_be_valid(monkeypatch):
    monkeypatch.setattr(cuda_aware, "probe", lambda _: pytest.fail("no child is needed"))
    for word in "01":
        monkeypatch.setenv(cuda_aware.VARIABLE, word)
        assert find("cuda:0") == Awareness(word == "1", f"set by COLOSSAL_MPI_CUDA_AWARE={word}")
    assert not find("cpu").aware
    monkeypatch.setenv(cuda_aware.VARIABLE, "yes")
    with pytest.raises(GridError, match="COLOSSAL_MPI_CUDA_AWARE='yes': use 1 if MPI reads GPU memory"):
        find("cuda:0")


@pytest.mark.grids({"row": 2, "col": 2})
def test_ranks_agree_and_one_that_cannot_is_enough(grid, monkeypatch):
    fake.install()
    monkeypatch.setattr(cuda_aware, "find", lambda _: YES)
    assert Grid(device="fake", **grid.axes).awareness is not NO
    assert comm.collect(Grid(device="fake", **grid.axes).awareness.aware, grid) == [True] * 4
    monkeypatch.setattr(cuda_aware, "find", lambda _: NO if grid.rank == 0 else YES)
    there = Grid(device="fake", **grid.axes)
    assert comm.collect(there.awareness, grid) == [NO] * 4
    assert there.at(row=grid.coords["row"]).awareness == NO


@pytest.mark.grids({"row": 2})
def test_an_invalid_setting_is_the_same_error_on_all_ranks(grid, monkeypatch):
    fake.install()
    monkeypatch.setenv(cuda_aware.VARIABLE, "true")
    assert refusal(lambda: Grid(device="fake", row=2), grid)[0] is GridError
