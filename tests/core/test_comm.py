"""Collectives give the right blocks on ragged groups, move the words of the table, and have their adjoints."""

import numpy as np
import pytest

from colossal_mpi import CheckpointError, ColossalError, DTypeError, LayoutError, ShapeError, comm, ledger
from tests.cases import host, integers, on, refusal, totals

LINE, WIDE = {"col": 3}, {"row": 2, "col": 3}
DTYPES = ["float16", "float32", "float64", "complex64", "complex128", "int32", "int64"]
AXES = [("row",), ("col",), ("row", "col"), ("col", "row"), ()]
RAGGED = [3, 0, 2, 1, 4, 0]
"""Elements that each rank of a group holds; two of them none."""

on_groups = pytest.mark.parametrize("axes", AXES, ids=lambda axes: ",".join(axes) or "alone")


def members(grid, axes):
    ranks = np.arange(grid.size).reshape(list(grid.axes.values()))
    return ranks[tuple(slice(None) if axis in axes else at for axis, at in grid.coords.items())].ravel().tolist()


def blocks(grid, axes, shapes, dtype="float64", seed=0):
    """Return the blocks of all ranks of this rank's group, and its place among them."""
    group = members(grid, axes)
    made = [integers(shape, dtype, 100 * seed + rank) for rank, shape in zip(group, shapes, strict=False)]
    return made, group.index(grid.rank)


@pytest.mark.smoke
@pytest.mark.grids(WIDE)
@on_groups
def test_allgather_lays_ragged_blocks_side_by_side(grid, axes):
    held, me = blocks(grid, axes, RAGGED)
    whole = comm.allgather(on(grid, held[me]), grid, axes, [block.size for block in held])
    assert np.array_equal(host(whole), np.concatenate(held))


@pytest.mark.grids(LINE)
def test_allgather_can_lay_blocks_in_another_order(grid):
    held, me = blocks(grid, ("col",), RAGGED)
    whole = comm.allgather(on(grid, held[me]), grid, ("col",), [3, 0, 2], [2, 0, 0])
    assert np.array_equal(host(whole), np.concatenate([held[2], held[0]]))


@pytest.mark.smoke
@pytest.mark.grids(WIDE)
@on_groups
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_sums_each_piece(grid, axes, dtype):
    counts = RAGGED[: grid.extent(axes)]
    held, me = blocks(grid, axes, [sum(counts)] * 6, dtype)
    piece = comm.reduce_scatter(on(grid, held[me]), grid, axes, counts)
    assert piece.dtype == dtype
    assert np.array_equal(host(piece), np.split(sum(held), np.cumsum(counts)[:-1])[me])


@pytest.mark.smoke
@pytest.mark.grids(WIDE)
@on_groups
@pytest.mark.parametrize("shape", [(7, 5), (1,), (0, 3), ()], ids=str)
def test_allreduce_sums_and_keeps_the_shape(grid, axes, shape):
    held, me = blocks(grid, axes, [shape] * 6)
    total = comm.allreduce(on(grid, held[me]), grid, axes)
    assert total.shape == shape
    assert np.array_equal(host(total), sum(held))


@pytest.mark.grids(WIDE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_allreduce_of_every_dtype(grid, dtype):
    for axes in [("row",), ("col",), ("row", "col")]:
        held, me = blocks(grid, axes, [(7, 5)] * 6, dtype)
        total = comm.allreduce(on(grid, held[me]), grid, axes)
        assert total.dtype == dtype
        assert np.array_equal(host(total), sum(held))


@pytest.mark.grids({"col": 2}, LINE, WIDE)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_sums_of_small_integers_wrap_round_as_numpy_does(grid, dtype):
    span, axes = np.iinfo(dtype), tuple(grid.axes)
    held = np.random.default_rng(0).integers(span.min, span.max, (grid.size, 37), dtype, endpoint=True)
    expected = np.sum(held, axis=0, dtype=dtype)
    total = comm.allreduce(on(grid, held[grid.rank]), grid, axes)
    assert total.dtype == on(grid, expected).dtype
    assert np.array_equal(host(total), expected)
    own = comm.reduce_scatter(on(grid, held[grid.rank]), grid, axes, [37, *[0] * (grid.size - 1)])
    assert np.array_equal(host(own), expected[: own.size])


@pytest.mark.grids(WIDE)
def test_allreduce_takes_the_maximum(grid):
    for axes in [("row",), ("col",), ("row", "col")]:
        held, me = blocks(grid, axes, [(7,)] * 6)
        held[0][:3] = -np.inf
        top = comm.allreduce(on(grid, held[me]), grid, axes, comm.MAX)
        assert np.array_equal(host(top), np.max(held, axis=0))


@pytest.mark.grids(LINE, WIDE)
def test_sums_are_bitwise_equal_on_all_ranks(grid):
    block = np.random.default_rng(grid.rank).standard_normal(7)
    total = comm.allreduce(on(grid, block), grid, tuple(grid.axes))
    assert len(set(comm.collect(host(total).tobytes(), grid))) == 1


@pytest.mark.smoke
@pytest.mark.grids(WIDE)
@on_groups
def test_all_to_all_hands_out_ragged_pieces(grid, axes):
    group, me = members(grid, axes), members(grid, axes).index(grid.rank)
    counts = np.add.outer(np.arange(len(group)), 2 * np.arange(len(group))) % 4
    pieces = [[integers(n, seed=10 * s + d) for d, n in enumerate(row)] for s, row in enumerate(counts)]
    block, there, back = on(grid, np.concatenate(pieces[me])), counts[me].tolist(), counts[:, me].tolist()
    for most in (None, 3 * len(group)):
        got = comm.all_to_all(block, grid, axes, there, back, most)
        assert np.array_equal(host(got), np.concatenate([row[me] for row in pieces]))


@pytest.mark.smoke
@pytest.mark.grids(WIDE)
@on_groups
def test_bcast_gives_the_block_of_the_root(grid, axes):
    held, me = blocks(grid, axes, [(2, 3)] * 6)
    for root in range(grid.extent(axes)):
        mine = on(grid, held[me])
        assert np.array_equal(host(comm.bcast(mine, grid, axes, root)), held[root])
        assert np.array_equal(host(mine), held[me])


@pytest.mark.grids(LINE)
def test_share_and_collect_carry_small_objects(grid):
    assert comm.share({"rank": grid.rank}, grid, root=2) == {"rank": 2}
    later = comm.collect_later(grid.rank, grid)
    assert comm.collect(grid.rank, grid) == [0, 1, 2]
    assert later() == [0, 1, 2]


def same(grid, forward, backward):
    one, other = totals([forward, backward], grid)
    return one == other


@pytest.mark.grids(WIDE)
@on_groups
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_allgather_and_reduce_scatter_are_adjoints(grid, axes, dtype):
    counts = RAGGED[: grid.extent(axes)]
    held, me = blocks(grid, axes, counts, dtype)
    x, y = held[me], integers(sum(counts), dtype, 50 + grid.rank)
    forward = np.vdot(host(comm.allgather(on(grid, x), grid, axes, counts)), y)
    backward = np.vdot(x, host(comm.reduce_scatter(on(grid, y), grid, axes, counts)))
    assert same(grid, forward, backward)


@pytest.mark.grids(WIDE)
@on_groups
def test_all_to_all_is_its_own_adjoint(grid, axes):
    me, p = members(grid, axes).index(grid.rank), grid.extent(axes)
    counts = np.add.outer(np.arange(p), 2 * np.arange(p)) % 4
    there, back = counts[me].tolist(), counts[:, me].tolist()
    x, y = integers(sum(there), seed=grid.rank), integers(sum(back), seed=50 + grid.rank)
    forward = np.vdot(host(comm.all_to_all(on(grid, x), grid, axes, there, back)), y)
    backward = np.vdot(x, host(comm.all_to_all(on(grid, y), grid, axes, back, there)))
    assert same(grid, forward, backward)


@pytest.mark.grids(WIDE)
@on_groups
def test_allreduce_is_its_own_adjoint(grid, axes):
    x, y = integers((7, 5), seed=grid.rank), integers((7, 5), seed=50 + grid.rank)
    there, back = (host(comm.allreduce(on(grid, z), grid, axes)) for z in (x, y))
    assert same(grid, np.vdot(there, y), np.vdot(x, back))


@pytest.mark.grids(WIDE)
@on_groups
def test_the_adjoint_of_bcast_is_a_sum_at_the_root(grid, axes):
    x, y = integers(7, seed=grid.rank), integers(7, seed=50 + grid.rank)
    root = grid.extent(axes) - 1
    summed = host(comm.allreduce(on(grid, y), grid, axes)) * (grid.comm(axes).rank == root)
    assert same(grid, np.vdot(host(comm.bcast(on(grid, x), grid, axes, root)), y), np.vdot(x, summed))


@pytest.mark.grids(LINE, WIDE)
def test_words_are_those_of_the_table(grid):
    axes, p = tuple(grid.axes), grid.size
    counts = RAGGED[:p]
    own, n = counts[grid.rank], sum(counts)
    part_of_7 = len(np.array_split(range(7), p)[grid.rank])
    turned = [(grid.rank + d) % 3 for d in range(p)]

    def ones(count):
        return on(grid, np.ones(count, "float32"))

    calls = [
        (n - own, lambda: comm.allgather(ones(own), grid, axes, counts)),
        ((p - 1) * own, lambda: comm.reduce_scatter(ones(n), grid, axes, counts)),
        ((p - 2) * part_of_7 + 7, lambda: comm.allreduce(ones(7), grid, axes)),
        (sum(turned) - turned[grid.rank], lambda: comm.all_to_all(ones(sum(turned)), grid, axes, turned, turned)),
        (5 * (grid.rank != 1), lambda: comm.bcast(ones(5), grid, axes, 1)),
    ]
    for words, call in calls:
        with ledger.record() as moved:
            call()
        assert moved.words == words
        assert moved.bytes == 4 * words
        assert {event.axes for event in moved.events} == {axes}


@pytest.mark.smoke
@pytest.mark.grids(LINE)
def test_float16_is_summed_in_float32(grid):
    terms = np.full((3, 4), 40000, "float16")
    terms[[0, 1, 2], [0, 1, 2]] *= -1  # in whatever order, float16 would overflow in one of the columns
    terms[:, 3] = [2048, 1, 1]  # 2048 + 1 is 2048 in float16
    mine = on(grid, terms[grid.rank])
    assert host(comm.allreduce(mine, grid, ("col",))).tolist() == [40000, 40000, 40000, 2050]
    assert (
        host(comm.reduce_scatter(mine, grid, ("col",), [2, 1, 1])).tolist() == [[40000] * 2, [40000], [2050]][grid.rank]
    )


@pytest.mark.grids(WIDE)
def test_float16_of_two_ranks_is_rounded_once(grid):
    mine = np.array([[40000, 1], [40000, 2048]], "float16")[grid.coords["row"]]
    with np.errstate(over="ignore"):
        assert host(comm.allreduce(on(grid, mine), grid, ("row",))).tolist() == [np.inf, 2048]


WRONG = {
    "allgather": lambda block, grid: comm.allgather(block, grid, ("col",), [3, 3, 3]),
    "reduce_scatter": lambda block, grid: comm.reduce_scatter(block, grid, ("col",), [1, 1, 1]),
    "all_to_all": lambda block, grid: comm.all_to_all(block, grid, ("col",), [1, 1, 1], [1, 1, 1]),
}

on_collectives = pytest.mark.parametrize(("name", "call"), WRONG.items(), ids=WRONG)


@pytest.mark.grids(LINE)
@on_collectives
def test_a_block_of_the_wrong_size_is_refused_before_anything_moves(grid, name, call):
    if grid.rank == 1:  # alone: it would wait for the others, were anything sent first
        with pytest.raises(ShapeError, match=f"{name}: the block has 4 elements and the plan needs"):
            call(on(grid, np.ones(4)), grid)


@pytest.mark.grids(LINE)
@pytest.mark.parametrize("dtype", [object, "U3", "S3", "V4"], ids=str)
@on_collectives
def test_a_dtype_that_mpi_lacks_is_refused_before_anything_moves(grid, dtype, name, call):
    if grid.rank == 1:
        with pytest.raises(DTypeError, match=r"MPI cannot carry dtype .*: use a float, complex, integer or bool dtype"):
            call(np.zeros(3, dtype), grid)
        with pytest.raises(DTypeError, match="MPI cannot carry dtype"):
            comm.bcast(np.zeros(3, dtype), grid, ("col",))


def agree(grid, failures, *kind):
    with comm.agreed(grid, *kind):
        if grid.rank in failures:
            raise failures[grid.rank]


@pytest.mark.grids(LINE)
@pytest.mark.parametrize(
    ("error", "kind"),
    [(ShapeError("k 3 and 4"), ShapeError), (LayoutError("no axis"), LayoutError), (OSError("disk"), ColossalError)],
    ids=["shape", "layout", "disk"],
)
def test_a_failure_of_one_rank_is_agreed_on(grid, error, kind):
    assert refusal(lambda: agree(grid, {1: error}), grid) == (kind, str(error))


@pytest.mark.grids(LINE)
def test_a_failing_disk_is_agreed_on_as_the_error_that_the_caller_names(grid):
    failing = refusal(lambda: agree(grid, {2: OSError("disk")}, CheckpointError), grid)
    assert failing == (CheckpointError, "disk")


@pytest.mark.grids(LINE)
def test_of_several_failures_the_first_rank_s_is_agreed_on(grid):
    failures = {1: ShapeError("rank 1"), 2: LayoutError("rank 2")}
    assert refusal(lambda: agree(grid, failures), grid) == (ShapeError, "rank 1")
    agree(grid, {})
