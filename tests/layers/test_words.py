"""The words of layers and of a transformer block equal their closed forms, and no operand is gathered whole."""

import pytest

from colossal_mpi import comm, ledger, random
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.block import TransformerBlock
from tests.reference import layer_case as case
from tests.reference.layer_words import LOCAL, MOVED, layer_words
from tests.reference.modes import GRIDS, mode_of, parallelism
from tests.reference.words import block_words, grouped_words

RAGGED = {"b": 7, "s": 5, "h": 10, "a": 5, "d": 2, "f": 13}
EVEN = {"b": 8, "s": 4, "h": 16, "a": 8, "d": 2, "f": 24}


def check(grid, mode, sizes, keep_gathered):
    p = Parallelism(grid, mode, keep_gathered)
    block = TransformerBlock(sizes["h"], sizes["a"], sizes["f"], p, "block", dtype="float64")
    x = random.normal((sizes["b"], sizes["s"], sizes["h"]), grid, p.stream(), 0, "x")
    with ledger.record() as moved:
        y, cache = block.forward(x, Context())
        block.backward(y, cache)
    total = sum(comm.collect(moved.words, grid))
    assert total == block_words(mode, grid.axes, **sizes, keep_gathered=keep_gathered)
    assert sum(comm.collect(moved.bytes, grid)) == 8 * total


every_size = pytest.mark.parametrize("sizes", [RAGGED, EVEN], ids=["ragged", "even"])
both_caches = pytest.mark.parametrize("keep_gathered", [True, False], ids=["gathered", "stored"])


@every_size
@both_caches
@pytest.mark.grids({"col": 2}, {"col": 3}, {"col": 4})
def test_1d_block(grid, sizes, keep_gathered):
    check(grid, "1d", sizes, keep_gathered)


@every_size
@both_caches
@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 3}, {"row": 2, "col": 4})
def test_2d_block(grid, sizes, keep_gathered):
    check(grid, "2d", sizes, keep_gathered)


@every_size
@both_caches
@pytest.mark.grids({"depth": 2, "col": 2}, {"depth": 2, "row": 2, "col": 2}, {"depth": 3, "row": 2})
def test_25d_block(grid, sizes, keep_gathered):
    check(grid, "2.5d", sizes, keep_gathered)


@every_size
@both_caches
@pytest.mark.grids({"row": 2, "col": 2, "depth": 2}, {"col": 2, "depth": 3}, {"row": 3, "depth": 2})
def test_3d_block(grid, sizes, keep_gathered):
    check(grid, "3d", sizes, keep_gathered)


@pytest.mark.parametrize("groups", [1, 3], ids=["one-group", "groups"])
@pytest.mark.grids(*[axes for axes in GRIDS if "data" not in axes])
def test_grouped_attention(grid, groups):
    """The stream is gathered once for both products; every rank has a single group, whose cotangents are summed."""
    p, (b, s, h, a, d) = parallelism(grid), (7, 5, 10, 6, 2)
    layer = SelfAttention(h, a, p, "attention", groups=groups, width=d, rotary=Rotary(), dtype="float64")
    x = random.normal((b, s, h), grid, p.stream(), 0, "x")
    with ledger.record() as moved:
        y, cache = layer.forward(x, Context())
        layer.backward(y, cache)
    cut = "g" if groups >= grid.axes.get("col", 1) else "r"
    total = grouped_words(mode_of(grid) or "1d", grid.axes, b, s, h, a, groups, d, cut)
    assert sum(comm.collect(moved.words, grid)) == total


@pytest.mark.grids(
    {"col": 3},
    {"row": 2, "col": 2},
    {"row": 2, "col": 3},
    {"depth": 2, "row": 1, "col": 2},
    {"depth": 2, "row": 2, "col": 2},
    {"row": 2, "col": 2, "depth": 2},
    {"row": 2, "col": 1, "depth": 2},
)
def test_layers(grid):
    p, template, moved_words = parallelism(grid), "A" if mode_of(grid) in ("1d", "3d") else "B", {}
    for name in (*MOVED, *LOCAL):
        with ledger.record() as moved:
            case.run(name, p)
        moved_words[name] = sum(comm.collect(moved.words, grid))
    assert moved_words == {name: layer_words(name, template, grid.axes, case.SIZES) for name in moved_words}


@pytest.mark.parametrize("mode", ["2d", "3d"])
@pytest.mark.grids({"row": 2, "col": 2})
def test_no_matrix_is_gathered_whole(grid, mode, monkeypatch):
    whole = []
    moved = DistArray.redistribute

    def watched(self, layout):
        result = moved(self, layout)
        if self.ndim > 1 and self.layout.cut and not result.layout.cut:
            whole.append((self, layout))
        return result

    monkeypatch.setattr(DistArray, "redistribute", watched)
    check(grid, mode, RAGGED, True)
    assert not whole
